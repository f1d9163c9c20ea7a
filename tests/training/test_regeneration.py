"""What a target writes is kept, taken up again, and is the text of plain `generate`."""

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Gemma2Config
from transformers import Gemma2ForCausalLM
from transformers import GPT2Config
from transformers import GPT2LMHeadModel

import hf_specdiff
from hf_specdiff.training import regeneration
from hf_specdiff.training.continuation import Continued
from hf_specdiff.training.continuation import Prompted
from hf_specdiff.training.continuation import continue_prompts
from hf_specdiff.training.regeneration import load_sequences
from hf_specdiff.training.regeneration import num_missing
from hf_specdiff.training.regeneration import regenerate
from hf_specdiff.training.regeneration import shares_of
from hf_specdiff.training.self_prompts import self_prompts
from tests.conftest import make_target

IDS = {"vocab_size": 31, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.6}
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def make_gpt2() -> Any:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=2, n_head=2, n_positions=64, **IDS)).eval()


def make_gemma2() -> Any:
    """A model with sliding windows, whose cache rows cannot be moved."""
    torch.manual_seed(0)
    config = Gemma2Config(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        sliding_window=8,
        **IDS,
    )
    return Gemma2ForCausalLM(config).eval()


def some_prompts(count: int = 30) -> list[Prompted]:
    rng = random.Random(0)
    return [Prompted(index, [rng.randrange(3, 30) for _ in range(rng.randrange(2, 14))]) for index in range(count)]


@pytest.fixture
def tokenizer() -> Any:
    return hf_specdiff.load_demo()[2]


@pytest.fixture(scope="module")
def demo_target() -> Any:
    return hf_specdiff.load_demo()[0]


@pytest.mark.parametrize("make", [make_target, make_gpt2, make_gemma2])
def test_prompts_are_continued_as_generate_continues_them(make: Any) -> None:
    """Rows come and go, and each text is the one that its prompt has alone."""
    target, prompts = make(), some_prompts()
    texts = {text.index: text for text in continue_prompts(target, prompts, max_length=40, batch_size=7)}
    assert len(texts) == 30
    lengths = {len(text.ids) for text in texts.values()}
    assert len(lengths) > 3 or lengths == {40}  # they do end apart
    for prompt in prompts:
        alone = target.generate(torch.tensor([prompt.ids]), do_sample=False, max_new_tokens=40 - len(prompt.ids))
        assert texts[prompt.index].ids == alone[0].tolist()
        assert texts[prompt.index].num_prompt == len(prompt.ids)


def test_what_generate_does_to_the_scores_is_done_here_too() -> None:
    target, prompts = make_target(), some_prompts(12)
    target.generation_config.repetition_penalty = 1.7
    for text in continue_prompts(target, prompts, max_length=30, batch_size=5):
        ids = prompts[text.index].ids
        assert text.ids == target.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=30 - len(ids))[0].tolist()


def test_sampled_text_depends_on_its_prompt_and_the_seed_alone() -> None:
    target, prompts = make_target(), some_prompts()
    settings: dict[str, Any] = {"max_length": 40, "temperature": 1.0}

    def texts(batch_size: int, seed: int, chosen: list[Prompted]) -> dict[int, list[int]]:
        written = continue_prompts(target, chosen, batch_size=batch_size, seed=seed, **settings)
        return {text.index: text.ids for text in written}

    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    whole = texts(8, 0, prompts)
    assert torch.equal(torch.rand(1), expected)
    assert texts(3, 0, prompts) == whole
    assert texts(8, 0, prompts[20:]) == {index: whole[index] for index in range(20, 30)}
    assert texts(8, 1, prompts) != whole


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_texts_in_progress_are_gone_on_with(temperature: float) -> None:
    """Stopped after every few passes, again and again, and written a token fewer times than texts have tokens."""
    target, prompts = make_target(), some_prompts(12)
    settings: dict[str, Any] = {"max_length": 40, "batch_size": 5, "temperature": temperature}
    whole = {text.index: text.ids for text in continue_prompts(target, prompts, **settings)}
    texts: dict[int, list[int]] = {}
    unfinished: dict[int, list[int]] = {}
    passes, kept = [0], 0

    def stop() -> None:
        passes[0] += 1
        if passes[0] % 7 == 0:
            raise KeyboardInterrupt

    while len(texts) < 12:
        kept += sum(len(ids) for ids in unfinished.values()) > 0
        left = [prompt for prompt in prompts if prompt.index not in texts]
        try:
            for text in continue_prompts(target, left, **settings, unfinished=unfinished, after_pass=stop):
                texts[text.index] = text.ids
        except KeyboardInterrupt:
            unfinished = {index: list(ids) for index, ids in unfinished.items()}
    assert texts == whole
    assert kept > 2


def test_draws_follow_the_targets_law() -> None:
    """The first token after one prompt, 4,000 times: a false alarm in one run of 10^6 (5 standard deviations, 31 tokens)."""
    target = make_target()
    prompts = [Prompted(index, [1, 5, 9]) for index in range(4000)]
    drawn = [text.ids[3] for text in continue_prompts(target, prompts, max_length=4, batch_size=500, temperature=1.0)]
    with torch.no_grad():
        law = target(torch.tensor([[1, 5, 9]])).logits[0, -1].softmax(-1)
    counts = torch.bincount(torch.tensor(drawn), minlength=31)
    deviation = (counts - 4000 * law).abs() / (4000 * law * (1 - law)).sqrt().clamp(min=0.2)
    assert float(deviation.max()) < 5


def test_an_interrupt_keeps_what_is_finished_and_the_next_call_goes_on(
    demo_target: Any, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    prompts = [f"Nora has {number} apples" for number in range(12)]
    settings: dict[str, Any] = {"max_length": 16, "batch_size": 4, "temperature": 1.0}
    whole = regenerate(demo_target, tokenizer, prompts, tmp_path / "whole", **settings)
    assert "Target continues the prompts: 12 of 12, " in capsys.readouterr().err
    asked: list[list[int]] = []

    def interrupted(target: Any, prompts: list[Prompted], **arguments: Any) -> Iterator[Continued]:
        asked.append([prompt.index for prompt in prompts])
        for number, text in enumerate(continue_prompts(target, prompts, **arguments)):
            if number == 5 and len(asked) == 1:
                raise KeyboardInterrupt
            yield text

    monkeypatch.setattr(regeneration, "continue_prompts", interrupted)
    with pytest.raises(KeyboardInterrupt):
        regenerate(demo_target, tokenizer, prompts, tmp_path / "broken", **settings)
    assert num_missing(tmp_path / "broken") == 7
    in_progress = json.loads((tmp_path / "broken" / "unfinished-00.json").read_text())
    assert 0 < len(in_progress) <= 4
    assert any(len(ids) > len(tokenizer(prompts[int(index)])["input_ids"]) for index, ids in in_progress.items())
    assert len(load_sequences(tmp_path / "broken", demo_target)) == 5  # what is there can be used
    again = regenerate(demo_target, tokenizer, prompts, tmp_path / "broken", **settings)
    assert len(asked[1]) == 7
    assert not list((tmp_path / "broken").glob("unfinished*"))
    assert again.digest() == whole.digest()
    assert (
        regenerate(demo_target, tokenizer, prompts, tmp_path / "broken", **{**settings, "batch_size": 2}).digest()
        == whole.digest()
    )
    assert len(asked) == 3
    assert asked[2] == []
    assert load_sequences(tmp_path / "broken", demo_target).digest() == whole.digest()


def test_other_settings_other_targets_and_other_folders_are_refused(demo_target: Any, tokenizer: Any, tmp_path: Path) -> None:
    prompts = ["Nora has", "def f(x):"]
    regenerate(demo_target, tokenizer, prompts, tmp_path / "text", max_length=12)
    for changed in ({"max_length": 13}, {"max_length": 12, "temperature": 0.5}):
        with pytest.raises(ValueError, match="`output` must be a fresh folder or hold a run with the same settings"):
            regenerate(demo_target, tokenizer, prompts, tmp_path / "text", **changed)
    with pytest.raises(ValueError, match="with the same settings"):
        regenerate(demo_target, tokenizer, prompts[:1], tmp_path / "text", max_length=12)
    with pytest.raises(ValueError, match=r"`sequences` must be this target's text, got .*Regenerate with this target"):
        load_sequences(tmp_path / "text", make_target())
    with pytest.raises(ValueError, match="`sequences` must be a folder that `hf-specdiff regenerate` wrote"):
        load_sequences(tmp_path / "nowhere", demo_target)


def test_prompts_that_fit_nowhere_are_refused_and_claim_nothing(demo_target: Any, tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"leave room for a continuation within 4 tokens, got none that does: the shortest of 1"
    ):
        regenerate(demo_target, tokenizer, ["def f(x, y, z): return x"], tmp_path, max_length=4)
    with pytest.raises(ValueError, match="`max_length` must be at most the target's context of 1024 tokens, got 1025"):
        regenerate(demo_target, tokenizer, ["def"], tmp_path, max_length=1025)
    with pytest.raises(ValueError, match="`prompts` must be texts for a tokenizer without a chat template"):
        regenerate(demo_target, tokenizer, [[{"role": "user", "content": "2 + 2?"}]], tmp_path, max_length=64)
    assert not list(tmp_path.iterdir())


def test_the_share_of_each_source_is_measured(demo_target: Any, tokenizer: Any, tmp_path: Path) -> None:
    prompts = ["Nora has", "Ben buys", "def f(x):"]
    made = regenerate(demo_target, tokenizer, prompts, tmp_path, max_length=12, sources={"math": 2, "code": 1})
    math, code = shares_of(tmp_path)
    written = made.num_answers().tolist()
    assert (math["source"], math["num_texts"], math["num_tokens"]) == ("math", 2, written[0] + written[1])
    assert (code["source"], code["num_texts"], code["num_tokens"]) == ("code", 1, written[2])
    assert code["share"] == pytest.approx(written[2] / sum(written))


def test_a_model_of_chats_writes_prompts_itself(tokenizer: Any, tmp_path: Path) -> None:
    """The demo's target never saw a chat, but writes on from where a user's turn would begin."""
    target = hf_specdiff.load_demo()[0]
    with pytest.raises(ValueError, match="for a tokenizer without a chat template, got self"):
        self_prompts(target, tokenizer, 4, tmp_path)
    tokenizer.chat_template = TEMPLATE
    prompts = self_prompts(target, tokenizer, 6, tmp_path, temperature=0.7)
    texts = [message["content"] for (message,) in prompts]
    assert texts
    assert len(set(texts)) == len(texts)
    assert self_prompts(target, tokenizer, 6, tmp_path, temperature=0.7) == prompts
    record = json.loads((tmp_path / "regeneration.json").read_text())
    assert record["num_prompts"] == 6
    tokenizer.chat_template = "{{ 'no words of the user' }}"
    with pytest.raises(ValueError, match="does not show where a turn begins"):
        self_prompts(target, tokenizer, 4, tmp_path)

"""Models with a running state: what is written, what is read twice, and who is refused."""

from collections.abc import Iterator
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import DynamicCache
from transformers import MaxLengthCriteria
from transformers.generation.streamers import BaseStreamer

import hf_specdiff
from hf_specdiff.core import stateful_target
from hf_specdiff.core.cache import cache_of
from hf_specdiff.core.checks import check_not_offloaded
from hf_specdiff.core.draft import Draft
from hf_specdiff.core.draft import DraftTree
from hf_specdiff.core.stateful_target import Snapshot
from hf_specdiff.core.stateful_target import StatefulTarget
from hf_specdiff.core.stateful_target import one_by_one
from hf_specdiff.core.stateful_target import unlimited_steps
from hf_specdiff.core.target import fresh_kwargs
from hf_specdiff.core.text import Text
from hf_specdiff.core.trial import why_not_chained
from tests.conftest import plain_text
from tests.core.oracle import drafter_for
from tests.core.oracle import oracle
from tests.core.tiny_models import make_model

CPU = torch.device("cpu")
PROMPT = torch.randint(3, 99, (1, 22), generator=torch.Generator().manual_seed(0))
NUM_NEW = 36
GREEDY = {"do_sample": False, "max_new_tokens": NUM_NEW, "pad_token_id": 0}
# Delta rule, Mamba 2 in and beside attention, all state, a state of the model's own kind, and Mamba 1 beside attention.
SHORT_LIST = ["qwen3_5", "falcon_h1", "nemotron_h", "mamba2", "deepseek_v4", "jamba"]
STATEFUL = [
    *SHORT_LIST, "bailing_hybrid", "bamba", "granitemoehybrid", "kimi_linear", "olmo_hybrid", "qwen3_5_moe", "qwen3_next",
    "qwen4_exp", "zamba2", "zaya", "falcon_mamba", "mamba", "zamba",
]  # fmt: skip
# Their layers hand on several streams side by side, which no drafter here reads.
MANY_STREAMS = {"deepseek_v4", "qwen4_exp"}
REFUSED = ["recurrent_gemma", "rwkv"]
_MODELS: dict[str, Any] = {}


def model_of(model_type: str) -> Any:
    if model_type not in _MODELS:
        _MODELS[model_type] = make_model(model_type)
    return _MODELS[model_type]


def plain_of(model_type: str, max_new_tokens: int = NUM_NEW) -> torch.Tensor:
    """Return what a kept model writes plainly; each text is written once."""
    return plain_text(model_of(model_type), PROMPT, max_new_tokens=max_new_tokens, pad_token_id=0)


def ours(model: Any, layer_ids: list[int] | None = None, **settings: Any) -> Any:
    settings = {**GREEDY, "return_dict_in_generate": True, "draft_shape": "chain", **settings}
    return hf_specdiff.generate(model, PROMPT, assistant_model=drafter_for(model, layer_ids), **settings)


class PassCounter:
    """Counts the passes of a model, the prefill too."""

    def __init__(self, model: Any) -> None:
        self.count = 0
        self.handle = model.register_forward_hook(self._add)

    def _add(self, *_: object) -> None:
        self.count += 1

    def __enter__(self) -> "PassCounter":
        return self

    def __exit__(self, *_: object) -> None:
        self.handle.remove()


@pytest.mark.parametrize("conditioning", ["tokens", "features"])
@pytest.mark.parametrize(
    "model_type", [*SHORT_LIST, *[pytest.param(kind, marks=pytest.mark.slow) for kind in STATEFUL[len(SHORT_LIST) :]]]
)
def test_greedy_text_is_plains(model_type: str, conditioning: str) -> None:
    """With drafts that are right three times out of four, and with a random drafter's, which are wrong."""
    model, plain = model_of(model_type), plain_of(model_type)
    layer_ids = [0, model.config.get_text_config().num_hidden_layers - 1] if conditioning == "features" else None
    if conditioning == "features" and model_type in MANY_STREAMS:
        with pytest.raises(ValueError, match="hidden states"):
            ours(model, layer_ids)
        return
    with oracle(plain):
        output = ours(model, layer_ids)
    assert output.sequences.tolist() == plain.tolist()
    assert output.speculation.tokens_per_round > 2
    few = {"max_new_tokens": 12}
    beginning = plain[:, : PROMPT.shape[1] + 12].tolist()
    assert ours(model, layer_ids, **few).sequences.tolist() == beginning
    assert model.generate(PROMPT, **{**GREEDY, **few}).tolist() == beginning  # nothing is left behind in the model


@pytest.mark.parametrize("model_type", REFUSED)
def test_models_that_forget_their_state_in_a_pass_are_refused(model_type: str) -> None:
    model = make_model(model_type)
    with pytest.raises(ValueError, match=r"Use plain model\.generate"):
        ours(model)


@pytest.mark.parametrize(("model_type", "layer_ids"), [("qwen3_5", None), ("falcon_h1", [0, 3])])
def test_few_passes_are_spent_and_nothing_is_read_twice_when_a_draft_stands(
    model_type: str, layer_ids: list[int] | None
) -> None:
    model = model_of(model_type)
    assert why_not_chained(model, CPU) is None  # the trial has passes of its own
    plain = plain_of(model_type, 160)
    shares = {}
    for wrong_share in (0.0, 0.1, 0.25):
        with oracle(plain, wrong_share), PassCounter(model) as passes:
            output = ours(model, layer_ids, max_new_tokens=160, return_dict_in_generate=True)
        assert output.sequences.tolist() == plain.tolist()
        rounds = output.speculation
        if wrong_share == 0:
            assert passes.count == 1 + len(rounds.num_accepted)
        else:
            accepted, drafted = sum(row[0] for row in rounds.num_accepted), sum(row[0] for row in rounds.num_drafted)
            shares[accepted / drafted] = (passes.count - 2) / len(rounds.num_accepted)
    assert min(shares) < 0.7 < max(shares)
    assert max(shares.values()) <= 1.25, shares


def texts_read(
    model: Any, text: torch.Tensor, drafts: list[list[int]], kept: list[int]
) -> tuple[list[list[int]], StatefulTarget]:
    """Run rounds by hand; returns the tokens that each pass read."""
    read: list[list[int]] = []
    hook = model.register_forward_pre_hook(
        lambda module, inputs, kwargs: read.append(kwargs["input_ids"][0].tolist()), with_kwargs=True
    )
    target = StatefulTarget(model, model.generation_config, fresh_kwargs(model, text[:, :4]), [0, 3])
    with torch.no_grad():
        target.prefill(Text.of_prompt(text[:, :4]))
        target.commit([[0]], 0)
        end, widths = 4, []
        for draft, count in zip(drafts, kept, strict=True):
            logits = target.verify(
                Text.of_prompt(text[:, : end + 1]), Draft(torch.tensor([draft]).long().view(1, -1), None, has_prefix_law=True)
            )
            assert logits.shape[1] == len(draft) + 1
            features = target.commit([list(range(count))], len(draft))
            widths.append(features.states.shape[1])
            end += count
    hook.remove()
    assert widths == kept  # each committed token's hidden states once, whatever was replayed
    return read, target


def test_a_pass_replays_what_was_accepted_since_the_snapshot_and_no_more() -> None:
    model, text = model_of("qwen3_5"), PROMPT
    token = text[0].tolist()
    right, wrong = token[5:8], [1, 1, 1]
    # Kept of the drafts: all; one of three and the anchor; the anchor alone; all.
    read, _ = texts_read(model, text, [right, [token[9], 1, 1], wrong, token[12:14]], [4, 2, 1, 3])
    assert read == [
        token[:4],
        token[4:8],
        [token[8], token[9], 1, 1],
        [*token[8:10], token[10], *wrong],
        [*token[8:11], token[11], *token[12:14]],
    ]


def test_a_long_replay_is_paid_off_by_a_pass_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stateful_target, "MOST_REPLAYED", 2)
    model, token = model_of("qwen3_5"), PROMPT[0].tolist()
    read, target = texts_read(model, PROMPT, [[1, 1]] * 5, [1, 1, 1, 1, 1])
    assert read[1:5] == [[token[4], 1, 1], [*token[4:6], 1, 1], [*token[4:7], 1, 1], token[4:7]]
    assert read[5:] == [[token[7], 1, 1], [*token[7:9], 1, 1]]
    assert target.num_pending == 2


def state_of(cache: Any) -> Iterator[tuple[str, torch.Tensor]]:
    for place, layer in enumerate(cache.layers):
        for name, value in vars(layer).items():
            for key, item in value.items() if isinstance(value, dict) else [("", value)]:
                if isinstance(item, torch.Tensor):
                    yield f"{place}.{name}.{key}", item


@pytest.mark.parametrize("model_type", ["qwen3_5", "falcon_h1", "mamba2", "deepseek_v4"])
def test_the_cache_that_comes_back_is_plains(model_type: str) -> None:
    """All tokens but the last are in it, though drafts that are wrong left some pending; and autograd takes it."""
    model = model_of(model_type)
    output = ours(model, max_new_tokens=10)
    plain = fresh_kwargs(model, output.sequences[:, :-1])
    with torch.no_grad():
        model(output.sequences[:, :-1], **plain)
    mine, other = dict(state_of(output.past_key_values)), dict(state_of(cache_of(plain)))
    assert mine.keys() == other.keys()
    for name, tensor in mine.items():
        assert not tensor.is_inference()
        assert torch.allclose(tensor, other[name], atol=2e-3), name


@pytest.mark.parametrize("model_type", ["qwen3_5", "falcon_h1", "deepseek_v4"])
def test_turns_of_a_chat_go_on_from_one_cache(model_type: str) -> None:
    """Ours from ours, plain from ours, and ours from plain's."""
    model = model_of(model_type)
    drafter, turn = drafter_for(model), {**GREEDY, "max_new_tokens": 10}
    plain = plain_of(model_type, 20)

    def plainly(ids: torch.Tensor, cache: DynamicCache) -> torch.Tensor:
        return model.generate(ids, past_key_values=cache, **turn)

    def drafted(ids: torch.Tensor, cache: DynamicCache) -> torch.Tensor:
        return hf_specdiff.generate(model, ids, assistant_model=drafter, past_key_values=cache, draft_shape="chain", **turn)

    for first, second in ((drafted, drafted), (drafted, plainly), (plainly, drafted)):
        cache = DynamicCache(config=model.config.get_text_config())
        assert second(first(PROMPT, cache), cache).tolist() == plain.tolist()


@pytest.mark.parametrize("model_type", ["qwen3_5", "falcon_h1"])
def test_outputs_of_every_step_are_plains(model_type: str) -> None:
    """Scores, logits and hidden states, also of tokens that were replayed; the streamer gets each token once."""
    model = model_of(model_type)
    names = ("scores", "logits", "hidden_states")
    settings = {**GREEDY, "max_new_tokens": 20, "repetition_penalty": 1.1, "return_dict_in_generate": True}
    settings |= {f"output_{name}": True for name in names}
    plain = model.generate(PROMPT, **settings)
    streamer = Collector()
    for layer_ids in (None, [0, 3]):
        with oracle(plain.sequences):
            output = ours(model, layer_ids, streamer=streamer, **settings)
        assert output.sequences.tolist() == plain.sequences.tolist()
        for name in names:
            mine, other = getattr(output, name), getattr(plain, name)
            assert len(mine) == len(other) == 20
            for a, b in zip(mine, other, strict=True):
                for x, y in zip(a if isinstance(a, tuple) else [a], b if isinstance(b, tuple) else [b], strict=True):
                    assert x.shape == y.shape
                    assert torch.allclose(x, y, atol=5e-3), name
    assert streamer.tokens == output.sequences[0].tolist() * 2


class Collector(BaseStreamer):
    def __init__(self) -> None:
        self.tokens: list[int] = []

    def put(self, value: torch.Tensor) -> None:
        self.tokens += value.flatten().tolist()

    def end(self) -> None:
        pass


@pytest.mark.parametrize("place", [3, 8, 13, 14])
def test_an_end_token_anywhere_ends_the_text_where_plain_ends(place: int) -> None:
    model, plain = model_of("qwen3_5"), plain_of("qwen3_5")
    end = int(plain[0, PROMPT.shape[1] + place])
    want = model.generate(PROMPT, **GREEDY, eos_token_id=end)
    criterion = MaxLengthCriteria(PROMPT.shape[1] + place)
    with oracle(plain):
        assert ours(model, eos_token_id=end).sequences.tolist() == want.tolist()
        assert ours(model, stopping_criteria=[criterion]).sequences.tolist() == plain[:, : PROMPT.shape[1] + place].tolist()


def test_a_padded_prompt_is_decoded_as_plain_decodes_it() -> None:
    model = model_of("qwen3_5")
    ids = torch.cat([torch.zeros(1, 5, dtype=torch.long), PROMPT], dim=1)
    mask = (torch.arange(ids.shape[1]) >= 5).long()[None]
    plain = model.generate(ids, attention_mask=mask, **GREEDY)
    with oracle(plain):
        output = hf_specdiff.generate(model, ids, attention_mask=mask, assistant_model=drafter_for(model), **GREEDY)
    assert output.tolist() == plain.tolist()


def test_trees_are_refused_with_the_reason() -> None:
    model = model_of("qwen3_5")
    with pytest.raises(ValueError, match=r"`draft_shape` must be 'chain' here, got 'tree'.*running state"):
        ours(model, draft_shape="tree")
    assert ours(model, draft_shape="auto", max_new_tokens=4).speculation.draft_shape == "chain"
    with pytest.raises(ValueError, match="must be a chain for a StatefulTarget"):
        StatefulTarget(model, model.generation_config, fresh_kwargs(model, PROMPT), None).verify(
            Text.of_prompt(PROMPT), DraftTree(PROMPT[:, :1], [[0]])
        )
    with pytest.raises(ValueError, match="must not be 'offloaded'"):
        check_not_offloaded(SimpleNamespace(offloading=True))


def test_a_state_that_cannot_be_copied_is_refused() -> None:
    cache = DynamicCache(config=model_of("qwen3_5").config)
    cache.layers[0].conv_states[0] = object()
    with pytest.raises(ValueError, match="LinearAttentionLayer with a object in `conv_states`"):
        Snapshot(cache)


def test_step_sizes_are_bounded_again_after_a_pass() -> None:
    """Passes of several tokens bound them in this model and steps do not: without `unlimited_steps` the text differs."""
    model = make_model("nemotron_h")
    mixer = next(module for module in model.modules() if hasattr(module, "time_step_limit"))
    limit = mixer.time_step_limit
    assert limit[0] > 0
    with unlimited_steps([mixer]):
        assert mixer.time_step_limit[0] == 0
    assert mixer.time_step_limit == limit
    assert why_not_chained(model, CPU) is None
    model = make_model("nemotron_h")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stateful_target, "unlimited_steps", lambda modules: nullcontext())
        assert "other logits" in str(why_not_chained(model, CPU))


def test_layers_of_mamba_1_step_through_a_pass_and_no_longer() -> None:
    model = make_model("jamba")
    (mixer, *_) = [module for module in model.modules() if hasattr(module, "A_log")]
    states = torch.randn(1, 5, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        whole = mixer(states)
        with one_by_one([mixer]):
            alone = torch.cat([mixer(state) for state in states.split(1, dim=1)], dim=1)
            assert torch.equal(mixer(hidden_states=states), alone)
        assert "forward" not in vars(mixer)
        assert torch.equal(mixer(states), whole)
        assert not torch.allclose(whole, alone, atol=1e-3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stateful_target, "one_by_one", lambda modules: nullcontext())
        assert "other logits" in str(why_not_chained(model, CPU))


@pytest.mark.parametrize("model_type", ["qwen3_5", "mamba2"])
def test_a_draft_longer_than_the_chunks_of_a_kernel_is_read_as_steps_read_it(model_type: str) -> None:
    """Chunks are of 64 and of 8 tokens; of the first draft only its anchor stands, and the next pass crosses chunks too."""
    model = model_of(model_type)
    text = torch.randint(3, 99, (1, 110), generator=torch.Generator().manual_seed(1))
    target = StatefulTarget(model, model.generation_config, fresh_kwargs(model, text[:, :4]), None)
    with torch.no_grad():
        want = model(text, use_cache=False).logits[:, 4:]
        target.prefill(Text.of_prompt(text[:, :4]))
        target.commit([[0]], 0)
        first = target.verify(Text.of_prompt(text[:, :5]), Draft(text[:, 5:85], None, has_prefix_law=True))
        target.commit([[0]], 80)
        second = target.verify(Text.of_prompt(text[:, :6]), Draft(text[:, 6:], None, has_prefix_law=True))
    assert torch.allclose(first, want[:, :81], atol=5e-3)
    assert torch.allclose(second, want[:, 1:], atol=5e-3)


@pytest.mark.parametrize("model_type", ["qwen3_5", "mamba2"])
def test_a_dynamic_cache_takes_the_place_of_a_static_one(model_type: str) -> None:
    model = model_of(model_type)
    plain = plain_of(model_type, 6)
    assert ours(model, max_new_tokens=6, cache_implementation="static").sequences.tolist() == plain.tolist()

"""Diffusion language models as drafters: the law of what is written, and what is refused."""

from typing import Any

import pytest
import torch
from transformers import LogitsProcessorList
from transformers import Qwen2ForCausalLM
from transformers import pipeline
from transformers.utils import logging

import hf_specdiff
from hf_specdiff.core.acceptance import accept_by_ratio
from hf_specdiff.core.conditioning import make_drafter
from hf_specdiff.core.draft import Draft
from hf_specdiff.core.draft import DraftTree
from hf_specdiff.core.sampling import Scores
from hf_specdiff.core.shapes import DraftShaper
from hf_specdiff.core.speculation import SpeculationConfig
from hf_specdiff.core.text import Text
from tests.conftest import make_target
from tests.core import test_conditional as tables
from tests.diffusion.test_trials import MASK
from tests.diffusion.test_trials import make_body

EXACT = 1e-12
PROMPT = torch.tensor([[1, 5, 9, 4, 7, 7, 3]])


@pytest.fixture
def in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("sampling", "drafters"):
        monkeypatch.setattr(f"hf_specdiff.core.{module}.to_float", lambda logits: logits.double())


# Of the tables' 3 tokens the second is no word of the body's; what the body has for a mask is the target's third token.
OWN_IDS = [3, -1, 0]


def small_drafter(offset: int = 0, own_ids: list[int] | None = None) -> hf_specdiff.DiffusionDrafter:
    """Return a drafter in float64 for the tables' 3 tokens; its mask is a fourth, or with ids of its own the third of five."""
    body = make_body(vocab_size=4 if own_ids is None else 5, initializer_range=0.7).double()
    settings: dict[str, Any] = {"block_size": tables.G + 1, "logit_offset": offset, "own_ids": own_ids}
    target = make_target(vocab_size=tables.V)
    return hf_specdiff.DiffusionDrafter(body, mask_token_id=3 if own_ids is None else 2, target=target, **settings)


def draft_of(network: Any, speculation: SpeculationConfig) -> Draft | DraftTree:
    around = make_drafter(network, None, speculation, LogitsProcessorList(), shaper=DraftShaper(speculation))
    return around.draft(Text.of_prompt(torch.tensor([[1, 2, 0]])), None)


@pytest.mark.usefixtures("in_float64")
@pytest.mark.parametrize(
    ("shape", "acceptance", "offset", "own_ids"),
    [
        ("samples", "self_selection", 0, None),
        ("chain", "ratio", 0, None),
        # Fewer drafted words, fewer drafts to enumerate.
        ("samples", "self_selection", -1, OWN_IDS),
        ("samples", "match", -1, OWN_IDS),
        ("chain", "ratio", -1, OWN_IDS),
        ("chain", "block", -1, OWN_IDS),
        ("tree", "ratio", -1, OWN_IDS),
    ],
)
def test_sampled_text_has_the_targets_law(
    shape: str, acceptance: str, offset: int, own_ids: list[int] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = small_drafter(offset, own_ids)
    speculation = SpeculationConfig(tables.G, draft_shape=shape, num_drafts=2, tree_budget=4, acceptance=acceptance)
    law = tables.output_law(lambda: draft_of(network, speculation), acceptance, monkeypatch)
    assert tables.total_variation(law) < EXACT


@pytest.mark.usefixtures("in_float64")
def test_control_the_best_of_several_drafts_under_the_ratio_test_breaks_the_law(monkeypatch: pytest.MonkeyPatch) -> None:
    """Selection by the target's scores, then min(1, p / q) with the q of an unselected draft."""
    network = small_drafter()
    speculation = SpeculationConfig(tables.G, draft_shape="samples", num_drafts=2, acceptance="self_selection")
    chain = draft_of(network, SpeculationConfig(tables.G, draft_temperature=1.0, acceptance="ratio"))
    assert isinstance(chain, Draft)

    def wrong(draft: DraftTree, scores: Scores) -> Any:
        laws = scores.logits[0].softmax(-1)
        tokens = draft.tokens[0].tolist()

        def score(path: list[int]) -> float:
            product, total = 1.0, 0.0
            for place, node in zip([0, *path], path, strict=False):
                product *= float(laws[place, tokens[node - 1]])
                total += product
            return total

        path = max(draft.drafts[0], key=score)
        best = Draft(draft.tokens[:, [node - 1 for node in path]], chain.probs, has_prefix_law=True)
        accepted = accept_by_ratio(best, laws[[0, *path]][None])
        return accepted

    monkeypatch.setattr(tables, "make_rule", lambda *args, **kwargs: wrong)
    law = tables.output_law(lambda: draft_of(network, speculation), "self_selection", monkeypatch)
    assert tables.total_variation(law) > 1e-2


@pytest.mark.usefixtures("in_float64")
@pytest.mark.parametrize("acceptance", ["ratio", "block"])
def test_control_a_law_that_counts_words_which_cannot_be_drafted_breaks_the_targets(
    acceptance: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The body's own law of the drafted words, not made to sum to 1 over those that the target has too."""
    network, shares = small_drafter(-1, OWN_IDS), []
    network.body.register_forward_hook(
        lambda module, args, output: shares.append(output.logits[:, :-1].softmax(-1)[..., [0, 3]].sum(-1, keepdim=True))
    )

    def wrong() -> Draft:
        draft = draft_of(network, SpeculationConfig(tables.G, draft_shape="chain", acceptance=acceptance))
        assert isinstance(draft, Draft)
        assert bool((draft.tokens != 1).all())
        assert draft.probs is not None
        return Draft(draft.tokens, draft.probs * shares[-1], has_prefix_law=True)

    law = tables.output_law(wrong, acceptance, monkeypatch)
    assert tables.total_variation(law) > 1e-2


def test_a_body_with_the_same_words_under_other_ids_drafts_the_same() -> None:
    """Its rows are turned round, its mask among the ids of words; two of the words it does not have."""
    body, target, rows = make_body(), make_target(), torch.arange(31, -1, -1)
    settings: dict[str, Any] = {"block_size": 6, "context_cache": "exact", "target": target}
    straight = hf_specdiff.DiffusionDrafter(body, mask_token_id=MASK, foreign_ids=[4, 9], **settings)
    turned = make_body()
    for layer in (turned.get_input_embeddings(), turned.get_output_embeddings()):
        layer.weight.data = layer.weight.data[rows]
    own = [-1 if token in (4, 9) else int(rows[token]) for token in range(31)]
    drafter = hf_specdiff.DiffusionDrafter(turned, mask_token_id=int(rows[MASK]), own_ids=own, **settings)
    assert drafter.own_mask_token_id == 0
    assert drafter.drafted_ids is not None
    assert torch.equal(drafter.drafted_ids, torch.tensor([token for token in range(31) if token not in (4, 9)]))
    windows = [torch.tensor([[*PROMPT[0].tolist(), 6, 0, mask, 11, mask]]) for mask in (31, MASK)]
    with torch.no_grad():
        found, wanted = (one(ids, window_size=5).logits for one, ids in zip((drafter, straight), windows, strict=True))
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    inputs: dict[str, Any] = {"inputs": PROMPT.repeat(2, 1), "return_dict_in_generate": True, "max_new_tokens": 16}
    inputs["attention_mask"] = torch.tensor([[0, 0, *[1] * 5], [1] * 7])
    for scheme in ({"draft_shape": "chain", "gamma": 5, "num_denoising_steps": 3}, {"draft_shape": "tree", "tree_budget": 9}):
        outputs = [hf_specdiff.generate(target, **inputs, assistant_model=one, **scheme) for one in (drafter, straight)]
        assert torch.equal(outputs[0].sequences, target.generate(**{**inputs, "return_dict_in_generate": False}))
        assert outputs[0].speculation.num_accepted == outputs[1].speculation.num_accepted


@pytest.mark.parametrize("way", ["generate", "attach", "pipeline"])
def test_every_way_in_takes_a_language_model(way: str) -> None:
    target, settings = make_target(), {"do_sample": False, "max_new_tokens": 20}
    plain = target.generate(PROMPT, **settings)
    drafter = hf_specdiff.DiffusionDrafter(make_body(), mask_token_id=MASK, target=target)
    assert drafter.config.vocab_size == 31
    if way == "generate":
        assert torch.equal(hf_specdiff.generate(target, PROMPT, assistant_model=drafter, **settings), plain)
        return
    hf_specdiff.attach(target)
    if way == "attach":
        assert torch.equal(target.generate(PROMPT, assistant_model=drafter, gamma=4, draft_shape="chain", **settings), plain)
        return
    target, _, tokenizer = hf_specdiff.load_demo()
    config = target.config
    body, turned = make_body(vocab_size=config.vocab_size), list(range(config.vocab_size))[::-1]
    drafter = hf_specdiff.DiffusionDrafter(body, mask_token_id=config.vocab_size - 1, target=target, own_ids=turned)
    writer = pipeline("text-generation", model=hf_specdiff.attach(target), tokenizer=tokenizer, assistant_model=drafter)
    written = writer("def f(x):", do_sample=False, max_new_tokens=8)[0]["generated_text"]
    hf_specdiff.detach(target)
    ids = tokenizer("def f(x):", return_tensors="pt", return_token_type_ids=False)
    assert written == tokenizer.decode(target.generate(**ids, do_sample=False, max_new_tokens=8)[0], skip_special_tokens=True)


def test_without_a_target_special_ids_do_not_count_and_rows_of_padding_are_not_drafted() -> None:
    target, settings = make_target(), {"do_sample": True, "max_new_tokens": 30}
    drafter = hf_specdiff.DiffusionDrafter(make_body(vocab_size=50, bos_token_id=40), mask_token_id=45, block_size=6)
    for scheme in ({"draft_shape": "chain", "gamma": 4}, {"draft_shape": "tree", "tree_budget": 9}, {"draft_shape": "samples"}):
        written = hf_specdiff.generate(target, PROMPT, assistant_model=drafter, **scheme, **settings)
        assert int(written.max()) < 31


def test_a_target_with_more_rows_than_the_body_is_followed() -> None:
    target, settings = make_target(vocab_size=60), {"do_sample": False, "max_new_tokens": 20}
    prompt = torch.tensor([[1, 5, 58, 4, 59, 7, 3]])
    drafter = hf_specdiff.DiffusionDrafter(make_body(), mask_token_id=MASK, block_size=6, target=target)
    written = hf_specdiff.generate(target, prompt, assistant_model=drafter, draft_shape="tree", tree_budget=9, **settings)
    assert torch.equal(written, target.generate(prompt, **settings))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mask_token_id": 32}, "`mask_token_id` must be a row of the body's embedding, 0 to 31, got 32"),
        ({"mask_token_id": -1}, "`mask_token_id`"),
        ({"mask_token_id": None}, "`mask_token_id`"),
        ({"logit_offset": 1}, "`logit_offset` must be one of 0, -1, got 1"),
        ({"attention": "causal"}, "`attention` must be one of full, block_causal"),
        ({"attention": "block_causal"}, "`block_length` must be a positive integer"),
        ({"block_length": 4}, "`block_length` must be a positive integer"),
        ({"attention": "block_causal", "block_length": 0}, "`block_length`"),
        ({"context_cache": "none"}, "`context_cache` must be one of auto, exact, prefix"),
        ({"block_size": 1}, "`block_size`"),
        ({"target": make_target(vocab_size=2000)}, "must have the target's vocabulary of 2000 tokens"),
        (
            {"target": make_target(), "own_ids": [1, 2]},
            "`own_ids` must hold an id for each of the target's 31 tokens, got 2 ids",
        ),
        ({"own_ids": [1, 32]}, "`own_ids` must hold rows of the body's embedding, 0 to 31, or -1 for none, got 1 to 32"),
        ({"own_ids": [-1, -1]}, "`own_ids` must hold rows"),
        ({"own_ids": [-2, 1]}, "`own_ids` must hold rows"),
    ],
)
def test_bad_settings_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        hf_specdiff.DiffusionDrafter(make_body(), **{"mask_token_id": MASK, **settings})


def test_what_is_no_model_is_refused() -> None:
    with pytest.raises(TypeError, match="`body` must be a model of transformers, got str"):
        hf_specdiff.DiffusionDrafter("folder", mask_token_id=3)


def test_a_body_that_reads_no_masks_is_refused() -> None:
    body = make_body()
    body.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="must have an attention that reads masks, got 'flash_attention_2'"):
        hf_specdiff.DiffusionDrafter(body, mask_token_id=MASK)


def test_a_body_as_large_as_its_target_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    target = make_target()
    logger = logging.get_logger("hf_specdiff.diffusion.drafter")
    logger.addHandler(caplog.handler)
    try:
        hf_specdiff.DiffusionDrafter(make_body(), mask_token_id=MASK, target=target)
        assert "0.7 times the target's weights" in caplog.text
        assert "with 4 tokens a round expect 2.3 times plain" in caplog.text
        caplog.clear()
        hf_specdiff.DiffusionDrafter(make_body(), mask_token_id=MASK, target=make_target(num_hidden_layers=12))
        assert not caplog.text
    finally:
        logger.removeHandler(caplog.handler)


def test_another_vocabulary_is_refused_where_the_pair_meets() -> None:
    drafter = hf_specdiff.DiffusionDrafter(make_body(vocab_size=2000), mask_token_id=MASK)
    with pytest.raises(ValueError, match="must have the target's vocabulary of 31 tokens"):
        hf_specdiff.generate(make_target(), PROMPT, assistant_model=drafter, max_new_tokens=3)


def test_the_network_is_in_evaluation_mode() -> None:
    body: Qwen2ForCausalLM = make_body(attention_dropout=0.5).train()
    drafter = hf_specdiff.DiffusionDrafter(body, mask_token_id=MASK)
    assert not drafter.body.training

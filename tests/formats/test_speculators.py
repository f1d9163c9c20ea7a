"""Drafters of the package speculators, held against its own classes."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen3Config

import hf_specdiff
from tests.conftest import MASK_TOKEN_ID
from tests.conftest import VOCAB_SIZE
from tests.conftest import make_target
from tests.formats.referees import speculators
from tests.formats.rounds import check_greedy
from tests.formats.rounds import our_rounds
from tests.formats.rounds import our_states
from tests.formats.rounds import random_rounds

KEPT = [0, 2, 3, 5, 6, 7, 9, 10, 11, 13, 17, 20, 22, 29]
SLIDING = {"layer_types": ["sliding_attention", "full_attention"], "use_sliding_window": True, "sliding_window": 4}
VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "reduced vocabulary": ({}, {"draft_vocab_size": len(KEPT)}),
    "from the anchor": ({}, {"sample_from_anchor": True}),
    "sliding, causal": (SLIDING, {}),
    "sliding, bidirectional": (SLIDING, {"sliding_window_non_causal": True}),
}


def their_config(config_class: Any, body: dict[str, Any], fields: dict[str, Any]) -> Any:
    nested = Qwen3Config(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        initializer_range=0.3,
        **{"vocab_size": VOCAB_SIZE, **body},
    )
    nested._attn_implementation = "sdpa"
    fields = {"draft_vocab_size": VOCAB_SIZE, "block_size": 6, "mask_token_id": MASK_TOKEN_ID, **fields}
    num_tokens = 6 if fields.get("sample_from_anchor") else 5
    proposal = speculators.proposals.greedy.GreedyTokenProposalConfig(speculative_tokens=num_tokens)
    return config_class(
        transformer_layer_config=nested,
        aux_hidden_state_layer_ids=[1, 3],
        speculators_config=speculators.SpeculatorsConfig(
            algorithm="dflash",
            proposal_methods=[proposal],
            default_proposal_method="greedy",
            verifier=speculators.VerifierConfig(name_or_path=None, architectures=["LlamaForCausalLM"]),
        ),
        **fields,
    )


def their_drafter(drafter_class: Any, target: Any, body: dict[str, Any], fields: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    drafter = drafter_class(their_config(drafter_class.config_class, body, fields)).eval()
    for name, parameter in drafter.named_parameters():
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, 1.0, 0.3)
        elif parameter.isnan().any() and "verifier" not in name:
            torch.nn.init.normal_(parameter, 0.0, 0.3)
    with torch.no_grad():
        drafter.embed_tokens.weight.copy_(target.model.embed_tokens.weight)
        if not drafter.use_draft_vocab:
            drafter.lm_head.weight.copy_(target.lm_head.weight)
        else:
            kept = torch.tensor(KEPT)
            drafter.load_vocab_mappings(
                torch.isin(torch.arange(target.config.vocab_size), kept), kept - torch.arange(len(kept))
            )
        drafter.verifier_lm_head.weight.zero_()
    return drafter


@torch.no_grad()
def their_rounds(drafter: Any, rounds: list) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return their hidden states and logits of each round's window, from a pass over the whole text with one anchor."""
    found, context = [], torch.empty(1, 0, drafter.fc.in_features)
    for window, features, start in rounds:
        context = torch.cat([context, features], dim=1)
        length = start + 2 * drafter.block_size
        filler = torch.randn(1, length - start, context.shape[2])
        ids = torch.zeros(1, length, dtype=torch.long)
        ids[0, start] = window[0, 0]
        is_anchor = torch.zeros(1, length)
        is_anchor[0, start] = 1
        hidden, logits, *_ = drafter._backbone_forward(
            torch.cat([context, filler], dim=1),
            ids,
            is_anchor,
            torch.zeros(1, length, drafter.hidden_size),
            torch.zeros(1, length, dtype=torch.long),
            max_anchors=1,
        )
        found.append((hidden, logits))
    return found


@pytest.fixture(params=VARIANTS, ids=str)
def variant(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Any, Any, Path]:
    target = make_target()
    drafter = their_drafter(speculators.DFlashDraftModel, target, *VARIANTS[request.param])
    drafter.save_pretrained(tmp_path)
    return drafter, target, tmp_path


def test_logits_are_theirs_over_rounds_with_cache(variant: tuple[Any, Any, Path]) -> None:
    theirs, target, folder = variant
    ours = hf_specdiff.load_drafter(folder, target=target)
    rounds = random_rounds(ours)
    for logits, (_, expected) in zip(our_rounds(ours, target, rounds), their_rounds(theirs, rounds), strict=True):
        if not theirs.config.sample_from_anchor:
            expected = expected[:, 1:]
        if theirs.use_draft_vocab:
            assert logits.isfinite().sum(dim=-1).unique().tolist() == [len(KEPT)]
            logits = logits[..., KEPT]
        torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)


def test_greedy_tokens_are_those_of_plain(variant: tuple[Any, Any, Path]) -> None:
    _, target, folder = variant
    check_greedy(target, hf_specdiff.load_drafter(folder, target=target))


def test_older_files_with_an_embedding_and_a_head_load_too(tmp_path: Path) -> None:
    target = make_target()
    drafter = their_drafter(speculators.DFlashDraftModel, target, {}, {})
    drafter.__dict__["_keys_to_ignore_on_save"] = ["verifier_lm_head.weight", "verifier_norm.weight"]
    drafter.save_pretrained(tmp_path)
    ours = hf_specdiff.load_drafter(tmp_path, target=target)
    assert ours.config.has_own_embedding
    assert ours.config.has_own_head
    rounds = random_rounds(ours)
    for logits, (_, expected) in zip(our_rounds(ours, target, rounds), their_rounds(drafter, rounds), strict=True):
        torch.testing.assert_close(logits, expected[:, 1:], atol=1e-5, rtol=0)


def test_a_target_of_another_width_is_read_by_a_wider_adapter(tmp_path: Path) -> None:
    """The field is speculators' and vLLM's, whose network has this adapter; embedding and head are then the drafter's own."""
    target = make_target(hidden_size=24)
    drafter = their_drafter(speculators.DFlashDraftModel, make_target(), {}, {"target_hidden_size": 24})
    drafter.fc = torch.nn.Linear(2 * 24, 16, bias=False)
    drafter.__dict__["_keys_to_ignore_on_save"] = ["verifier_lm_head.weight", "verifier_norm.weight"]
    drafter.save_pretrained(tmp_path)
    ours = hf_specdiff.load_drafter(tmp_path, target=target)
    assert ours.config.target_hidden_size == 24
    rounds = random_rounds(ours)
    for logits, (_, expected) in zip(our_rounds(ours, target, rounds), their_rounds(drafter, rounds), strict=True):
        torch.testing.assert_close(logits, expected[:, 1:], atol=1e-5, rtol=0)
    check_greedy(target, ours)
    with pytest.raises(ValueError, match=r"`target` must have the `hidden_size` 24 .* got 16"):
        hf_specdiff.load_drafter(tmp_path, target=make_target())


@pytest.mark.parametrize(("num_tokens", "is_from_anchor"), [(5, False), (6, True)])
def test_how_many_tokens_are_proposed_settles_who_predicts(tmp_path: Path, num_tokens: int, is_from_anchor: bool) -> None:
    target = make_target()
    their_drafter(speculators.DFlashDraftModel, target, {}, {}).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["sample_from_anchor"]
    config["speculators_config"]["proposal_methods"][0]["speculative_tokens"] = num_tokens
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert hf_specdiff.load_drafter(tmp_path, target=target).config.predicts_from_anchor == is_from_anchor


HEADS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    kind: ("DSparkDraftModel", {}, {"markov_rank": 4, "markov_head_type": kind}) for kind in ("vanilla", "gated", "rnn")
}
HEADS["reduced vocabulary"] = ("DSparkDraftModel", {}, {"markov_rank": 4, "draft_vocab_size": len(KEPT)})
HEADS["not from the anchor"] = ("DSparkDraftModel", {}, {"markov_rank": 4, "sample_from_anchor": False})
HEADS["selector"] = (
    "DFlash2DraftModel",
    SLIDING,
    {"conv_group_size": 4, "selector_rank": 4, "selector_top_k": 5, "conv_kernel_size": 3},
)


@pytest.mark.parametrize("name", HEADS)
def test_laws_given_the_token_before_are_theirs(name: str, tmp_path: Path) -> None:
    """Along one greedy chain, slot by slot, and a wrong token before must give another law."""
    class_name, body, fields = HEADS[name]
    target = make_target()
    is_from_anchor = fields.get("sample_from_anchor", class_name == "DSparkDraftModel")
    theirs = their_drafter(getattr(speculators, class_name), target, body, {**fields, "sample_from_anchor": is_from_anchor})
    for parameter_name, parameter in theirs.named_parameters():
        if any(part in parameter_name for part in ("markov", "conv", "selector", "confidence")):
            torch.nn.init.normal_(parameter, 0.0, 0.5)
    theirs.save_pretrained(tmp_path)
    ours = hf_specdiff.load_drafter(tmp_path, target=target)
    rounds = random_rounds(ours)
    skip = 0 if is_from_anchor else 1
    generator = torch.Generator().manual_seed(1)
    pairs = zip(
        rounds, our_rounds(ours, target, rounds), our_states(ours, target, rounds), their_rounds(theirs, rounds), strict=True
    )
    for (window, _, _), logits, states, (hidden, expected) in pairs:
        torch.testing.assert_close(states, hidden[:, skip:], atol=1e-5, rtol=0)
        previous = torch.randint(3, VOCAB_SIZE - 1, (1, states.shape[1]), generator=generator)
        previous[0, 0] = window[0, 0]
        laws = their_laws(theirs, hidden[:, skip:], expected[:, skip:], previous)
        if hasattr(theirs, "confidence_head"):
            before = torch.cat([hidden[:, skip:], theirs.markov_head.prev_embeddings(previous)], dim=-1)
            said = torch.stack(
                [ours.confidence(*pair) for pair in zip(states.unbind(1), previous.unbind(1), strict=True)], dim=1
            )
            torch.testing.assert_close(said, torch.sigmoid(theirs.confidence_head(before)).view_as(said), atol=1e-5, rtol=0)
        memory = None
        for index, law in enumerate(laws):
            found, memory = ours.step_logits(logits[:, index], states[:, index], previous[:, index], memory)
            if theirs.use_draft_vocab:
                found = found[..., KEPT]
            torch.testing.assert_close(found, law, atol=1e-5, rtol=0)
    other, _ = ours.step_logits(logits[:, 0], states[:, 0], previous[:, 0] - 1)
    assert not torch.allclose(other[..., KEPT] if theirs.use_draft_vocab else other, laws[0])
    check_greedy(target, ours)


@torch.no_grad()
def their_laws(drafter: Any, hidden: torch.Tensor, logits: torch.Tensor, previous: torch.Tensor) -> list[torch.Tensor]:
    """Return their logits `(1, draft vocabulary)` of each slot given the tokens before, by their own heads."""
    if hasattr(drafter, "candidate_selector"):
        candidates, scores = drafter.candidate_selector.select(logits, hidden, previous)
        laws = torch.full_like(logits, -torch.inf).scatter(-1, candidates, scores)
    else:
        laws = logits + drafter.markov_head.block_bias(prev_token_ids=previous, hidden_states=hidden)
    return list(laws.unbind(dim=1))

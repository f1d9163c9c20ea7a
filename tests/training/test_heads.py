"""Heads that know the token before: taught as they are decoded, put on trunks that stay, saved and used like any drafter."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM
from transformers import LogitsProcessorList
from transformers.generation import SuppressTokensLogitsProcessor
from transformers.generation import TemperatureLogitsWarper
from transformers.generation import TopKLogitsWarper
from transformers.generation import TopPLogitsWarper

import hf_specdiff
from hf_specdiff import SpecDiffDrafter
from hf_specdiff.core.cache import RaggedCache
from hf_specdiff.core.conditioning import make_drafter as put_around
from hf_specdiff.core.features import Features
from hf_specdiff.core.speculation import SpeculationConfig
from hf_specdiff.core.text import Text
from hf_specdiff.training.data import collate
from hf_specdiff.training.heads import add_head
from hf_specdiff.training.heads import train_head_alone
from hf_specdiff.training.pipeline import fit_drafter
from hf_specdiff.training.plan import TrainingPlan
from hf_specdiff.training.windows import sample_windows
from tests.conftest import MASK_TOKEN_ID
from tests.conftest import make_drafter
from tests.conftest import make_target
from tests.core.test_draft_vocabulary import KEPT
from tests.core.test_draft_vocabulary import reduced

from .test_training import KillAfter
from .test_training import make_sequences
from .test_training import make_trainer

PLAN = TrainingPlan([0, 2], num_layers=1, block_size=4, max_length=24, num_epochs=2, batch_size=4, bf16=False, save_steps=4)
KINDS = ["markov", "gated"]


def with_head(kind: str, *, is_reduced: bool, **switches: Any) -> SpecDiffDrafter:
    """Return a drafter with a head whose weights are random."""
    fields: dict[str, Any] = {"markov_rank": 4, "markov_head_type": kind, "markov_reads_drafted": is_reduced, **switches}
    drafter = reduced(KEPT, **fields) if is_reduced else make_drafter([0, 2], **fields)
    torch.nn.init.normal_(drafter.markov_head.markov_w1.weight)
    torch.nn.init.normal_(drafter.markov_head.markov_w2.weight)
    return drafter


@pytest.mark.parametrize("is_reduced", [False, True], ids=["all tokens", "some tokens"])
@pytest.mark.parametrize(("kind", "from_anchor"), [("vanilla", False), ("gated", False), ("rnn", False), ("gated", True)])
def test_training_reads_the_laws_that_decoding_draws_from(
    kind: str, from_anchor: bool, is_reduced: bool, tmp_path: Path
) -> None:
    """Each slot's law given the text's token before it: the conditional law of a decoding round that drafted these tokens."""
    target, drafter = make_target(), with_head(kind, is_reduced=is_reduced, predicts_from_anchor=from_anchor)
    gamma = 6 if from_anchor else 5
    assert drafter.config.max_gamma == gamma
    trainer = make_trainer(tmp_path, drafter, num_anchors=3)
    batch = collate([trainer.train_dataset[i] for i in range(3)])
    with torch.no_grad():
        _, outputs = trainer.compute_loss(drafter, batch, return_outputs=True)
    seed = trainer._window_seed(batch["indices"])
    windows = sample_windows(batch, 3, 6, MASK_TOKEN_ID, torch.Generator().manual_seed(seed), gamma)
    num_compared = 0
    for row in range(3):
        for column in range(3):
            number, anchor = row * 3 + column, int(windows.anchors[row, column])
            text = batch["input_ids"][row : row + 1, : anchor + 1]
            with torch.no_grad():
                states = target(text[:, :-1], output_hidden_states=True).hidden_states
            given = Features(torch.cat([states[i + 1] for i in (0, 2)], dim=-1), [anchor])
            decoding = put_around(drafter, target, SpeculationConfig(gamma, draft_temperature=1.0), LogitsProcessorList())
            decoding.rows = RaggedCache(decoding.cache, 1)
            window = torch.tensor([[int(text[0, -1])] + [MASK_TOKEN_ID] * gamma])
            with torch.no_grad():
                logits = decoding.window_logits(window, Text.of_prompt(text), given)
                laws = decoding._conditionals(Text.of_prompt(text), logits.clone())
                previous, memory = laws.anchors, None
                for index, label in enumerate(windows.labels[number].tolist()):
                    if label == -100:
                        break
                    scores, memory = laws.step(index, [0], previous, memory)
                    law = scores[0].log_softmax(-1)
                    seen = outputs["log_probs"][number, index]
                    if is_reduced:
                        law = law[KEPT]
                    else:  # decoding never drafts the mask, and training has no label there
                        seen = seen.index_fill(0, torch.tensor(MASK_TOKEN_ID), -torch.inf).log_softmax(-1)
                    torch.testing.assert_close(seen, law, atol=1e-4, rtol=1e-4)
                    previous = torch.tensor([label])
                    num_compared += 1
    assert num_compared > 20


@pytest.mark.parametrize("kind", KINDS)
def test_a_fresh_head_changes_nothing(kind: str) -> None:
    target, drafter = make_target(), make_drafter([0, 2])
    settings = {"max_new_tokens": 16, "do_sample": False, "draft_shape": "chain", "gamma": 5, "return_dict_in_generate": True}
    ids = torch.tensor([[1, 5, 9]])
    before = hf_specdiff.generate(target, ids, assistant_model=drafter, **settings).speculation.num_accepted
    generator = torch.random.get_rng_state()
    add_head(drafter, kind, 4, 0)
    assert torch.equal(torch.random.get_rng_state(), generator)
    states, previous = torch.randn(9, 16), torch.arange(9)
    logits = torch.randn(9, 31)
    assert torch.equal(drafter.step_logits(logits, states, previous)[0], logits)
    assert hf_specdiff.generate(target, ids, assistant_model=drafter, **settings).speculation.num_accepted == before


def test_a_reduced_head_tells_drafted_tokens_apart_and_no_others() -> None:
    drafter = add_head(reduced(KEPT), "gated", 4, 0)
    assert drafter.markov_head.markov_w1.weight.shape == (len(KEPT) + 1, 4)
    expected = [KEPT.index(token) if token in KEPT else len(KEPT) for token in range(31)]
    assert drafter.rows_before(torch.arange(31)).tolist() == expected
    assert torch.equal(make_drafter([0, 2]).rows_before(torch.arange(31)), torch.arange(31))


@pytest.mark.parametrize("warpers", [[], [TemperatureLogitsWarper(0.7), TopKLogitsWarper(5), TopPLogitsWarper(0.9)]])
def test_laws_of_drafted_tokens_alone_are_columns_of_the_whole_ones(warpers: list[Any]) -> None:
    target, drafter = make_target(), with_head("gated", is_reduced=True)
    decoding = put_around(drafter, target, SpeculationConfig(5, draft_temperature=1.0), LogitsProcessorList(warpers))
    assert decoding.has_columns
    decoding.states = torch.randn(2, 5, 16)
    text = Text.of_prompt(torch.tensor([[1, 5, 9], [2, 2, 7]]))
    logits = torch.full((2, 5, 31), -torch.inf).index_copy_(-1, torch.tensor(KEPT), torch.randn(2, 5, len(KEPT)))
    laws = decoding._conditionals(text, logits)
    asked = (torch.tensor([0, 3, 4, 4]), torch.tensor([0, 1, 1, 0]), torch.tensor([9, KEPT[0], 30, KEPT[2]]))
    whole, _ = laws.step(*asked, None)
    columns, ids = laws.drafted_scores(*asked)
    assert ids.tolist() == KEPT
    torch.testing.assert_close(columns, whole[:, KEPT])
    others = [token for token in range(31) if token not in KEPT]
    assert bool((whole[:, others] == -torch.inf).all())
    forbidding = put_around(drafter, target, SpeculationConfig(5), LogitsProcessorList([SuppressTokensLogitsProcessor([3])]))
    assert not forbidding.has_columns


@pytest.mark.parametrize("fields", [{}, {"markov_rank": 4}, {"draft_vocab_size": 8}])
def test_a_head_over_drafted_tokens_needs_both(fields: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="`markov_reads_drafted` must be False without"):
        make_drafter([0, 2], markov_reads_drafted=True, **fields)


@pytest.fixture(scope="module")
def trunk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trunk")
    assert fit_drafter(make_target(), make_sequences(), folder, PLAN, mask_token_id=MASK_TOKEN_ID)
    return folder


@pytest.mark.parametrize(
    ("kind", "losses", "count"),
    [("gated", {"dpace": 1.0, "chain": 0.5}, None), ("markov", {"ce": 0.2, "tv": 0.8}, 12)],
    ids=["gated", "markov of some tokens"],
)
def test_a_head_is_trained_alone_and_the_drafter_is_like_any(
    kind: str, losses: dict[str, float], count: int | None, trunk: Path, tmp_path: Path
) -> None:
    target = make_target()
    plan = replace(PLAN, head=kind, head_rank=4, trained="head", loss_weights=losses, draft_vocab_size=count)
    assert fit_drafter(target, make_sequences(), tmp_path, plan, mask_token_id=MASK_TOKEN_ID, start_from=trunk)
    drafter, before = SpecDiffDrafter.from_pretrained(tmp_path), SpecDiffDrafter.from_pretrained(trunk).state_dict()
    own = {
        name: weight for name, weight in drafter.state_dict().items() if not name.startswith("markov_head.") and name != "d2t"
    }
    assert own.keys() == before.keys()
    for name, weight in own.items():
        assert torch.equal(weight, before[name]), name
    assert bool(drafter.markov_head.markov_w2.weight.any())
    assert len(drafter.markov_head.markov_w2.weight) == (count or 31)
    assert "for the head alone" in drafter.config.training["objective"]
    check_greedy_and_drawn(target, drafter)


def test_a_head_that_was_trained_comes_back_from_deepspecs_layout(tmp_path: Path) -> None:
    """Every slot predicts there; so they do in training."""
    target, losses = make_target(), {"dpace": 1.0, "tv": 0.5}
    plan = replace(PLAN, head="gated", head_rank=4, predicts_from_anchor=True, loss_weights=losses)
    assert fit_drafter(target, make_sequences(), tmp_path / "ours", plan, mask_token_id=MASK_TOKEN_ID)
    drafter = SpecDiffDrafter.from_pretrained(tmp_path / "ours")
    assert drafter.config.max_gamma == 4
    assert bool(drafter.markov_head.markov_w2.weight.any())
    hf_specdiff.export_drafter(drafter, tmp_path / "theirs", "deepspec", target)
    back = hf_specdiff.load_drafter(tmp_path / "theirs", target=target)
    assert (back.config.markov_head_type, back.config.markov_rank) == ("gated", 4)
    settings = {"max_new_tokens": 16, "do_sample": False, "draft_shape": "chain", "gamma": 4, "return_dict_in_generate": True}
    ids = torch.tensor([[1, 5, 9]])
    ours, theirs = (hf_specdiff.generate(target, ids, assistant_model=each, **settings) for each in (drafter, back))
    assert ours.speculation.num_accepted == theirs.speculation.num_accepted
    assert torch.equal(ours.sequences, theirs.sequences)
    later, arguments = (
        replace(plan, predicts_from_anchor=False),
        {"mask_token_id": MASK_TOKEN_ID, "start_from": tmp_path / "ours"},
    )
    with pytest.raises(ValueError, match="`start_from` must be a drafter of the shape"):
        fit_drafter(target, make_sequences(), tmp_path / "x", later, **arguments)


def check_greedy_and_drawn(target: LlamaForCausalLM, drafter: SpecDiffDrafter) -> None:
    ids = torch.tensor([[1, 5, 9, 4], [3, 8, 8, 6]])
    settings = {"max_new_tokens": 12, "do_sample": False}
    plain = target.generate(ids, **settings)
    for scheme in ({"draft_shape": "chain", "gamma": 3}, {"draft_shape": "tree", "tree_budget": 6}):
        assert torch.equal(hf_specdiff.generate(target, ids, assistant_model=drafter, **settings, **scheme), plain)
    drawn = {"max_new_tokens": 6, "do_sample": True, "top_k": 0, "acceptance": "ratio", "draft_shape": "chain", "gamma": 3}
    assert hf_specdiff.generate(target, ids[:1], assistant_model=drafter, **drawn).shape[1] > 4


def test_a_head_learns_what_a_trunk_alone_cannot(tmp_path: Path) -> None:
    """Text in which each token follows from the one before, and a trunk that sees neither: the loss falls by the head alone."""
    drafter = add_head(make_drafter([0, 2]), "gated", 16, 0)
    train_head_alone(drafter)
    trainer = make_trainer(tmp_path, drafter, max_steps=60, save_steps=1000, learning_rate=3e-2)
    sequences = trainer.train_dataset.sequences
    for start, end in zip(sequences.starts.tolist(), sequences.ends.tolist(), strict=True):
        for place in range(start + 1, end):
            sequences.tokens[place] = 3 + (3 * int(sequences.tokens[place - 1]) + 1) % 26
    batch = collate([trainer.train_dataset[i] for i in range(16)])

    def loss() -> float:
        drafter.eval()
        with torch.no_grad():
            return float(trainer.compute_loss(drafter, batch))

    first = loss()
    trainer.train()
    assert loss() < 0.6 * first


def test_an_interrupted_run_of_a_head_ends_in_the_weights_of_an_unbroken_one(trunk: Path, tmp_path: Path) -> None:
    plan = replace(PLAN, head="gated", head_rank=4, trained="head")
    arguments: dict[str, Any] = {"mask_token_id": MASK_TOKEN_ID, "start_from": trunk}
    assert fit_drafter(make_target(), make_sequences(), tmp_path / "unbroken", plan, **arguments)
    with pytest.raises(RuntimeError, match="killed"):
        fit_drafter(make_target(), make_sequences(), tmp_path / "broken", plan, **arguments, callbacks=[KillAfter(6)])
    assert fit_drafter(make_target(), make_sequences(), tmp_path / "broken", plan, **arguments)
    one, other = (SpecDiffDrafter.from_pretrained(tmp_path / name).state_dict() for name in ("unbroken", "broken"))
    for name, weight in one.items():
        assert torch.equal(weight, other[name]), name


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"head": "rnn"}, "`head` must be markov or gated, got 'rnn'"),
        ({"head": "gated", "head_rank": 0}, "`head_rank` must be from 1 to 16384, got 0"),
        ({"head": "gated", "target_layer_ids": None}, "`head` must be left out for a token-conditioned"),
        ({"trained": "trunk"}, "`trained` must be all or head, got 'trunk'"),
        ({"trained": "head", "head": "gated"}, "`trained` must be 'all' for a fresh drafter"),
    ],
)
def test_heads_that_cannot_be_are_refused(fields: dict, words: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=words):
        fit_drafter(make_target(), make_sequences(), tmp_path / "new", replace(PLAN, **fields), mask_token_id=MASK_TOKEN_ID)
    assert not (tmp_path / "new").exists()


def test_a_head_that_is_not_there_or_another_one_is_refused(trunk: Path, tmp_path: Path) -> None:
    arguments: dict[str, Any] = {"mask_token_id": MASK_TOKEN_ID}
    with pytest.raises(ValueError, match="`trained` must be 'all' for a drafter whose logits"):
        fit_drafter(make_target(), make_sequences(), tmp_path, replace(PLAN, trained="head"), start_from=trunk, **arguments)
    words = r"`head` must be the one that the drafter has, got 'gated' of rank 4 .* 'vanilla' of rank 8"
    with pytest.raises(ValueError, match=words):
        add_head(add_head(make_drafter([0, 2]), "markov", 8, 0), "gated", 4, 0)
    with pytest.raises(ValueError, match=r"`head` must be the one that the drafter has, .* a selector"):
        add_head(make_drafter([0, 2], selector_rank=4), "gated", 4, 0)
    with pytest.raises(ValueError, match="`trained` must be 'all'"):
        train_head_alone(make_drafter([0, 2]))

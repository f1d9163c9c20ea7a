"""Training with a reduced draft vocabulary: its tokens, its labels, its loss, and what is left of a run."""

import math
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

import hf_specdiff
from hf_specdiff import SpecDiffDrafter
from hf_specdiff.core.conditioning import lent_head
from hf_specdiff.training.data import Sequences
from hf_specdiff.training.data import collate
from hf_specdiff.training.data import hold_out
from hf_specdiff.training.draft_vocabulary import drafted_tokens
from hf_specdiff.training.draft_vocabulary import labels_among
from hf_specdiff.training.draft_vocabulary import restrict
from hf_specdiff.training.evaluation import HeldOut
from hf_specdiff.training.losses import LOSSES
from hf_specdiff.training.losses import combined_loss
from hf_specdiff.training.losses import forward_kl
from hf_specdiff.training.losses import total_variation
from hf_specdiff.training.pipeline import fit_drafter
from hf_specdiff.training.plan import TrainingPlan
from hf_specdiff.training.windows import sample_windows
from tests.conftest import MASK_TOKEN_ID
from tests.conftest import make_drafter
from tests.conftest import make_target
from tests.core.test_draft_vocabulary import KEPT
from tests.core.test_draft_vocabulary import reduced
from tests.core.test_draft_vocabulary import whole

from .test_training import KillAfter
from .test_training import make_sequences
from .test_training import make_trainer

PLAN = TrainingPlan(
    [0, 2], num_layers=1, block_size=4, max_length=24, num_epochs=2, batch_size=4, bf16=False, save_steps=4, draft_vocab_size=12
)


def test_the_commonest_tokens_of_the_answers_are_taken_and_those_that_end_a_text() -> None:
    sequences = Sequences.from_lists([[5, 5, 5, 8, 8, 9, 4], [6, 8, 9, 9, 8, 11, 3]], [3, 1])
    counts = Counter([8, 8, 9, 4, 8, 9, 9, 8, 11, 3])
    assert counts[8] > counts[9] > counts[4]
    assert drafted_tokens(sequences, 4, [2], [11, 1], 8).tolist() == [2, 3, 9, 11]  # 8 is the mask here; 3 before 4
    assert drafted_tokens(sequences, 3, [2], [], 30).tolist() == [2, 8, 9]
    with pytest.raises(ValueError, match="`draft_vocab_size` must be more than the 2 tokens that end"):
        drafted_tokens(sequences, 2, [2], [11], 30)


def test_fewer_tokens_than_asked_for_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    sequences = Sequences.from_lists([[5, 8, 8, 9]], [1])
    assert drafted_tokens(sequences, 20, [2], [], 30).tolist() == [2, 8, 9]
    assert (
        "Drafted are 3 tokens, fewer than the 20 asked for: no others are written; they are 100.00%" in capsys.readouterr().err
    )


def test_labels_end_at_the_first_token_that_is_not_drafted() -> None:
    labels = torch.tensor([[5, 2, 3, 5], [3, 5, 3, 2], [2, 28, -100, -100], [9, 3, -100, -100]])
    expected = [[2, 1, -1, -100], [-1, -100, -100, -100], [1, 7, -100, -100], [4, -1, -100, -100]]
    assert labels_among(labels, torch.tensor(KEPT), 31).tolist() == expected


@pytest.mark.parametrize("name", LOSSES)
def test_losses_are_those_of_the_whole_vocabulary_with_the_other_tokens_at_nothing(name: str) -> None:
    """An independent check of labels and sums: full tables in which the tokens that are not drafted have probability 0."""
    torch.manual_seed(1)
    labels = torch.randint(0, 31, (40, 5))
    labels[:20] = torch.tensor(KEPT)[torch.randint(0, len(KEPT), (20, 5))]
    labels[10:15, 3:] = -100
    logits, target = torch.randn(40, 5, len(KEPT)), torch.randn(40, 5, 31).log_softmax(-1)
    small = logits.log_softmax(-1)
    full = torch.full((40, 5, 31), -torch.inf)
    full[..., KEPT] = small
    ids = torch.tensor(KEPT)
    loss = combined_loss(small, labels_among(labels, ids, 31), {name: 1.0}, 7.0, target[..., ids])
    cut = labels.clone()
    for row in cut:
        for place, token in enumerate(row.tolist()):
            if token != -100 and token not in KEPT:
                row[place + (name in ("tv", "kl")) :] = -100
                break
    if name in ("kl", "dpace_kl"):
        others = [token for token in range(31) if token not in KEPT]
        target[..., others] = -torch.inf
    expected = combined_loss(full, cut, {name: 1.0}, 7.0, target)
    torch.testing.assert_close(loss, expected)
    if name == "tv":
        both = (full.exp() - target.exp()).abs().sum(-1) / 2
        torch.testing.assert_close(loss, both[cut != -100].mean())


def test_total_variation_counts_what_cannot_be_drafted() -> None:
    p = torch.tensor([0.5, 0.2, 0.3])
    q = torch.tensor([0.6, 0.4])
    value = total_variation(q.log()[None, None], torch.tensor([[0]]), p[:2].log()[None, None])
    assert float(value) == pytest.approx((0.1 + 0.2 + 0.3) / 2)


def test_a_step_reads_the_windows_logits_of_the_drafted_tokens(tmp_path: Path) -> None:
    """What a step sees are the whole vocabulary's logits at the drafted tokens, and the labels' tokens by way of the table."""
    drafter = reduced(KEPT)
    trainers = [make_trainer(tmp_path, each, num_anchors=3) for each in (drafter, whole(drafter))]
    batch = collate([trainers[0].train_dataset[i] for i in range(6)])
    with torch.no_grad():
        (_, small), (_, full) = (each.compute_loss(each.model.eval(), batch, return_outputs=True) for each in trainers)
    torch.testing.assert_close(small["log_probs"], full["log_probs"][..., KEPT].log_softmax(-1), atol=1e-5, rtol=1e-4)
    seed = trainers[0]._window_seed(batch["indices"])
    windows = sample_windows(batch, 3, 6, MASK_TOKEN_ID, torch.Generator().manual_seed(seed))
    assert torch.equal(full["labels"], windows.labels)
    has_place = small["labels"] >= 0
    assert torch.equal(torch.tensor(KEPT)[small["labels"][has_place]], windows.labels[has_place])
    assert bool((small["labels"] == -1).any())


def test_training_lowers_the_loss_and_changes_no_token_that_is_drafted(tmp_path: Path) -> None:
    drafter = reduced(KEPT)
    trainer = make_trainer(tmp_path, drafter, max_steps=40, save_steps=1000, loss_weights={"ce": 1.0, "tv": 0.5})
    batch = collate([trainer.train_dataset[i] for i in range(24)])

    def loss() -> float:
        drafter.eval()
        with torch.no_grad():
            return float(trainer.compute_loss(drafter, batch))

    first = loss()
    trainer.train()
    assert loss() < 0.95 * first
    assert drafter.drafted_ids is not None
    assert drafter.drafted_ids.tolist() == KEPT


def test_the_divergence_lacks_only_what_no_drafter_of_these_tokens_can_lower() -> None:
    """Its gradient is that of the divergence from the target's law among the drafted tokens, times their share."""
    torch.manual_seed(0)
    target = torch.randn(6, 3, 31).log_softmax(-1)[..., KEPT]
    share = target.exp().sum(-1)
    logits = torch.randn(6, 3, len(KEPT), requires_grad=True)
    labels = torch.zeros(6, 3, dtype=torch.long)
    (own,) = torch.autograd.grad(forward_kl(logits.log_softmax(-1), labels, target), logits)
    among = torch.nn.functional.kl_div(
        logits.log_softmax(-1), target - share.log()[..., None], reduction="none", log_target=True
    )
    (expected,) = torch.autograd.grad((share * among.sum(-1)).mean(), logits)
    torch.testing.assert_close(own, expected)


def test_sizes_that_cannot_be_are_refused_before_any_work(tmp_path: Path) -> None:
    for count in (0, 1):
        with pytest.raises(ValueError, match=f"`draft_vocab_size` must be at least 2, got {count}"):
            replace(PLAN, draft_vocab_size=count)
    plan = replace(PLAN, draft_vocab_size=32)
    with pytest.raises(ValueError, match="`draft_vocab_size` must be from 2 to the target's 31 tokens, got 32"):
        fit_drafter(make_target(), make_sequences(), tmp_path / "new", plan, mask_token_id=MASK_TOKEN_ID)
    assert not (tmp_path / "new").exists()


def test_of_a_drafter_that_reads_tokens_it_is_refused(tmp_path: Path) -> None:
    plan = replace(PLAN, target_layer_ids=None)
    with pytest.raises(ValueError, match="`draft_vocab_size` must be left out for a token-conditioned"):
        fit_drafter(make_target(), make_sequences(), tmp_path, plan, mask_token_id=MASK_TOKEN_ID)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[LlamaForCausalLM, Path]:
    """A whole run with held-out prompts and evaluation by decoding, from cached states."""
    target, folder = make_target(), tmp_path_factory.mktemp("run")
    sequences, apart = hold_out(make_sequences(40), 24, 4, 0)
    assert apart is not None
    settings: dict[str, Any] = {"held_out": HeldOut.of(apart, 24), "cache_features": folder / "states"}
    plan = replace(PLAN, eval_tokens=8)
    assert fit_drafter(target, sequences, folder / "drafter", plan, mask_token_id=MASK_TOKEN_ID, **settings)
    return target, folder / "drafter"


def test_a_run_ends_in_a_drafter_of_these_tokens(trained: tuple[LlamaForCausalLM, Path]) -> None:
    target, folder = trained
    drafter = SpecDiffDrafter.from_pretrained(folder)
    sequences, _ = hold_out(make_sequences(40), 24, 4, 0)
    counts = Counter(sequences.tokens[sequences.is_answer].tolist())
    common = sorted(counts, key=lambda token: (-counts[token], token))[:11]
    assert drafter.config.draft_vocab_size == 12
    assert drafter.drafted_ids is not None
    assert drafter.drafted_ids.tolist() == sorted([2, *common])
    ids = torch.tensor([[1, 5, 9, 4]])
    settings = {"max_new_tokens": 20, "do_sample": False}
    ours = hf_specdiff.generate(target, ids, assistant_model=drafter, **settings, draft_shape="tree", tree_budget=6)
    assert torch.equal(ours, target.generate(ids, **settings))
    drawn = hf_specdiff.generate(
        target, ids, assistant_model=drafter, max_new_tokens=8, do_sample=True, top_k=0, return_dict_in_generate=True
    )
    assert drawn.sequences.shape[1] > 4


def test_a_later_run_keeps_the_tokens_and_one_of_all_tokens_gets_some(
    trained: tuple[LlamaForCausalLM, Path], tmp_path: Path
) -> None:
    target, folder = trained
    arguments: dict[str, Any] = {"mask_token_id": MASK_TOKEN_ID}
    tokens = SpecDiffDrafter.from_pretrained(folder).drafted_ids
    for count in (None, 12):
        plan, output = replace(PLAN, draft_vocab_size=count), tmp_path / f"later-{count}"
        assert fit_drafter(target, make_sequences(seed=3), output, plan, start_from=folder, **arguments)
        assert torch.equal(SpecDiffDrafter.from_pretrained(output).drafted_ids, tokens)
    with pytest.raises(ValueError, match="`draft_vocab_size` must be the 12 of the drafter to go on from, got 9"):
        fit_drafter(target, make_sequences(), tmp_path, replace(PLAN, draft_vocab_size=9), start_from=folder, **arguments)
    plan = replace(PLAN, draft_vocab_size=None)
    assert fit_drafter(target, make_sequences(), tmp_path / "all", plan, **arguments)
    assert fit_drafter(target, make_sequences(), tmp_path / "some", PLAN, start_from=tmp_path / "all", **arguments)
    assert SpecDiffDrafter.from_pretrained(tmp_path / "some").config.draft_vocab_size == 12


def test_an_interrupted_run_ends_in_the_weights_of_an_unbroken_one(tmp_path: Path) -> None:
    arguments: dict[str, Any] = {"mask_token_id": MASK_TOKEN_ID}
    assert fit_drafter(make_target(), make_sequences(), tmp_path / "unbroken", PLAN, **arguments)
    with pytest.raises(RuntimeError, match="killed"):
        fit_drafter(make_target(), make_sequences(), tmp_path / "broken", PLAN, **arguments, callbacks=[KillAfter(6)])
    assert fit_drafter(make_target(), make_sequences(), tmp_path / "broken", PLAN, **arguments)
    one, other = (SpecDiffDrafter.from_pretrained(tmp_path / name).state_dict() for name in ("unbroken", "broken"))
    assert one.keys() == other.keys()
    for name, weight in one.items():
        assert torch.equal(weight, other[name]), name


@pytest.mark.parametrize("fields", [{}, {"has_own_head": True}, {"markov_rank": 4}], ids=["lent", "own head", "order 1"])
def test_a_drafter_of_all_tokens_says_the_same_of_those_that_are_left(fields: dict) -> None:
    target, drafter = make_target(), make_drafter([0, 2], **fields)
    states, previous = torch.randn(3, 16), torch.tensor([4, 8, 28])

    def logits(one: SpecDiffDrafter) -> torch.Tensor:
        logits = one.window_logits(states, lent_head(target, one.drafted_ids))
        return one.step_logits(logits, states, previous)[0] if fields.get("markov_rank") else logits

    with torch.no_grad():
        before = logits(drafter)
        after = logits(restrict(drafter, torch.tensor(KEPT)))
    torch.testing.assert_close(after[:, KEPT], before[:, KEPT])
    assert math.isinf(float(after[0, 1]))

"""Training objectives against slow references, and their gradients against finite differences."""

import math

import pytest
import torch

from hf_specdiff.training.losses import DISTILLATION
from hf_specdiff.training.losses import OBJECTIVES
from hf_specdiff.training.losses import combined_loss
from hf_specdiff.training.losses import dpace
from hf_specdiff.training.losses import next_token_cross_entropy

DECAY = 3.0
LABELS = torch.tensor([[1, 2, 3, 4], [5, 6, -100, -100], [0, -100, -100, -100]])


def random_logits(seed: int = 0) -> torch.Tensor:
    return 2 * torch.randn(3, 4, 7, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def probabilities(logits: torch.Tensor) -> list[list[float]]:
    """Return q of each window, as far as there are labels."""
    laws = logits.softmax(-1)
    return [
        [float(laws[n, j, label]) for j, label in enumerate(labels) if label != -100]
        for n, labels in enumerate(LABELS.tolist())
    ]


def reference(name: str, logits: torch.Tensor) -> float:
    windows = probabilities(logits)
    best = logits.argmax(-1).tolist()
    pairs: list[tuple[float, float]] = []  # weight, loss
    total = 0.0
    for n, window in enumerate(windows):
        streak = [math.prod(window[: j + 1]) for j in range(len(window))]
        if name in ("ce", "decayed_ce"):
            pairs += [(math.exp(-j / DECAY) if name == "decayed_ce" else 1.0, -math.log(q)) for j, q in enumerate(window)]
        elif name == "log_streak":
            pairs += [(math.prod(window[:j]), -math.log(q)) for j, q in enumerate(window)]
        elif name == "chain":
            pairs += [(1.0, -value) for value in streak]
        elif name == "streak":
            total -= sum(streak) / len(windows)
        elif name == "focal":
            wrong = [j for j in range(len(window)) if best[n][j] != int(LABELS[n, j])]
            total += -math.exp(-wrong[0] / DECAY) * math.log(window[wrong[0]]) / len(windows) if wrong else 0.0
        elif name == "dpace":
            smooth = [0.5 * q + 0.5 for q in window]
            weights = [sum(math.prod(smooth[: m + 1]) for m in range(j, len(window))) for j in range(len(window))]
            pairs += [(w / sum(weights), -math.log(q)) for w, q in zip(weights, window, strict=True)]
    if pairs:
        return sum(w * value for w, value in pairs) / sum(w for w, _ in pairs)
    return total


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("seed", range(3))
def test_objective_equals_its_definition(name: str, seed: int) -> None:
    logits = random_logits(seed)
    value = OBJECTIVES[name](logits.log_softmax(-1), LABELS, DECAY)
    assert float(value) == pytest.approx(reference(name, logits), rel=1e-6)


@pytest.mark.parametrize("name", ["ce", "decayed_ce", "streak", "chain", "focal"])
def test_gradients_equal_finite_differences(name: str) -> None:
    logits = random_logits().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: OBJECTIVES[name](x.log_softmax(-1), LABELS, DECAY), logits, atol=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_distances_to_the_targets_law_equal_their_definitions(seed: int) -> None:
    q, p = random_logits(seed).softmax(-1), random_logits(seed + 10).softmax(-1)
    places = [(n, j) for n, labels in enumerate(LABELS.tolist()) for j, label in enumerate(labels) if label != -100]
    overlaps = [sum(min(float(a), float(b)) for a, b in zip(p[n, j], q[n, j], strict=True)) for n, j in places]
    divergences = [
        sum(float(a) * math.log(float(a) / float(b)) for a, b in zip(p[n, j], q[n, j], strict=True)) for n, j in places
    ]
    tv, kl = (float(DISTILLATION[name](q.log(), LABELS, p.log())) for name in ("tv", "kl"))
    assert tv == pytest.approx(1 - sum(overlaps) / len(places))
    assert kl == pytest.approx(sum(divergences) / len(places))
    for name in ("tv", "kl"):
        assert float(DISTILLATION[name](p.log(), LABELS, p.log())) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("name", ["tv", "kl"])
def test_gradients_of_distances_equal_finite_differences(name: str) -> None:
    logits, law = random_logits().requires_grad_(), random_logits(5).log_softmax(-1)
    assert torch.autograd.gradcheck(lambda x: DISTILLATION[name](x.log_softmax(-1), LABELS, law), logits, atol=1e-6)


def test_the_weighted_divergence_from_a_law_of_one_token_is_dpace() -> None:
    logits = random_logits()
    one_token = torch.full_like(logits, -torch.inf).scatter(-1, LABELS.clamp(min=0)[..., None], 0.0)
    q = logits.log_softmax(-1)
    assert float(DISTILLATION["dpace_kl"](q, LABELS, one_token)) == pytest.approx(float(OBJECTIVES["dpace"](q, LABELS)))
    assert float(DISTILLATION["dpace_kl"](q, LABELS, q)) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("name", DISTILLATION)
def test_a_token_that_neither_may_write_adds_nothing(name: str) -> None:
    logits, law = random_logits(), random_logits(5)
    logits[..., 6] = law[..., 6] = -torch.inf
    free = logits.requires_grad_()
    value = DISTILLATION[name](free.log_softmax(-1), LABELS, law.log_softmax(-1))
    value.backward()
    assert math.isfinite(float(value.detach()))
    assert bool(free.grad.isfinite().all())


def test_the_targets_law_is_asked_for() -> None:
    with pytest.raises(ValueError, match="`target_log_probs` must be given for the objective 'tv'"):
        combined_loss(random_logits().log_softmax(-1), LABELS, {"ce": 1.0, "tv": 1.0})


def test_log_streak_and_unsmoothed_dpace_have_the_gradient_of_the_streak() -> None:
    """Their weights are held fixed so that what is left is the derivative of the expected accepted length, up to scale."""
    logits = random_logits()[:1].requires_grad_()
    labels = LABELS[:1]

    def gradient(objective, **kwargs: float) -> torch.Tensor:
        (slope,) = torch.autograd.grad(objective(logits.log_softmax(-1), labels, DECAY, **kwargs), logits)
        return slope / slope.norm()

    torch.testing.assert_close(gradient(dpace, smoothing=0.0), gradient(OBJECTIVES["streak"]), atol=1e-6, rtol=1e-5)
    # The surrogate counts how often a position is reached, the streak what is lost behind it too.
    assert not torch.allclose(gradient(OBJECTIVES["log_streak"]), gradient(OBJECTIVES["streak"]), atol=1e-3)


def test_positions_without_a_label_do_not_count() -> None:
    logits, changed = random_logits(), random_logits()
    changed[LABELS == -100] = 100 * random_logits(9)[LABELS == -100]
    for name, objective in OBJECTIVES.items():
        first, second = (float(objective(x.log_softmax(-1), LABELS, DECAY)) for x in (logits, changed))
        assert first == pytest.approx(second), name


def test_several_objectives_add_up() -> None:
    log_probs = random_logits().log_softmax(-1)
    both = combined_loss(log_probs, LABELS, {"ce": 2.0, "streak": 0.5}, DECAY)
    alone = 2.0 * OBJECTIVES["ce"](log_probs, LABELS, DECAY) + 0.5 * OBJECTIVES["streak"](log_probs, LABELS, DECAY)
    assert float(both) == pytest.approx(float(alone))


def test_next_token_cross_entropy_leaves_padding_out() -> None:
    logits = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(0))
    ids, lengths = torch.tensor([[1, 2, 3, 4, 5], [6, 5, 4, 0, 0]]), torch.tensor([5, 3])
    values = [-float(logits[row, i].log_softmax(-1)[ids[row, i + 1]]) for row in range(2) for i in range(int(lengths[row]) - 1)]
    assert float(next_token_cross_entropy(logits, ids, lengths)) == pytest.approx(sum(values) / len(values), rel=1e-5)

"""What measuring takes, what it finds on a clock that tests hold, and that it leaves nothing behind."""

import pytest
import torch
from transformers import GPT2Config
from transformers import GPT2LMHeadModel

from hf_specdiff.core import measuring
from hf_specdiff.core.costs import Profile
from hf_specdiff.core.measuring import ALL_DRAWN
from hf_specdiff.core.measuring import ALL_NODES
from hf_specdiff.core.measuring import COARSE_SIZES
from hf_specdiff.core.measuring import FINE_SIZES
from hf_specdiff.core.measuring import MOST_SECONDS
from hf_specdiff.core.measuring import MOST_STEPS
from hf_specdiff.core.measuring import ONE_NODE
from hf_specdiff.core.measuring import least_seconds
from hf_specdiff.core.measuring import measure_profile
from hf_specdiff.core.measuring import profile_from
from hf_specdiff.core.speculation import SpeculationConfig
from tests.conftest import SPECIAL_IDS
from tests.conftest import make_drafter

SMALL = Profile([1, 8, 16, 32, 64], [0.061, 0.084, 0.092, 0.121, 0.178], 0.010, node_seconds=0.0001, drawn_seconds=0.0002)
NUM_NODES = 64


@pytest.fixture(autouse=True)
def whole_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here measuring has the time that it has outside of tests."""
    monkeypatch.setattr(measuring, "MOST_SECONDS", MOST_SECONDS)
    monkeypatch.setattr(measuring, "MOST_STEPS", MOST_STEPS)


class Machine:
    """Passes that take what a profile says, times `slowness`, times what else runs at that moment."""

    def __init__(self, slowness: float, noise: list[float] | None = None) -> None:
        self.now = 0.0
        self.slowness = slowness
        self.noise = noise or [1.0]
        self.count = 0

    def take(self, seconds: float) -> None:
        self.now += seconds * self.slowness * self.noise[self.count % len(self.noise)]
        self.count += 1

    def measure(self, most: float = 1e9) -> dict[int, float]:
        drafts = {
            ONE_NODE: lambda: self.take(SMALL.draft_cost(0)),
            ALL_NODES: lambda: self.take(SMALL.draft_cost(NUM_NODES)),
            ALL_DRAWN: lambda: self.take(SMALL.draft_cost(NUM_NODES, is_drawn=True)),
        }
        return least_seconds(drafts, lambda n: self.take(SMALL.target_cost(n)), most, lambda: self.now, 0.0)


@pytest.mark.parametrize("slowness", [0.001, 0.1, 1.0, 10.0, 100.0])
def test_measuring_takes_two_seconds_or_twenty_plain_steps(slowness: float) -> None:
    machine = Machine(slowness)
    seconds = machine.measure()
    assert machine.now <= max(MOST_SECONDS, MOST_STEPS * slowness * SMALL.target_cost(1))
    profile = profile_from(seconds, "here", NUM_NODES)
    assert profile.drafter_seconds == pytest.approx(slowness * SMALL.drafter_seconds)
    assert profile.node_seconds == pytest.approx(slowness * SMALL.node_seconds)
    assert profile.drawn_seconds == pytest.approx(slowness * SMALL.drawn_seconds)
    sizes = [size for size in sorted(seconds) if size > 0]
    assert sizes == (FINE_SIZES if slowness <= 0.1 else COARSE_SIZES)
    assert [seconds[size] for size in sizes] == pytest.approx([slowness * SMALL.target_cost(size) for size in sizes])


def test_a_model_with_few_positions_is_measured_as_far_as_it_goes() -> None:
    assert max(Machine(0.01).measure(most=20)) == 17


def test_the_least_of_several_passes_counts() -> None:
    """Three passes of seven meet another program."""
    profile = profile_from(Machine(0.1, noise=[1.0, 3.0, 1.0, 1.0, 2.0, 1.0, 1.5]).measure(), "here", NUM_NODES)
    assert not profile.is_doubtful
    expected = [0.1 * SMALL.target_cost(size) for size in profile.sizes]
    assert profile.target_seconds == pytest.approx(expected, rel=0.02)


def test_a_pass_that_took_longer_than_a_larger_one_makes_no_flat_profile() -> None:
    """A running maximum would have made all later sizes as dear as the one that met another program."""
    seconds = {0: 0.01, 1: 0.06, 8: 0.5, 16: 0.09, 32: 0.12, 64: 0.18}
    profile = profile_from(seconds, "here", NUM_NODES)
    assert (profile.node_seconds, profile.drawn_seconds) == (0, 0)  # of a chain
    assert profile.target_seconds == [0.06, 0.09, 0.09, 0.12, 0.18]
    assert profile.is_doubtful
    assert not profile_from(seconds | {8: 0.1}, "here", NUM_NODES).is_doubtful  # as near as measuring can be


@pytest.mark.parametrize("mask_token_id", [0, 30])
def test_measuring_leaves_the_generators_alone_and_fits_short_models(mask_token_id: int) -> None:
    sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64, "vocab_size": 31}
    target = GPT2LMHeadModel(GPT2Config(**sizes, **SPECIAL_IDS)).eval()
    drafter = make_drafter(mask_token_id=mask_token_id)
    before = torch.random.get_rng_state()
    speculation = SpeculationConfig(5, draft_shape="tree", draft_temperature=1.0)
    profile = measure_profile(target, drafter, speculation, torch.device("cpu"))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert profile.sizes[0] == 1
    assert profile.sizes[-1] <= 32
    assert profile.target_seconds == sorted(profile.target_seconds)
    assert profile.drafter_seconds > 0

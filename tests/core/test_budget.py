"""Draft sizes that follow the machine: what is chosen, when drafting pauses, and that the profile is kept and checked."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import GPT2Config
from transformers import GPT2LMHeadModel
from transformers import LlamaForCausalLM
from transformers.utils import logging

import hf_specdiff
from hf_specdiff import SpecDiffDrafter
from hf_specdiff.core import profiling
from hf_specdiff.core.budget import FIRST_PAUSE
from hf_specdiff.core.budget import Budget
from hf_specdiff.core.budget import Profile
from hf_specdiff.core.calibration import LARGEST_FACTOR
from hf_specdiff.core.calibration import NUM_CLASSES
from hf_specdiff.core.calibration import Calibration
from hf_specdiff.core.draft import Draft
from hf_specdiff.core.draft import DraftTree
from hf_specdiff.core.draft import Outcome
from hf_specdiff.core.speculation import SpeculationConfig
from hf_specdiff.core.tree import TreeShape
from hf_specdiff.core.tree import last_children
from tests.conftest import SPECIAL_IDS
from tests.conftest import make_drafter
from tests.conftest import make_target

from .test_batches import batch_of

CPU = torch.device("cpu")
FREE = Profile([1, 65], [0.010, 0.0101], drafter_seconds=0.001)  # tokens of a pass cost next to nothing
STEEP = Profile([1, 65], [0.010, 0.330], drafter_seconds=0.001)  # each costs half of a whole pass
DEAR = Profile([1, 65], [0.010, 0.0101], drafter_seconds=1.0)  # the drafter costs a hundred passes
NEUTRAL = [1.0] * (2 * NUM_CLASSES)
AUTO = {"tree": {"tree_budget": "auto"}, "chain": {"draft_shape": "chain", "gamma": "auto"}}


def chain(values: list[float]) -> TreeShape:
    """Return a chain with these path probabilities."""
    size = len(values)
    return TreeShape(list(range(size)), list(range(1, size + 1)), [0] * size, values)


def written(count: int, num_rows: int = 1) -> Outcome:
    """Return a round that added `count` tokens to each row and tells nothing of its nodes."""
    draft = Draft.nothing(torch.zeros(num_rows, 1, dtype=torch.long))
    return Outcome(draft, [[5] * count] * num_rows, [list(range(count))] * num_rows, [False] * num_rows)


def test_costs_are_interpolated_and_extrapolated() -> None:
    profile = Profile([1, 3, 5], [1.0, 2.0, 6.0], 0.5)
    assert [profile.target_cost(n) for n in (1, 2, 3, 4, 5, 6)] == pytest.approx([1.0, 1.5, 2.0, 4.0, 6.0, 8.0])
    # One token that begins a new tile does not make each of a large batch's tokens so dear.
    tiles = Profile([1, 33, 64, 65], [1.0, 2.0, 3.0, 4.0], 0.5)
    assert tiles.target_cost(97) == pytest.approx(6.0)


def test_more_is_drafted_where_tokens_are_cheap_and_likely() -> None:
    likely, unlikely = [0.9**i for i in range(1, 31)], [0.3**i for i in range(1, 31)]
    counts = {
        (name, kind): Budget(profile, 1).choose([chain(values)])
        for name, profile in (("free", FREE), ("steep", STEEP))
        for kind, values in (("likely", likely), ("unlikely", unlikely))
    }
    assert counts["free", "likely"] == 30
    assert counts["free", "likely"] > counts["steep", "likely"] > counts["steep", "unlikely"]


def test_the_choice_is_the_best_of_all() -> None:
    budget = Budget(STEEP, 1)
    values = [0.95, 0.9, 0.85, 0.8, 0.75, 0.1]
    rates = [(1 + sum(values[:n])) / (STEEP.drafter_seconds + STEEP.target_cost(n + 1)) for n in range(7)]
    first = budget.choose([chain(values)])
    assert first == max(range(7), key=rates.__getitem__)
    # From then on, the most over what such a time has brought of late.
    budget.observe(written(1))
    budget.wants_draft(1)
    gains = [sum(values[:n]) - budget.rate * STEEP.target_cost(n + 1) for n in range(7)]
    assert budget.choose([chain(values)]) == max(range(7), key=gains.__getitem__)


def test_nodes_that_are_worth_more_than_they_say_are_not_left_out() -> None:
    plain = Budget(STEEP, 1).smallest_value
    assert Budget(replace(STEEP, factors=[1.0] * 15 + [4.0]), 1).smallest_value == pytest.approx(plain / 4)
    assert Budget(replace(STEEP, factors=[0.1] * 16), 1).smallest_value == pytest.approx(plain)


def test_a_pass_is_filled_to_where_the_next_tile_begins() -> None:
    tiles = Profile([1, 8, 9, 16, 17, 32], [0.010, 0.0101, 0.020, 0.0201, 0.040, 0.0401], drafter_seconds=0.001)
    values = [0.8**i for i in range(1, 31)]
    assert Budget(tiles, 1).choose([chain(values)]) == 7


def test_factors_follow_what_was_accepted_class_by_class() -> None:
    """Sure nodes that fail half of the time, and drawn children that are accepted more often than their rank says."""
    calibration = Calibration(NEUTRAL)
    generator = torch.Generator().manual_seed(0)
    for _ in range(300):
        sure, drawn = (float(x) < rate for x, rate in zip(torch.rand(2, generator=generator), (0.5, 0.16), strict=True))
        calibration.forget()
        calibration.learn([0.98, 0.02], [False, True], [sure, drawn])
    assert 0.5 < calibration.rate(0.98, is_drawn=False) < 0.6
    assert 0.08 < calibration.rate(0.02, is_drawn=True) < 0.16
    # What was never seen is read as it stands.
    assert calibration.rate(0.02, is_drawn=False) == pytest.approx(0.02)
    assert calibration.rate(0.98, is_drawn=True) == pytest.approx(0.98)


def test_a_round_is_one_observation_however_many_nodes_it_has() -> None:
    few, many = Calibration(NEUTRAL), Calibration(NEUTRAL)
    few.learn([0.9], [False], [False])
    many.learn([0.9] * 15, [False] * 15, [False] * 15)
    assert few.rate(0.9, is_drawn=False) == pytest.approx(many.rate(0.9, is_drawn=False), rel=0.02)


def test_what_was_learnt_is_forgotten_and_no_rate_exceeds_one() -> None:
    calibration = Calibration(NEUTRAL)
    for _ in range(30):
        calibration.learn([0.6, 0.001], [False, True], [True, True])
    assert calibration.rate(0.9, is_drawn=False) == 1
    assert calibration.rate(0.001, is_drawn=True) == pytest.approx(0.001 * LARGEST_FACTOR)
    assert calibration.rate(0.0, is_drawn=False) == 0
    for _ in range(2000):
        calibration.forget()
    assert calibration.factors == pytest.approx(NEUTRAL)


def test_a_drafter_that_failed_is_tried_again_and_can_recover() -> None:
    """Also where an earlier call has left so little trust that no node seems worth its cost."""
    profile = Profile([1, 65], [0.010, 0.090], 0.003, factors=[0.31] * len(NEUTRAL))
    budget, drafted = Budget(profile, 1), []
    shape = chain([0.9**i for i in range(1, 16)])
    for _ in range(1500):
        count = budget.choose([shape]) if budget.wants_draft(1) else 0
        if count:
            budget.calibration.learn(shape.values[:count], [False] * count, [True] * count)
        budget.observe(written(1 + count))
        drafted.append(count)
    assert sum(count > 0 for count in drafted[-300:]) > 200


def test_what_stands_of_unequal_rows() -> None:
    tree = DraftTree(torch.tensor([[5, 6, 7, 8], [5, 9, 0, 0]]), [[0, 0, 2, 3], [0, 1]])
    outcome = Outcome(tree, [[6, 7, 3], [4]], [[0, 2, 3], [0]], [False, False])
    assert outcome.stands() == [[False, True, True, False], [False, False]]
    chains = Draft(torch.tensor([[1, 2, 3], [4, 5, 6]]), None, has_prefix_law=True)
    outcome = Outcome(chains, [[1, 2, 9], [4, 5, 6, 7]], [[0, 1, 2], [0, 1, 2, 3]], [False, False])
    assert outcome.stands() == [[True, True, False], [True] * 3]
    assert last_children([0, 0, 2, 3]) == [False, True, True, True]
    assert last_children([0, 1]) == [True, True]


def test_a_row_that_has_ended_teaches_nothing() -> None:
    """What was cut off with its end may have been accepted."""
    budget = Budget(FREE, 2)
    chains = Draft(torch.tensor([[1, 2], [4, 5]]), None, has_prefix_law=True, values=[[0.9, 0.8], [0.9, 0.8]])
    budget.observe(Outcome(chains, [[1], [4]], [[0], [0]], [True, True]))
    assert budget.calibration.factors == NEUTRAL
    budget.observe(Outcome(chains, [[1], [4]], [[0], [0]], [True, False]))
    assert budget.calibration.factors != NEUTRAL


def test_what_a_call_learns_goes_half_way_and_no_further(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_SPECDIFF_CACHE", str(tmp_path))
    monkeypatch.setattr(profiling, "_KNOWN", {})
    monkeypatch.setattr(profiling, "_WRITTEN", {})
    monkeypatch.setattr(profiling, "measure_profile", lambda *pair: replace(FREE, factors=[4.0] * len(NEUTRAL)))
    pair = (make_target(), make_drafter(), SpeculationConfig(5, draft_shape="tree"))
    profiling.profile_of(*pair, CPU)
    path = next(tmp_path.rglob("*.json"))
    before = path.read_bytes()
    profiling.learn(*pair, [4.0] * (len(NEUTRAL) - 1) + [9.0])
    assert profiling.profile_of(*pair, CPU).factors == [4.0] * (len(NEUTRAL) - 1) + [3.0]
    assert path.read_bytes() == before  # not by enough
    profiling.learn(*pair, [0.25, *[4.0] * (len(NEUTRAL) - 2), 3.0])
    assert profiling._read(path).factors == [0.5, *[4.0] * (len(NEUTRAL) - 2), 3.0]


def test_a_drawn_child_is_worth_what_it_has_been_and_its_sibling_by_rank_again() -> None:
    factors = list(NEUTRAL)
    factors[NUM_CLASSES + 1] = 2.0  # drawn, probability between 1/4 and 1/2
    budget = Budget(replace(FREE, factors=factors), 1, draws_children=True)
    # The second node takes the drawing over from the first, which then counts by its rank.
    assert budget._gains(TreeShape([0, 0], [1, 1], [0, 1], [0.4, 0.3])) == pytest.approx([0.8, 0.6 + 0.4 - 0.8])
    assert Budget(budget.profile, 1)._gains(TreeShape([0, 0], [1, 1], [0, 1], [0.4, 0.3])) == pytest.approx([0.4, 0.3])


@pytest.mark.parametrize("shape", AUTO)
@pytest.mark.parametrize("do_sample", [False, True])
def test_the_outcome_that_is_learnt_from_is_what_was_accepted(
    shape: str, do_sample: bool, monkeypatch: pytest.MonkeyPatch, drafter: SpecDiffDrafter
) -> None:
    target, (ids, mask) = make_target(2), batch_of([6])
    learnt: list[int] = []
    learn = Calibration.learn

    def recording(self: Calibration, values: list[float], drawn: list[bool], outcome: list[bool]) -> None:
        assert len(values) == len(drawn) == len(outcome)
        assert any(drawn) == bool(do_sample and shape == "tree" and values)
        learnt.append(sum(outcome))
        learn(self, values, drawn, outcome)

    monkeypatch.setattr(Calibration, "learn", recording)
    gains, kinds = Budget._gains, set()

    def noting(self: Budget, shape: TreeShape) -> list[float]:
        kinds.add(self.draws_children)
        return gains(self, shape)

    monkeypatch.setattr(Budget, "_gains", noting)
    torch.manual_seed(0)
    settings = {"do_sample": do_sample, "max_new_tokens": 40, "attention_mask": mask, "return_dict_in_generate": True}
    rule = {"acceptance": "ratio", "draft_shape": shape} if do_sample else {"draft_shape": shape}
    output = hf_specdiff.generate(target, ids, assistant_model=drafter, **(settings | AUTO[shape] | rule), profile=FREE)
    stats = output.speculation
    accepted = [row[0] for row, size in zip(stats.num_accepted, stats.num_drafted, strict=True) if size[0] > 0]
    # The last round says nothing: what it accepted may have been cut off with the end of the text.
    assert learnt == accepted[: len(learnt)]
    assert len(learnt) >= max(len(accepted) - 1, 1)
    assert kinds == {do_sample and shape == "tree"}


def test_one_place_that_is_hard_to_foresee_is_no_reason_to_pause() -> None:
    profile = Profile([1, 65], [0.010, 0.020], drafter_seconds=0.005)
    sure, unsure = chain([0.99] * 15), chain([0.05, 0.01])
    budget = Budget(profile, 1)
    for _ in range(3):
        assert budget.wants_draft(1)
        budget.choose([sure])
        budget.observe(written(16))
    pauses = []
    for _ in range(40):
        pauses.append(not budget.wants_draft(1))
        if not pauses[-1]:
            budget.choose([unsure])
        budget.observe(written(1))
    assert not any(pauses[:4])
    assert any(pauses)  # but many of them are


def test_drafting_pauses_where_it_does_not_pay_and_tries_again() -> None:
    budget, drafted = Budget(DEAR, 1), []
    for step in range(40):
        if budget.wants_draft(1):
            drafted.append(step)
            budget.choose([chain([0.9, 0.8])])
        budget.observe(written(1))
    assert drafted == [0, FIRST_PAUSE + 1, 3 * FIRST_PAUSE + 2, 7 * FIRST_PAUSE + 3]


@pytest.mark.parametrize("profile", [FREE, STEEP, DEAR], ids=["free", "steep", "dear"])
@pytest.mark.parametrize("shape", AUTO)
@pytest.mark.parametrize("lengths", [[5], [4, 7, 2]], ids=["one", "batch"])
def test_greedy_text_stays_the_targets(shape: str, lengths: list[int], profile: Profile, drafter: SpecDiffDrafter) -> None:
    """Also after pauses, when the drafter has to read what it has missed."""
    for seed in range(2):
        target = make_target(seed)
        ids, mask = batch_of(lengths, seed)
        settings = {"do_sample": False, "max_new_tokens": 30, "attention_mask": mask}
        expected = target.generate(ids, **settings)
        results = [
            hf_specdiff.generate(
                target, ids, assistant_model=drafter, **settings, **AUTO[shape], profile=profile, return_dict_in_generate=True
            )
            for _ in range(2)
        ]
        assert torch.equal(results[0].sequences, expected)
        # With a given profile nothing depends on a clock.
        assert results[0].speculation.num_drafted == results[1].speculation.num_drafted


def test_features_of_paused_rounds_reach_the_drafter() -> None:
    """After a pause the drafter's context is what it would have been without one."""
    target, drafter = make_target(0, eos_token_id=None), make_drafter([0, 2], eos_token_id=None)
    contexts = []
    network_call = SpecDiffDrafter.forward

    def recording(self: SpecDiffDrafter, *args: object, **kwargs: object) -> object:
        output = network_call(self, *args, **kwargs)
        contexts.append(output.past_key_values.layers[0].keys[:, :, : -kwargs["noise_embeds"].shape[1]].clone())
        return output

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SpecDiffDrafter, "forward", recording)
        settings = {"do_sample": False, "max_new_tokens": 24, "draft_shape": "chain"}
        ids, _ = batch_of([6])
        hf_specdiff.generate(target, ids, assistant_model=drafter, **settings, gamma="auto", profile=DEAR)
        paused = {context.shape[2]: context for context in contexts}
        contexts.clear()
        hf_specdiff.generate(target, ids, assistant_model=drafter, **settings)
        steady = {context.shape[2]: context for context in contexts}
    common = sorted(paused.keys() & steady.keys())
    assert len(common) >= 2
    for length in common:
        torch.testing.assert_close(paused[length], steady[length], atol=1e-5, rtol=1e-4)


def test_a_measured_profile_is_kept_and_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, drafter: SpecDiffDrafter
) -> None:
    monkeypatch.setenv("HF_SPECDIFF_CACHE", str(tmp_path))
    monkeypatch.setattr(profiling, "_KNOWN", {})
    target, speculation = make_target(), SpeculationConfig(5, draft_shape="tree")
    first = profiling.profile_of(target, drafter, speculation, CPU)
    assert first.sizes[0] == 1
    assert first.target_seconds == sorted(first.target_seconds)
    monkeypatch.setattr(profiling, "measure_profile", lambda *pair: pytest.fail("measured twice"))
    assert profiling.profile_of(target, drafter, speculation, CPU) == first
    profiling._KNOWN.clear()
    assert profiling.profile_of(target, drafter, speculation, CPU) == first
    assert profiling.profile_of(target, drafter, speculation, CPU, next(tmp_path.rglob("*.json"))) == first


@pytest.mark.parametrize("damage", ["other machine", "not JSON"])
def test_a_profile_of_another_machine_is_measured_again_with_one_line(
    damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_target: LlamaForCausalLM, token_drafter: SpecDiffDrafter
) -> None:
    monkeypatch.setenv("HF_SPECDIFF_CACHE", str(tmp_path))
    monkeypatch.setattr(profiling, "_KNOWN", {})
    speculation = SpeculationConfig(5, draft_shape="tree")
    profiling.profile_of(tiny_target, token_drafter, speculation, CPU)
    path = next(tmp_path.rglob("*.json"))
    stored = json.loads(path.read_text())
    path.write_text(json.dumps({**stored, "machine": "an abacus"}) if damage == "other machine" else "{")
    profiling._KNOWN.clear()
    lines: list[str] = []
    monkeypatch.setattr(logging.get_logger("hf_specdiff.core.profiling"), "warning", lines.append)
    profile = profiling.profile_of(tiny_target, token_drafter, speculation, CPU)
    assert profile.machine == stored["machine"]
    assert len(lines) == 1
    assert ("an abacus" if damage == "other machine" else "cannot be read") in lines[0]


def test_bad_profiles_and_bad_autos_are_refused(
    tmp_path: Path, tiny_target: LlamaForCausalLM, token_drafter: SpecDiffDrafter, prompt: torch.Tensor
) -> None:
    with pytest.raises(ValueError, match="rising `sizes`"):
        Profile([1, 1], [1.0, 2.0], 1.0)
    with pytest.raises(ValueError, match="must hold numbers"):
        Profile([1, "2"], [1.0, 2.0], 1.0)
    with pytest.raises(ValueError, match="positive times and factors"):
        Profile([1, 2], [0.0, 2.0], 1.0)
    cases = [
        ({"tree_budget": "auto", "profile": tmp_path / "none.json"}, "`profile` must be a Profile or a file"),
        ({"tree_budget": "auto", "profile": {"sizes": 1}}, "`profile` must be a Profile or a file"),
        ({"profile": FREE}, "`profile` must be None unless"),
        ({"gamma": "auto", "draft_shape": "samples"}, "must be integers with"),
        ({"gamma": "auto", "draft_shape": "chain", "num_denoising_steps": 2}, "must be integers with"),
        ({"gamma": "all"}, "or 'auto', got 'all'"),
        ({"tree_budget": "most"}, "or 'auto', got 'most'"),
    ]
    for kwargs, words in cases:
        with pytest.raises(ValueError, match=words):
            hf_specdiff.generate(tiny_target, prompt, assistant_model=token_drafter, max_new_tokens=4, **kwargs)


@pytest.mark.parametrize("arguments", [{"gamma": "auto"}, {"tree_budget": "auto"}], ids=["gamma", "tree_budget"])
def test_either_auto_makes_any_shape_adaptive(
    arguments: dict, tiny_target: LlamaForCausalLM, token_drafter: SpecDiffDrafter, prompt: torch.Tensor
) -> None:
    for shape in ("auto", "tree", "chain"):
        settings = {"max_new_tokens": 20, "do_sample": False, "return_dict_in_generate": True, "draft_shape": shape}
        result = hf_specdiff.generate(tiny_target, prompt, assistant_model=token_drafter, **settings, **arguments, profile=DEAR)
        assert [0] in result.speculation.num_drafted


def test_the_rate_to_beat_is_that_of_the_rows_that_are_left() -> None:
    steep = Profile([1, 65], [0.0057, 0.0133], drafter_seconds=0.002)
    values = chain([0.8**i for i in range(1, 16)])
    shrunk = Budget(steep, 16)
    for _ in range(3):
        shrunk.wants_draft(16)
        shrunk.choose([values] * 16)
        shrunk.observe(written(5, num_rows=16))
    shrunk.wants_draft(1)
    assert shrunk.choose([values]) == Budget(steep, 1).choose([values])


@pytest.mark.parametrize("mask_token_id", [0, 30])
def test_measuring_leaves_the_generators_alone_and_fits_short_models(mask_token_id: int) -> None:
    sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64, "vocab_size": 31}
    target = GPT2LMHeadModel(GPT2Config(**sizes, **SPECIAL_IDS)).eval()
    drafter = make_drafter(mask_token_id=mask_token_id)
    before = torch.random.get_rng_state()
    profile = profiling.measure_profile(target, drafter, SpeculationConfig(5, draft_shape="tree", draft_temperature=1.0), CPU)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert profile.sizes[0] == 1


def test_a_cache_that_cannot_be_written_costs_no_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prompt: torch.Tensor
) -> None:
    monkeypatch.setenv("HF_SPECDIFF_CACHE", str(tmp_path))
    monkeypatch.setattr(profiling, "_KNOWN", {})
    monkeypatch.setattr(profiling, "measure_profile", lambda *pair: FREE)
    monkeypatch.setattr(profiling, "machine_of", lambda device: FREE.machine)
    lines: list[str] = []
    monkeypatch.setattr(logging.get_logger("hf_specdiff.core.profiling"), "warning", lines.append)
    target, drafter = make_target(), make_drafter()
    settings = {"do_sample": False, "max_new_tokens": 12}
    expected = target.generate(prompt, **settings)
    for _ in range(2):
        result = hf_specdiff.generate(target, prompt, assistant_model=drafter, tree_budget="auto", **settings)
        assert torch.equal(result, expected)
        assert next(tmp_path.rglob("*.json")).is_file()

        def full_disk(*arguments: object) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(profiling, "write_profile", full_disk)
        monkeypatch.setattr(profiling, "NOTABLE_CHANGE", 1e-9)  # anything learnt is to be written
    assert len(lines) == 1
    assert "could not be kept" in lines[0]


def test_the_next_call_goes_on_from_what_was_learnt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prompt: torch.Tensor
) -> None:
    monkeypatch.setenv("HF_SPECDIFF_CACHE", str(tmp_path))
    monkeypatch.setattr(profiling, "_KNOWN", {})
    monkeypatch.setattr(profiling, "measure_profile", lambda *pair: FREE)
    monkeypatch.setattr(profiling, "machine_of", lambda device: FREE.machine)
    target, drafter = make_target(0, eos_token_id=None), make_drafter(eos_token_id=None)  # as good as never accepted
    settings = {"do_sample": False, "max_new_tokens": 30, "tree_budget": "auto"}
    for _ in range(12):
        hf_specdiff.generate(target, prompt, assistant_model=drafter, **settings)
    (known,) = profiling._KNOWN.values()
    assert min(known.factors) < 0.9
    stored = profiling._read(next(tmp_path.rglob("*.json")))
    assert stored.factors == pytest.approx(known.factors, rel=profiling.NOTABLE_CHANGE)
    # A given profile is neither changed nor learnt from.
    hf_specdiff.generate(target, prompt, assistant_model=drafter, **settings, profile=FREE)
    assert next(iter(profiling._KNOWN.values())) == known

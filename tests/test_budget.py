"""Draft sizes that follow the machine: what is chosen, when drafting pauses, and that the profile is kept and checked."""

import json
from pathlib import Path

import pytest
import torch
from transformers import GPT2Config
from transformers import GPT2LMHeadModel
from transformers import LlamaForCausalLM
from transformers.utils import logging

import hf_specdiff
from hf_specdiff import SpecDiffDrafter
from hf_specdiff import profiling
from hf_specdiff.budget import FIRST_PAUSE
from hf_specdiff.budget import Budget
from hf_specdiff.budget import Profile
from hf_specdiff.speculation import SpeculationConfig

from .conftest import SPECIAL_IDS
from .conftest import make_drafter
from .conftest import make_target
from .test_batches import batch_of

CPU = torch.device("cpu")
FREE = Profile([1, 65], [0.010, 0.0101], drafter_seconds=0.001)  # tokens of a pass cost next to nothing
STEEP = Profile([1, 65], [0.010, 0.330], drafter_seconds=0.001)  # each costs half of a whole pass
DEAR = Profile([1, 65], [0.010, 0.0101], drafter_seconds=1.0)  # the drafter costs a hundred passes
AUTO = {"tree": {"tree_budget": "auto"}, "chain": {"draft_shape": "chain", "gamma": "auto"}}


def test_costs_are_interpolated_and_extrapolated() -> None:
    profile = Profile([1, 3, 5], [1.0, 2.0, 6.0], 0.5)
    assert [profile.target_cost(n) for n in (1, 2, 3, 4, 5, 6)] == pytest.approx([1.0, 1.5, 2.0, 4.0, 6.0, 8.0])


def test_more_is_drafted_where_tokens_are_cheap_and_likely() -> None:
    likely, unlikely = [0.9**i for i in range(1, 31)], [0.3**i for i in range(1, 31)]
    counts = {
        (name, kind): Budget(profile, 1).choose([10], [values])
        for name, profile in (("free", FREE), ("steep", STEEP))
        for kind, values in (("likely", likely), ("unlikely", unlikely))
    }
    assert counts["free", "likely"] == 30
    assert counts["free", "likely"] > counts["steep", "likely"] > counts["steep", "unlikely"]


def test_the_choice_is_the_best_of_all() -> None:
    budget = Budget(STEEP, 1)
    values = [0.95, 0.9, 0.6, 0.55, 0.2, 0.1]
    rates = [(1 + sum(values[:n])) / (STEEP.drafter_seconds + STEEP.target_cost(n + 1)) for n in range(7)]
    first = budget.choose([10], [values])
    assert first == max(range(7), key=rates.__getitem__)
    # From then on, the most over what such a time has brought of late.
    budget.wants_draft([13])
    gains = [sum(values[:n]) - budget.rate * STEEP.target_cost(n + 1) for n in range(7)]
    assert budget.choose([13], [values]) == max(range(7), key=gains.__getitem__) != first


def test_a_pass_is_filled_to_where_the_next_tile_begins() -> None:
    tiles = Profile([1, 8, 9, 16, 17, 32], [0.010, 0.0101, 0.020, 0.0201, 0.040, 0.0401], drafter_seconds=0.001)
    values = [0.8**i for i in range(1, 31)]
    assert Budget(tiles, 1).choose([10], [values]) == 7


@pytest.mark.parametrize(("num_accepted", "is_sharpened"), [(3, True), (0, False)])
def test_the_exponent_follows_what_was_accepted(num_accepted: int, is_sharpened: bool) -> None:
    budget, length = Budget(FREE, 1), 10
    exponents = [budget.exponent]
    for _ in range(20):
        if budget.wants_draft([length]):
            budget.choose([length], [[0.9, 0.7, 0.5]])
        length += num_accepted + 1
        exponents.append(budget.exponent)
    assert (exponents[-1] < 0.9) if is_sharpened else (exponents[-1] > 1.2)
    # Without news it goes back to where the profile had it.
    budget._last = None
    settled = exponents[-1]
    for _ in range(5):
        budget._last = ([length], 2.0, 0.01)
        length += 3  # just as promised
        budget.wants_draft([length])
    assert abs(budget.exponent - 1) < abs(settled - 1)


def test_drafting_pauses_where_it_does_not_pay_and_tries_again() -> None:
    budget, length, drafted = Budget(DEAR, 1), 10, []
    for step in range(40):
        if budget.wants_draft([length]):
            drafted.append(step)
            budget.choose([length], [[0.9, 0.8]])
        length += 1
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
    monkeypatch.setattr(logging.get_logger("hf_specdiff.profiling"), "warning", lines.append)
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
    with pytest.raises(ValueError, match="positive times and exponent"):
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
    values = [0.8**i for i in range(1, 16)]
    shrunk = Budget(steep, 16)
    shrunk.wants_draft([10] * 16)
    shrunk.choose([10] * 16, [values] * 16)
    shrunk.wants_draft([15])
    assert shrunk.choose([15], [values]) == Budget(steep, 1).choose([15], [values])


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
    monkeypatch.setattr(logging.get_logger("hf_specdiff.profiling"), "warning", lines.append)
    target, drafter = make_target(), make_drafter()
    settings = {"do_sample": False, "max_new_tokens": 12}
    expected = target.generate(prompt, **settings)
    for _ in range(2):
        result = hf_specdiff.generate(target, prompt, assistant_model=drafter, tree_budget="auto", **settings)
        assert torch.equal(result, expected)
        next(tmp_path.rglob("*.json")).write_text("{")
    assert len(lines) == 1


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
    assert known.exponent > 1.05
    stored = profiling._read(next(tmp_path.rglob("*.json")))
    assert stored.exponent == pytest.approx(known.exponent, rel=0.2)
    # A given profile is neither changed nor learnt from.
    hf_specdiff.generate(target, prompt, assistant_model=drafter, **settings, profile=FREE)
    assert next(iter(profiling._KNOWN.values())) == known

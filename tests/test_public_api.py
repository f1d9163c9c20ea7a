"""The names that users rely on."""

import dataclasses
import inspect

import pytest

import hf_specdiff
from hf_specdiff.core.speculation import SPECULATION_ARGUMENTS
from hf_specdiff.core.stats import SpeculationStats


def test_public_names() -> None:
    assert set(hf_specdiff.__all__) == {
        "DenoisingDrafter",
        "DiffusionDrafter",
        "Draft",
        "DraftTree",
        "Drafter",
        "Features",
        "Outcome",
        "Profile",
        "SpecDiffCandidateGenerator",
        "SpecDiffConfig",
        "SpecDiffDrafter",
        "SpeculationStats",
        "Text",
        "attach",
        "detach",
        "export_drafter",
        "generate",
        "load_demo",
        "load_drafter",
        "load_prompts",
    }
    for name in hf_specdiff.__all__:
        assert inspect.getdoc(getattr(hf_specdiff, name))


@pytest.mark.parametrize(
    ("function", "parameters"),
    [
        (hf_specdiff.generate, ["model", "inputs", "assistant_model", "kwargs"]),
        (hf_specdiff.attach, ["model"]),
        (hf_specdiff.detach, ["model"]),
        (hf_specdiff.load_demo, ["drafter"]),
        (hf_specdiff.export_drafter, ["drafter", "folder", "to", "target", "without_head"]),
        (hf_specdiff.load_drafter, ["source", "target", "ignored_fields", "arguments"]),
        (hf_specdiff.load_prompts, ["name"]),
    ],
)
def test_parameter_names(function: object, parameters: list[str]) -> None:
    assert list(inspect.signature(function).parameters) == parameters
    if "assistant_model" in parameters:
        assert inspect.signature(function).parameters["assistant_model"].kind is inspect.Parameter.KEYWORD_ONLY


def test_speculation_arguments() -> None:
    expected = {"gamma", "num_denoising_steps", "reveal_order", "draft_shape", "draft_temperature", "acceptance"}
    expected |= {"num_drafts", "tree_budget", "prompt_lookup_num_tokens", "max_matching_ngram_size"}
    assert set(SPECULATION_ARGUMENTS) == expected
    for name in expected:
        assert f"`{name}`" in str(inspect.getdoc(hf_specdiff.generate))


def test_statistics_have_their_fields() -> None:
    fields = {field.name for field in dataclasses.fields(SpeculationStats)}
    properties = {name for name, value in vars(SpeculationStats).items() if isinstance(value, property)}
    assert {"draft_shape", "acceptance", "num_drafted", "num_accepted"} <= fields
    assert {"prefill_seconds", "drafter_seconds", "target_seconds", "total_seconds"} <= fields
    assert {"num_rounds", "num_drafted_tokens", "tokens_per_round", "acceptance_per_position", "other_seconds"} <= properties
    assert "num_copied" in fields
    assert "num_copied_tokens" in properties

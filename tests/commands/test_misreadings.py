"""The bundled drafter with one field misread at a time: what it was trained with is found again."""

import math
from typing import Any

import pytest
import torch

import hf_specdiff
from hf_specdiff import SpecDiffDrafter
from hf_specdiff.benchmarks.methods import Models
from hf_specdiff.commands.misreadings import Answer
from hf_specdiff.commands.misreadings import Reading
from hf_specdiff.commands.misreadings import other_readings
from hf_specdiff.commands.misreadings import read_as
from hf_specdiff.commands.misreadings import readings_that_fit_better
from hf_specdiff.demo.bundle import PAIR
from hf_specdiff.training.first_weights import new_drafter
from hf_specdiff.training.prompts import encode
from tests.conftest import make_drafter
from tests.conftest import make_target

PROMPTS = {"math": [str(hf_specdiff.load_prompts("math")[0]["prompt"])]}
SPOILT: list[tuple[str, Any]] = [
    ("target_layer_ids", [2, 6, 10, 14]),
    ("target_layer_ids", [0, 4, 8, 12]),
    ("predicts_from_anchor", True),
    ("causal_layers", [True] * 3),
    ("input_embedding_scale", math.sqrt(128)),
    ("mask_token_id", 4),
    ("mask_token_id", 40),
]


def demo_models(kind: str = "features") -> Models:
    target, drafter, tokenizer = hf_specdiff.load_demo(kind)
    return Models(target, tokenizer, {"drafter": drafter})


def is_causal(drafter: Any) -> list[bool]:
    return [layer.self_attn.is_causal_window for layer in drafter.layers]


@pytest.mark.parametrize(("field", "value"), SPOILT)
def test_one_misread_field_is_found(field: str, value: Any) -> None:
    models = demo_models()
    drafter = models.drafters["drafter"]
    right = getattr(drafter.config, field)
    if field == "causal_layers":
        right, value = [False] * drafter.config.num_hidden_layers, [True] * drafter.config.num_hidden_layers
    with read_as(drafter, Reading(field, value, "")):
        before = drafter.config.to_dict(), is_causal(drafter)
        (warning,) = readings_that_fit_better(models, PROMPTS)
        assert (drafter.config.to_dict(), is_causal(drafter)) == before
    assert warning.startswith(f"{field}: {right} brings ")
    assert f"where {value} brings " in warning


def test_readings_draft_along_what_the_loop_would_draft() -> None:
    """Along the target's own text a round adds what a round of the real loop adds, for a drafter without a head."""
    models = demo_models()
    models.drafters["drafter"] = SpecDiffDrafter.from_pretrained(PAIR / "features", markov_rank=0).float().eval()
    ids = encode(models.tokenizer, PROMPTS["math"][0])
    answer = Answer(models, ids, 40)
    settings = {"draft_shape": "chain", "gamma": 15, "do_sample": False, "max_new_tokens": 40, "return_dict_in_generate": True}
    settings["prompt_lookup_num_tokens"] = 0
    drafter = models.drafters["drafter"]
    output = hf_specdiff.generate(models.target, torch.tensor([ids]), assistant_model=drafter, **settings)
    assert torch.equal(answer.ids, output.sequences)
    assert answer.rounds(40) == [accepted + 1 for (accepted,) in output.speculation.num_accepted]
    assert sum(answer.rounds(12)) == 11


def test_what_is_read_right_or_untrained_gets_no_warning() -> None:
    models = demo_models()
    assert readings_that_fit_better(models, PROMPTS) == []
    config = models.drafters["drafter"].config
    untrained = Models(models.target, models.tokenizer, {"drafter": new_drafter(config, seed=0).eval()})
    assert readings_that_fit_better(untrained, PROMPTS) == []
    assert readings_that_fit_better(demo_models("tokens"), PROMPTS) == []


def test_every_field_is_tried_in_both_directions() -> None:
    """A drafter that is all that the bundled one is not: causal, scaled, sliding, its anchor predicting."""
    drafter = make_drafter(
        [-1, 1],
        layer_types=["sliding_attention", "full_attention"],
        use_sliding_window=True,
        sliding_window=5,
        causal_layers=[True, True],
        predicts_from_anchor=True,
        input_embedding_scale=4.0,
    )
    models = Models(make_target(), demo_models().tokenizer, {"drafter": drafter})
    found: dict[str, list[Any]] = {}
    for reading in other_readings(models):
        found.setdefault(reading.field, []).append(reading.value)
    masks = found.pop("mask_token_id")
    assert drafter.config.mask_token_id not in masks
    assert {drafter.config.mask_token_id - 1, 0, 3} <= set(masks)
    assert found == {
        "target_layer_ids": [[0, 2]],
        "predicts_from_anchor": [False],
        "causal_layers": [[False, False], [True, False]],
        "input_embedding_scale": [1.0],
    }
    with read_as(drafter, Reading("causal_layers", [True, False], "")):
        assert is_causal(drafter) == [True, False]
    assert is_causal(drafter) == [True, True]

"""A configuration of nonsense ends in one line that names the field, before anything is built."""

import json
from pathlib import Path
from typing import Any

import pytest

from hf_specdiff import SpecDiffConfig
from hf_specdiff import SpecDiffDrafter
from tests.conftest import make_drafter

FIELDS = {
    "vocab_size": 31,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "block_size": 6,
    "mask_token_id": 30,
}
NONSENSE: list[tuple[str, Any]] = [
    *((name, value) for name in FIELDS for value in (-3, 10**12, [1], {"a": 1}, True, 1.5, float("inf"))),
    *((name, value) for name in FIELDS for value in ("16", "many")),
    *((name, None) for name in FIELDS if name not in ("mask_token_id", "num_key_value_heads")),
    *((name, 0) for name in FIELDS if name != "mask_token_id"),
    ("block_size", 1),
    ("num_hidden_layers", 10**6),
    ("num_key_value_heads", 3),
    ("head_dim", 7),
    *(
        ("target_layer_ids", value)
        for value in ([], [1, 1], ["0", "1"], "01", 3, [0.5], [True, False], [-2], [10**9], {"0": 1})
    ),
    ("target_layer_ids", list(range(100_000))),
    *(("num_target_layers", value) for value in ("9", -1, 0, 10**9)),
    *(("rms_norm_eps", value) for value in ("a", -1.0, float("nan"), None)),
    *(("initializer_range", value) for value in ("a", -1.0, float("inf"))),
    *(("attention_dropout", value) for value in ("a", -1, 2)),
    *(("format_version", value) for value in ("1", None, 0, 10**6)),
    *(("hidden_act", value) for value in ("nope", 5, None)),
    *(("rope_parameters", value) for value in ("x", [1], {"rope_type": "nope", "rope_theta": 1e4})),
    *(("rope_parameters", {"rope_type": "default", "rope_theta": value}) for value in ("x", -1, 0)),
    *(("layer_types", value) for value in ("x", ["full_attention"], ["nope", "nope"])),
    *(("dtype", value) for value in ("nope", "nn", "")),
    *(("target_model", value) for value in (5, ["a"])),
    *(("training", value) for value in ("x", [1])),
    *(("dflash_config", value) for value in ("x", [1])),
    *(("max_position_embeddings", value) for value in ("x", -1, None)),
    *(("attention_bias", value) for value in ("yes", 2, None)),
    ("eos_token_id", "x"),
    ("transformers_weights", "adapter_model.bin"),
]


@pytest.mark.parametrize(("name", "value"), NONSENSE, ids=lambda value: repr(value)[:24])
def test_nonsense_is_refused_in_one_line(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"`{name}`") as caught:
        SpecDiffConfig(**{**FIELDS, name: value})
    assert len(str(caught.value)) < 400
    assert "\n" not in str(caught.value)


def test_what_is_not_nonsense_is_taken() -> None:
    SpecDiffConfig(**FIELDS, target_layer_ids=[0, 5], num_target_layers=6, training={"steps": 1}, dtype="bfloat16")
    SpecDiffConfig(**{**FIELDS, "mask_token_id": None, "num_key_value_heads": None})
    SpecDiffConfig(**FIELDS, eos_token_id=[2, 3], rope_parameters={"rope_type": "linear", "rope_theta": 10_000, "factor": 2.0})


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"mask_token_id": 31, "vocab_size": 31, "target_layer_ids": [0]}, "row of the target's embedding"),
        ({"target_layer_ids": [4], "num_target_layers": 4}, "below `num_target_layers` = 4"),
        ({"layer_types": ["sliding_attention"] * 2, "use_sliding_window": True}, "its context is not windowed"),
        ({"layer_types": ["sliding_attention"] * 2, "target_layer_ids": [0]}, "`sliding_window` and `use_sliding_window`"),
        ({"causal_layers": [True], "target_layer_ids": [0]}, "`causal_layers` must have an entry for each of 2"),
        ({"predicts_from_anchor": True}, "`predicts_from_anchor` must be left out for a token-conditioned"),
        ({"draft_vocab_size": 32, "vocab_size": 31, "target_layer_ids": [0]}, "`draft_vocab_size` must be at most"),
        ({"target_hidden_size": 8, "target_layer_ids": [0]}, "`target_hidden_size` must be `hidden_size` 16"),
    ],
)
def test_fields_that_do_not_go_together_are_refused(fields: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        SpecDiffConfig(**{"num_hidden_layers": 2, "hidden_size": 16, **fields})


def test_rotary_parameters_that_the_host_fails_on_are_refused() -> None:
    with pytest.raises(ValueError, match="`rope_parameters` must be what their `rope_type` needs"):
        make_drafter(rope_parameters={"rope_type": "yarn", "rope_theta": 1e4, "factor": "x"})


def test_nonsense_in_a_file_is_refused_too(tmp_path: Path) -> None:
    make_drafter().save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"num_hidden_layers": 1_000_000}))
    with pytest.raises(ValueError, match="`num_hidden_layers` must be an integer from 1"):
        SpecDiffDrafter.from_pretrained(tmp_path)

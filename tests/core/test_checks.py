"""What is refused, and what is not."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import MaxLengthCriteria
from transformers import SynthIDTextWatermarkingConfig

import hf_specdiff
from hf_specdiff.core.checks import MOST_PADDING
from hf_specdiff.core.checks import check_processes
from hf_specdiff.core.checks import check_rotary
from hf_specdiff.core.checks import check_vocabulary
from tests.conftest import MASK_TOKEN_ID
from tests.conftest import VOCAB_SIZE
from tests.conftest import make_drafter
from tests.conftest import make_target

SHAPES = ("chain", "tree", "samples")


@pytest.mark.parametrize(
    ("rope", "length", "is_refused"),
    [
        ({"rope_type": "dynamic", "factor": 2.0}, 20, False),
        ({"rope_type": "dynamic", "factor": 2.0}, 70, True),
        (
            {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [2.0], "original_max_position_embeddings": 32},
            20,
            False,
        ),
        (
            {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [2.0], "original_max_position_embeddings": 32},
            40,
            True,
        ),
        ({"rope_type": "linear", "factor": 2.0}, 70, False),
    ],
)
def test_frequencies_that_follow_the_text_are_refused(rope: dict[str, Any], length: int, is_refused: bool) -> None:
    config = make_target(max_position_embeddings=64).config
    config.rope_parameters = rope
    if not is_refused:
        return check_rotary(config, 7, length)
    with pytest.raises(ValueError, match="rotary frequencies change"):
        check_rotary(config, 7, length)


@pytest.mark.parametrize("ids", [{"eos_token_id": None}, {"bos_token_id": 9, "pad_token_id": 8}, {"eos_token_id": [2, 3]}])
def test_special_ids_decide_nothing_for_feature_conditioned_drafters(ids: dict[str, Any], prompt: torch.Tensor) -> None:
    target, drafter = make_target(), make_drafter([0, 2], **ids)
    plain = target.generate(prompt, do_sample=False, max_new_tokens=20)
    assert torch.equal(hf_specdiff.generate(target, prompt, assistant_model=drafter, do_sample=False, max_new_tokens=20), plain)
    with pytest.raises(ValueError, match="must have the target's `"):
        hf_specdiff.generate(target, prompt, assistant_model=make_drafter(**ids), do_sample=False, max_new_tokens=20)


@pytest.mark.parametrize("layers", [None, [0, 2]])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    "settings", [{}, {"repetition_penalty": 1.3, "sequence_bias": [[[5], 2.0]]}], ids=["plain", "processed"]
)
def test_a_target_with_more_tokens_than_the_drafter_is_no_reason(
    settings: dict[str, Any], shape: str, layers: list[int] | None, prompt: torch.Tensor
) -> None:
    """As where an embedding is padded; here the target even writes the tokens that the drafter does not know."""
    target, drafter = make_target(vocab_size=VOCAB_SIZE + 10), make_drafter(layers)
    unknown = 0
    for ids in (prompt, torch.tensor([[1, VOCAB_SIZE + 3, 4, VOCAB_SIZE + 9]])):
        plain = target.generate(ids, do_sample=False, max_new_tokens=24, eos_token_id=None, **settings)
        unknown += int((plain >= VOCAB_SIZE).sum())
        ours = hf_specdiff.generate(
            target,
            ids,
            assistant_model=drafter,
            draft_shape=shape,
            do_sample=False,
            max_new_tokens=24,
            eos_token_id=None,
            **settings,
        )
        assert torch.equal(ours, plain)
    assert unknown > 2


def test_a_drafter_with_more_tokens_than_the_target_is_refused(prompt: torch.Tensor) -> None:
    for layers in (None, [0]):
        with pytest.raises(ValueError, match="must have the target's vocabulary of"):
            hf_specdiff.generate(make_target(), prompt, assistant_model=make_drafter(layers, vocab_size=VOCAB_SIZE + 1))


@pytest.mark.parametrize("layers", [None, [0, 2]])
@pytest.mark.parametrize("shape", [*SHAPES, None])
def test_a_mask_that_is_the_targets_own_text_is_taken(shape: str | None, layers: list[int] | None) -> None:
    """A turn after one in which the target wrote it; the last case is the host's own loop."""
    target, drafter = make_target(), make_drafter(layers)
    for ids in ([[1, MASK_TOKEN_ID, 4]], [[1, 5, MASK_TOKEN_ID]], [[MASK_TOKEN_ID, MASK_TOKEN_ID]]):
        text = torch.tensor(ids)
        plain = target.generate(text, do_sample=False, max_new_tokens=16)
        if shape is not None:
            ours = hf_specdiff.generate(
                target, text, assistant_model=drafter, draft_shape=shape, do_sample=False, max_new_tokens=16
            )
            assert torch.equal(ours, plain)
        elif layers is None:
            assert torch.equal(target.generate(text, assistant_model=drafter, do_sample=False, max_new_tokens=16), plain)


@pytest.mark.parametrize(
    ("schedule", "count"), [("constant", 40), ("heuristic", 9), ("heuristic", 3), ("heuristic_transient", 7)]
)
def test_the_hosts_schedules_are_cut_to_the_window(schedule: str, count: int) -> None:
    target, drafter = make_target(), make_drafter()
    drafter.generation_config.num_assistant_tokens = count
    drafter.generation_config.num_assistant_tokens_schedule = schedule
    for start in range(4):
        text = torch.tensor([[1, 5 + start, 9, 4]])
        plain = target.generate(text, do_sample=False, max_new_tokens=40, eos_token_id=None)
        ours = target.generate(text, assistant_model=drafter, do_sample=False, max_new_tokens=40, eos_token_id=None)
        assert torch.equal(ours, plain)


@pytest.mark.parametrize("asked", [1, 5, 6, 400])
def test_a_window_is_all_that_the_stock_loop_gets(asked: int, prompt: torch.Tensor) -> None:
    drafted = make_drafter().generate(prompt, max_new_tokens=asked)
    assert drafted.sequences.shape[1] - prompt.shape[1] == min(asked, 5)


@pytest.mark.filterwarnings("ignore:A custom stopping criteria:UserWarning")
@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"guidance_scale": 1.5}, "`logits_processor` must be functions of ids and scores, got Unbatched"),
        ({"watermarking_config": SynthIDTextWatermarkingConfig(5, keys=[1, 2, 3, 4])}, "got SynthIDText"),
        ({"inputs_embeds": torch.zeros(1, 7, 16)}, "`inputs_embeds` must be None"),
        (
            {"max_new_tokens": None, "max_length": 20, "eos_token_id": None, "stopping_criteria": [MaxLengthCriteria(42)]},
            "`max_new_tokens` must leave",
        ),
    ],
    ids=["guidance", "synth-id", "embeddings", "no-length"],
)
def test_the_stock_loop_refuses_what_would_change_the_text(settings: dict[str, Any], words: str) -> None:
    arguments = {"do_sample": False, "max_new_tokens": 8, **settings}
    with pytest.raises(ValueError, match=words):
        make_target().generate(torch.tensor([[1, 5, 9, 4, 7, 7, 3]]), assistant_model=make_drafter(), **arguments)


def test_padding_of_a_targets_embedding_is_no_other_vocabulary() -> None:
    drafter = make_drafter([0, 2])
    check_vocabulary(make_target(vocab_size=VOCAB_SIZE + MOST_PADDING).config, drafter.config)
    with pytest.raises(ValueError, match=f"at most {MOST_PADDING} rows of padding, got {VOCAB_SIZE}"):
        check_vocabulary(make_target(vocab_size=VOCAB_SIZE + MOST_PADDING + 1).config, drafter.config)


def test_processes_that_share_a_target_go_by_no_clock() -> None:
    split = SimpleNamespace(tp_size=2)
    with pytest.raises(ValueError, match=r"must be numbers for a target that is split over 2 processes.*Pass gamma="):
        check_processes(split, None, is_adaptive=True)
    check_processes(split, None, is_adaptive=False)
    check_processes(split, "profile.json", is_adaptive=True)
    check_processes(make_target(), None, is_adaptive=True)

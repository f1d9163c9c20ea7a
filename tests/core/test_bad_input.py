"""Bad input gets one line before any work: which argument, what it must be, what came, what to do."""

from pathlib import Path

import pytest
import torch
from transformers import GenerationConfig
from transformers import LlamaForCausalLM
from transformers import StaticCache
from transformers import T5Config
from transformers import T5ForConditionalGeneration

import hf_specdiff
from hf_specdiff import SpecDiffCandidateGenerator
from hf_specdiff import SpecDiffConfig
from hf_specdiff import SpecDiffDrafter
from tests.conftest import VOCAB_SIZE
from tests.conftest import make_drafter
from tests.conftest import make_target
from tests.conftest import shared_target


def call(target: torch.nn.Module, prompt: torch.Tensor, drafter: object, **kwargs: object) -> torch.Tensor:
    return hf_specdiff.generate(target, prompt, assistant_model=drafter, max_new_tokens=8, **{"do_sample": False, **kwargs})


@pytest.fixture
def silent_target(monkeypatch: pytest.MonkeyPatch) -> LlamaForCausalLM:
    """A target that must not run: errors come before any work."""
    target = make_target()

    def forward(*args: object, **kwargs: object) -> None:
        pytest.fail("the target ran before the error was found")

    monkeypatch.setattr(target.model, "forward", forward)
    return target


@pytest.mark.parametrize(
    ("kwargs", "error", "words"),
    [
        ({"gamma": 0}, ValueError, ["`gamma`", "1 to 5", "0"]),
        ({"gamma": 6}, ValueError, ["`gamma`", "`block_size` - 1", "6"]),
        ({"gamma": 2.5}, ValueError, ["`gamma`", "integer", "2.5"]),
        ({"num_denoising_steps": 6}, ValueError, ["`num_denoising_steps`", "`gamma`", "6"]),
        ({"num_denoising_steps": 0}, ValueError, ["`num_denoising_steps`", "0"]),
        ({"reveal_order": "random"}, ValueError, ["`reveal_order`", "left_to_right", "random"]),
        ({"acceptance": "typical"}, ValueError, ["`acceptance`", "block", "typical"]),
        ({"acceptance": "self_selection", "draft_shape": "chain"}, ValueError, ["`acceptance`", "nothing to select"]),
        ({"draft_shape": "tree", "num_denoising_steps": 2}, ValueError, ["`draft_shape`", "'tree'", "`num_denoising_steps` 2"]),
        ({"draft_shape": "samples", "draft_temperature": 0}, ValueError, ["`draft_shape`", "drafts are the same"]),
        ({"tree_budget": 0}, ValueError, ["`tree_budget`", "1 to 1024", "0"]),
        ({"num_drafts": 1000}, ValueError, ["`num_drafts`", "1 to 256", "1000"]),
        ({"draft_shape": "star"}, ValueError, ["`draft_shape`", "star"]),
        ({"draft_temperature": -1.0}, ValueError, ["`draft_temperature`", "-1.0"]),
        ({"draft_temperature": float("nan")}, ValueError, ["`draft_temperature`", "nan"]),
        ({"num_beams": 2}, ValueError, ["`num_beams`", "2", "beam search"]),
        ({"cache_implementation": "paged"}, ValueError, ["`cache_implementation`", "paged", "host"]),
        ({"assistant_ensemble_weight": 0.3}, ValueError, ["`assistant_ensemble_weight`", "law"]),
        ({"use_cache": False}, ValueError, ["`use_cache`", "False"]),
        ({"output_attentions": True, "return_dict_in_generate": True}, ValueError, ["`output_attentions`"]),
        ({"penalty_alpha": 0.6, "top_k": 4}, ValueError, ["`generation_config`", "contrastive"]),
        ({"prompt_lookup_num_tokens": -1}, ValueError, ["`prompt_lookup_num_tokens`", "0 to 1024", "-1"]),
        ({"prompt_lookup_num_tokens": 2.0}, ValueError, ["`prompt_lookup_num_tokens`", "integer", "2.0"]),
        (
            {"prompt_lookup_num_tokens": 3, "max_matching_ngram_size": 0},
            ValueError,
            ["`max_matching_ngram_size`", "1 to 64", "0"],
        ),
        (
            {"prompt_lookup_num_tokens": 3, "num_denoising_steps": 2},
            ValueError,
            ["`prompt_lookup_num_tokens`", "left out", "2"],
        ),
        ({"guidance_scale": 2.0}, ValueError, ["`logits_processor`", "Guidance"]),
        ({"num_asistant_tokens": 3}, ValueError, ["num_asistant_tokens"]),
    ],
    ids=lambda value: next(iter(value.items())).__repr__() if isinstance(value, dict) else None,
)
def test_argument_is_refused(
    kwargs: dict, error: type[Exception], words: list[str], silent_target: LlamaForCausalLM, prompt: torch.Tensor
) -> None:
    with pytest.raises(error) as caught:
        call(silent_target, prompt, make_drafter(), **kwargs)
    message = str(caught.value)
    assert all(word in message for word in words), message
    assert "\n" not in message.strip()


def test_static_cache_objects_are_refused(silent_target: LlamaForCausalLM, prompt: torch.Tensor) -> None:
    cache = StaticCache(config=silent_target.config, max_cache_len=32)
    with pytest.raises(ValueError, match="dynamic cache"):
        call(silent_target, prompt, make_drafter(), past_key_values=cache)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"vocab_size": 40}, "vocabulary of 31 tokens.* got 40"),
        ({"eos_token_id": 5}, "`eos_token_id` 2, got 5"),
        ({"bos_token_id": 4}, "`bos_token_id` 1, got 4"),
        ({"pad_token_id": 6}, "`pad_token_id` 0, got 6"),
        ({"target_layer_ids": [0, 3]}, r"layers that the target has \(0 to 2\)"),
        ({"target_layer_ids": [0], "hidden_size": 24}, "`hidden_size` 16"),
        ({"mask_token_id": None}, "`mask_token_id`"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else None,
)
def test_a_drafter_of_another_target_is_refused(
    overrides: dict, words: str, silent_target: LlamaForCausalLM, prompt: torch.Tensor
) -> None:
    with pytest.raises(ValueError, match=words):
        call(silent_target, prompt, make_drafter(**overrides))


def test_an_assistant_that_is_no_drafter_is_refused(silent_target: LlamaForCausalLM, prompt: torch.Tensor) -> None:
    for assistant in (shared_target(), None, "org/drafter"):
        with pytest.raises(TypeError, match="SpecDiffDrafter"):
            call(silent_target, prompt, assistant)


def test_encoder_decoder_targets_are_refused(prompt: torch.Tensor) -> None:
    config = T5Config(vocab_size=VOCAB_SIZE, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    with pytest.raises(ValueError, match="decoder-only"):
        call(T5ForConditionalGeneration(config), prompt, make_drafter())


@pytest.mark.parametrize("name", ["inputs", "input_ids"])
def test_empty_prompts_and_masks_in_the_prompt_are_refused(silent_target: LlamaForCausalLM, name: str) -> None:
    empty = torch.zeros(1, 0, dtype=torch.long)
    masked = torch.tensor([[1, VOCAB_SIZE, 4]])
    drafter = make_drafter(mask_token_id=VOCAB_SIZE)
    for prompt, words in ((empty, "empty prompt"), (masked, f"mask id {VOCAB_SIZE}")):
        with pytest.raises(ValueError, match=words):
            hf_specdiff.generate(silent_target, assistant_model=drafter, max_new_tokens=4, **{name: prompt})


@pytest.mark.skipif(torch.accelerator.is_available(), reason="there is an accelerator to offload from")
@pytest.mark.parametrize("name", ["offloaded", "offloaded_static"])
def test_offloaded_caches_are_refused_where_there_is_nothing_to_offload_from(
    name: str, silent_target: LlamaForCausalLM, prompt: torch.Tensor
) -> None:
    with pytest.raises(ValueError, match="`cache_implementation` must keep the cache"):
        call(silent_target, prompt, make_drafter(), cache_implementation=name)
    with pytest.raises(ValueError, match="`cache_implementation` must keep the cache"):
        call(silent_target, prompt, make_drafter(), generation_config=GenerationConfig(cache_implementation=name))


def test_an_offloaded_static_cache_is_refused_on_every_machine(
    silent_target: LlamaForCausalLM, prompt: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    with pytest.raises(ValueError, match=r"must not be 'offloaded_static'.*Pass 'offloaded' or 'static'"):
        call(silent_target, prompt, make_drafter(), cache_implementation="offloaded_static")


def test_way_one_refuses_settings_that_would_not_be_lossless(prompt: torch.Tensor) -> None:
    drafter = make_drafter()
    drafter.generation_config.num_denoising_steps = 2
    with pytest.raises(ValueError, match="would not have the target's law"):
        shared_target().generate(prompt, assistant_model=drafter, do_sample=True, max_new_tokens=8)


def test_way_one_refuses_a_mask_in_the_prompt_and_a_drafter_without_one() -> None:
    drafter = make_drafter(mask_token_id=VOCAB_SIZE)
    with pytest.raises(ValueError, match="mask id"):
        shared_target().generate(torch.tensor([[1, VOCAB_SIZE]]), assistant_model=drafter, max_new_tokens=4)
    with pytest.raises(ValueError, match="`mask_token_id`"):
        shared_target().generate(torch.tensor([[1, 4]]), assistant_model=make_drafter(mask_token_id=None), max_new_tokens=4)


def test_settings_on_a_passed_generation_config_count(silent_target: LlamaForCausalLM, prompt: torch.Tensor) -> None:
    config = GenerationConfig(max_new_tokens=4, do_sample=False, gamma=99)
    with pytest.raises(ValueError, match="`gamma`"):
        hf_specdiff.generate(silent_target, prompt, generation_config=config, assistant_model=make_drafter())


def test_stop_strings_of_the_models_own_config_are_refused(silent_target: LlamaForCausalLM, prompt: torch.Tensor) -> None:
    silent_target.generation_config.stop_strings = ["a"]
    with pytest.raises(ValueError, match="must be passed to this call"):
        call(silent_target, prompt, make_drafter())


def test_a_candidate_generator_needs_the_target_for_features() -> None:
    with pytest.raises(ValueError, match="`target` must be given"):
        SpecDiffCandidateGenerator(make_drafter([0]), GenerationConfig())
    with pytest.raises(ValueError, match="`gamma` must be"):
        SpecDiffCandidateGenerator(make_drafter(), GenerationConfig(), speculation={"gamma": 6})


def test_missing_and_broken_checkpoints_are_refused(tmp_path: Path) -> None:
    drafter = make_drafter()
    drafter.save_pretrained(tmp_path / "whole")
    weights = tmp_path / "whole" / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="must hold a whole drafter"):
        SpecDiffDrafter.from_pretrained(tmp_path / "whole")
    weights.unlink()
    with pytest.raises(ValueError, match="must hold a whole drafter"):
        SpecDiffDrafter.from_pretrained(tmp_path / "whole")
    with pytest.raises(ValueError, match="must hold a whole drafter"):
        SpecDiffDrafter.from_pretrained(tmp_path / "nowhere")


def test_checkpoints_of_another_shape_are_refused(tmp_path: Path) -> None:
    make_drafter().save_pretrained(tmp_path)
    config = SpecDiffConfig.from_pretrained(tmp_path)
    config.num_hidden_layers = 3
    config.layer_types = None
    with pytest.raises(ValueError, match="all of the drafter's weights"):
        SpecDiffDrafter.from_pretrained(tmp_path, config=config)
    config = SpecDiffConfig.from_pretrained(tmp_path)
    config.intermediate_size = 48
    with pytest.raises(ValueError, match="must hold a whole drafter"):
        SpecDiffDrafter.from_pretrained(tmp_path, config=config)


def test_forward_refuses_the_other_conditionings_arguments() -> None:
    with pytest.raises(ValueError, match="`noise_embeds` must be given"):
        make_drafter([0])(input_ids=torch.tensor([[1, 2]]))
    with pytest.raises(ValueError, match="`input_ids` must be given"):
        make_drafter()(noise_embeds=torch.zeros(1, 2, 16))

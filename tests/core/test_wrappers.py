"""Targets inside something: multimodal models, LoRA, compiled forwards, low precision, int8 weights.

What is written is what plain writes.
"""

from typing import Any

import pytest
import torch
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

import hf_specdiff
from tests.conftest import make_target
from tests.core.oracle import drafter_for
from tests.core.oracle import oracle
from tests.core.tiny_models import make_model

GREEDY = {"do_sample": False, "max_new_tokens": 16, "pad_token_id": 0}
# Windows, plain positions, positions in three planes, states added inside the layers, and a running state.
WRAPPERS = ["gemma3", "llava", "qwen2_5_vl", "qwen3_vl", "qwen3_5"]
SHORT_LIST = ["gemma3", "qwen3_vl", "qwen3_5"]


def text_inputs() -> dict[str, torch.Tensor]:
    return {"input_ids": torch.randint(3, 99, (1, 20), generator=torch.Generator().manual_seed(0))}


def image_inputs(model: Any) -> dict[str, torch.Tensor]:
    """Return a prompt with an image of 16 x 16 pixels, as the model's processor would make it."""
    config, generator = model.config, torch.Generator().manual_seed(0)
    if config.model_type.startswith("qwen"):
        vision = config.vision_config
        size = 3 * vision.temporal_patch_size * vision.patch_size**2
        image = {"pixel_values": torch.randn(16, size, generator=generator), "image_grid_thw": torch.tensor([[1, 4, 4]])}
    else:
        image = {"pixel_values": torch.randn(1, 3, 16, 16, generator=generator)}
    num_tokens = 16 if config.model_type == "llava" else 4
    ids = torch.tensor([[5, 9, 31, *[config.image_token_id] * num_tokens, 12, 44, 7, 60]])
    types = {"gemma3": "token_type_ids", "llava": None}.get(config.model_type, "mm_token_type_ids")
    more = {} if types is None else {types: (ids == config.image_token_id).long()}
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **image, **more}


def ours(model: Any, inputs: dict[str, torch.Tensor], layer_ids: list[int] | None = None, **settings: Any) -> Any:
    drafter = drafter_for(model, layer_ids)
    settings = {**GREEDY, "tree_budget": 8, "return_dict_in_generate": True, **settings}
    return hf_specdiff.generate(model, **inputs, assistant_model=drafter, **settings)


@pytest.mark.parametrize(
    "model_type", [kind if kind in SHORT_LIST else pytest.param(kind, marks=pytest.mark.slow) for kind in WRAPPERS]
)
@pytest.mark.filterwarnings("ignore")
def test_multimodal_models_write_what_plain_writes(model_type: str) -> None:
    model = make_model(model_type, mapping=MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING)
    written = []
    for inputs in (text_inputs(), image_inputs(model)):
        plain = model.generate(**inputs, **GREEDY)
        with oracle(plain):
            for layer_ids, shape in ((None, "auto"), ([0, 2], "chain")):
                output = ours(model, inputs, layer_ids, draft_shape=shape)
                assert output.sequences.tolist() == plain.tolist()
                assert output.speculation.tokens_per_round > 1.5
        written.append(plain[0, -16:].tolist())
    # The image was read: another one makes another text.
    inputs["pixel_values"] = -inputs["pixel_values"]
    other = model.generate(**inputs, **GREEDY)
    assert other[0, -16:].tolist() != written[1]
    with oracle(other):
        assert ours(model, inputs).sequences.tolist() == other.tolist()


def test_rows_with_images_are_decoded_together_and_a_running_states_refused() -> None:
    for model_type, is_refused in (("llava", False), ("qwen3_5", True)):
        model = make_model(model_type, mapping=MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING)
        inputs = {name: torch.cat([value, value]) for name, value in image_inputs(model).items()}
        if is_refused:
            with pytest.raises(ValueError, match=r"running state.*, and `[a-z_]+` cannot be divided among its rows"):
                ours(model, inputs)
            continue
        plain = model.generate(**inputs, **GREEDY)
        with oracle(plain):
            assert ours(model, inputs).sequences.tolist() == plain.tolist()


@pytest.mark.filterwarnings("ignore")
def test_a_lora_on_the_target_is_part_of_it() -> None:
    peft = pytest.importorskip("peft")
    base = make_target(vocab_size=128)
    inputs = text_inputs()
    without = base.generate(**inputs, **GREEDY)
    torch.manual_seed(0)
    lora = {"r": 4, "target_modules": ["q_proj", "v_proj", "down_proj"], "init_lora_weights": False}
    wrapped = peft.get_peft_model(base, peft.LoraConfig(task_type="CAUSAL_LM", **lora)).eval()
    plain = wrapped.generate(**inputs, **GREEDY)
    assert plain.tolist() != without.tolist()
    with oracle(plain):
        for layer_ids in (None, [0, 2]):
            for model in (wrapped, wrapped.get_base_model()):
                output = ours(model, inputs, layer_ids)
                assert output.sequences.tolist() == plain.tolist()
                assert output.speculation.tokens_per_round > 1.5
    with wrapped.disable_adapter(), oracle(without):
        assert ours(wrapped, inputs).sequences.tolist() == without.tolist()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", ["chain", "tree"])
def test_low_precision_runs_and_its_scores_are_plains_to_its_own_precision(dtype: torch.dtype, shape: str) -> None:
    """Texts may part at near ties; up to there all scores are the same but for rounding."""
    model, inputs = make_target(vocab_size=128).to(dtype), text_inputs()
    settings = {"output_scores": True, "return_dict_in_generate": True}
    plain = model.generate(**inputs, **GREEDY, **settings)
    with oracle(plain.sequences):
        output = ours(model, inputs, [0, 2], draft_shape=shape, **settings)
    num_same = sum(torch.equal(output.sequences[:, : 20 + end], plain.sequences[:, : 20 + end]) for end in range(1, 17))
    assert num_same >= 1
    for own, other in zip(output.scores[:num_same], plain.scores[:num_same], strict=True):
        assert torch.allclose(own.float(), other.float(), atol=32 * torch.finfo(dtype).eps * float(other.abs().max()))


class Int8Linear(torch.nn.Module):
    """A linear layer whose weight is kept in int8 with a scale for each row, as libraries for quantized weights do."""

    def __init__(self, linear: torch.nn.Linear) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(linear.weight.detach().abs().amax(dim=1, keepdim=True) / 127, requires_grad=False)
        rounded = (linear.weight.detach() / self.scale).round().to(torch.int8)
        self.weight = torch.nn.Parameter(rounded, requires_grad=False)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(states, self.weight.to(self.scale.dtype) * self.scale)


@pytest.mark.parametrize("layer_ids", [None, [0, 2]])
@pytest.mark.parametrize("shape", ["chain", "tree"])
def test_int8_weights_are_a_target_like_any(shape: str, layer_ids: list[int] | None) -> None:
    model, inputs = make_target(vocab_size=128), text_inputs()
    without = model.generate(**inputs, **GREEDY)
    for name, module in list(model.model.named_modules()):
        if isinstance(module, torch.nn.Linear):
            model.model.set_submodule(name, Int8Linear(module))
    plain = model.generate(**inputs, **GREEDY)
    assert plain.tolist() != without.tolist()
    with oracle(plain):
        output = ours(model, inputs, layer_ids, draft_shape=shape)
    assert output.sequences.tolist() == plain.tolist()
    assert output.speculation.tokens_per_round > 1.5


@pytest.mark.parametrize("compiled", ["forward", "in place"])
def test_a_compiled_target_is_run_compiled(compiled: str) -> None:
    """The backend only hands the graph back: no compiler is needed, and every pass goes through the compiled call."""
    graphs: list[int] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        graphs.append(len(inputs))
        return graph.forward

    model, inputs = make_target(vocab_size=128, num_hidden_layers=1), text_inputs()  # each layer is traced
    plain = model.generate(**inputs, **GREEDY)
    torch.compiler.reset()
    if compiled == "forward":
        model.forward = torch.compile(model.forward, backend=backend, dynamic=True)
    else:
        model.compile(backend=backend, dynamic=True)
    with oracle(plain):
        assert ours(model, inputs, draft_shape="chain").sequences.tolist() == plain.tolist()
    assert graphs
    torch.compiler.reset()

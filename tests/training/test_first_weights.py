"""What a fresh drafter begins with."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers import Gemma2Config
from transformers import GemmaConfig
from transformers import LlamaConfig
from transformers import PretrainedConfig

from hf_specdiff.core.modeling_specdiff import SpecDiffDrafter
from hf_specdiff.training.data import Sequences
from hf_specdiff.training.drafter_config import make_drafter_config
from hf_specdiff.training.first_weights import new_drafter
from hf_specdiff.training.pipeline import fit_drafter
from hf_specdiff.training.plan import TrainingPlan

SHAPE = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2}
SHAPE |= {"num_key_value_heads": 1, "head_dim": 8}
TEXT = torch.randint(0, 31, (50,), generator=torch.Generator().manual_seed(0))


def made(config: PretrainedConfig, seed: int = 0) -> tuple[AutoModelForCausalLM, SpecDiffDrafter]:
    torch.manual_seed(seed)
    target = AutoModelForCausalLM.from_config(config)
    for name, weight in target.named_parameters():
        if name.endswith("norm.weight"):
            torch.nn.init.uniform_(weight, 0.5, 1.5)
    fitting = make_drafter_config(target, TrainingPlan([0, 1], num_layers=2, block_size=4), 31)
    return target, new_drafter(fitting, 0, target, text=TEXT)


def test_the_layers_are_the_targets_last_ones() -> None:
    target, drafter = made(LlamaConfig(**SHAPE))
    for own, lent in zip(drafter.layers, target.model.layers[1:], strict=True):
        for name, weight in lent.state_dict().items():
            assert torch.equal(own.state_dict()[name], weight), name
    assert torch.equal(drafter.norm.weight, target.model.norm.weight)
    states = torch.randn(1, 3, 32)
    assert torch.equal(drafter.fc(states), states[..., 16:])


def test_attention_begins_as_steep_as_the_targets() -> None:
    """Queries and keys are as large as the target's on its text, the angles and the norms' epsilon the target's own."""
    rope = {"rope_type": "default", "rope_theta": 500.0}
    target, drafter = made(LlamaConfig(**SHAPE, rope_parameters=rope, rms_norm_eps=1e-5))
    assert drafter.config.rope_parameters == rope
    assert drafter.config.rms_norm_eps == 1e-5
    states = target.model(TEXT[None], output_hidden_states=True).hidden_states[1]
    layer, own = target.model.layers[1], drafter.layers[0]
    read = layer.input_layernorm(states)
    for name in ("q", "k"):
        made_by_target = getattr(layer.self_attn, f"{name}_proj")(read).unflatten(-1, (-1, 8))
        normed = getattr(own.self_attn, f"{name}_norm")(made_by_target)
        sizes = [part.square().mean(-1).sqrt().mean() for part in (normed, made_by_target)]
        torch.testing.assert_close(sizes[0], sizes[1], rtol=0.02, atol=0)
    norms = [layer.input_layernorm.weight for layer in target.model.layers[1:]]
    torch.testing.assert_close(drafter.hidden_norm.weight, torch.stack(norms).mean(0))


@pytest.mark.parametrize(
    ("config", "what"),
    [
        (GemmaConfig(**SHAPE), "norms of another kind"),
        (Gemma2Config(**SHAPE), "other weights"),
        (LlamaConfig(**{**SHAPE, "num_hidden_layers": 1}), "1 layers"),
    ],
)
def test_layers_of_another_kind_are_refused(config: PretrainedConfig, what: str) -> None:
    target = AutoModelForCausalLM.from_config(config)
    fitting = make_drafter_config(target, TrainingPlan([0], num_layers=2, block_size=4), 31)
    with pytest.raises(ValueError, match=rf"`from_target` must be false .*{what}"):
        new_drafter(fitting, 0, target, text=TEXT)


def test_a_run_that_goes_on_borrows_nothing(tmp_path: Path) -> None:
    target, _ = made(LlamaConfig(**SHAPE))
    plan = TrainingPlan([0], num_layers=2, block_size=4, from_target=True)
    text = Sequences.from_lists([[1, 2, 3, 4, 5]], [1])
    with pytest.raises(ValueError, match="`from_target` must be false where a run goes on"):
        fit_drafter(target, text, tmp_path / "out", plan, mask_token_id=31, start_from=tmp_path)

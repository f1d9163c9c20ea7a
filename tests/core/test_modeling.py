"""The network: its files, its names, its masks, its attention implementations and dtypes."""

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import dispatch_model
from safetensors.torch import load_file
from transformers import AutoConfig
from transformers import AutoModel
from transformers import AutoModelForCausalLM
from transformers import DynamicCache
from transformers import LlamaForCausalLM

import hf_specdiff
from hf_specdiff import SpecDiffConfig
from hf_specdiff import SpecDiffDrafter
from tests.conftest import MASK_TOKEN_ID
from tests.conftest import VOCAB_SIZE
from tests.conftest import make_drafter
from tests.conftest import make_target
from tests.conftest import shared_target

WINDOW = torch.tensor([[5] + [MASK_TOKEN_ID] * 5])


@pytest.mark.parametrize("layers", [None, [0, 2]])
def test_save_and_load_give_the_same_drafter(layers: list[int] | None, tmp_path: Path, prompt: torch.Tensor) -> None:
    drafter = make_drafter(layers)
    drafter.save_pretrained(tmp_path)
    assert isinstance(AutoConfig.from_pretrained(tmp_path), SpecDiffConfig)
    for auto in (AutoModel, AutoModelForCausalLM):
        loaded = auto.from_pretrained(tmp_path)
        assert isinstance(loaded, SpecDiffDrafter)
        for name in ("hidden_size", "block_size", "mask_token_id", "target_layer_ids", "vocab_size", "eos_token_id"):
            assert getattr(loaded.config, name) == getattr(drafter.config, name)
        for name, weight in drafter.state_dict().items():
            assert torch.equal(loaded.state_dict()[name], weight)
        settings = {"do_sample": False, "max_new_tokens": 10, "return_dict_in_generate": True}
        runs = [hf_specdiff.generate(shared_target(), prompt, assistant_model=each, **settings) for each in (drafter, loaded)]
        assert runs[0].speculation.num_accepted == runs[1].speculation.num_accepted
    assert [path.name for path in tmp_path.iterdir() if "model." in path.name] == ["model.safetensors"]


def test_generation_config_asks_the_hosts_loop_for_whole_windows(tmp_path: Path) -> None:
    make_drafter().save_pretrained(tmp_path)
    config = SpecDiffDrafter.from_pretrained(tmp_path).generation_config
    assert config.num_assistant_tokens == 5
    assert config.num_assistant_tokens_schedule == "constant"
    assert config.assistant_confidence_threshold == 0


def test_feature_drafters_carry_the_published_names(tmp_path: Path) -> None:
    make_drafter([0, 2]).save_pretrained(tmp_path)
    names = set(load_file(tmp_path / "model.safetensors"))
    layer = {f"self_attn.{name}.weight" for name in ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")}
    layer |= {f"mlp.{name}.weight" for name in ("gate_proj", "up_proj", "down_proj")}
    layer |= {"input_layernorm.weight", "post_attention_layernorm.weight"}
    expected = {f"layers.{i}.{name}" for i in range(2) for name in layer}
    assert names == expected | {"fc.weight", "hidden_norm.weight", "norm.weight"}


@pytest.mark.parametrize("mask_token_id", [MASK_TOKEN_ID, VOCAB_SIZE, VOCAB_SIZE + 4])
def test_the_mask_may_lie_beyond_the_vocabulary_and_is_never_drafted(mask_token_id: int, prompt: torch.Tensor) -> None:
    drafter = make_drafter(mask_token_id=mask_token_id)
    window = torch.tensor([[5] + [mask_token_id] * 5])
    assert drafter(input_ids=window).logits.shape == (1, 6, VOCAB_SIZE)
    with torch.no_grad():
        drafter.lm_head.weight[mask_token_id] = 100 * drafter.lm_head.weight.abs().sum(0)
    sequences = drafter.generate(input_ids=prompt).sequences
    assert mask_token_id not in sequences[0].tolist()
    expected = shared_target().generate(prompt, do_sample=False, max_new_tokens=9)
    assert torch.equal(
        hf_specdiff.generate(shared_target(), prompt, assistant_model=drafter, do_sample=False, max_new_tokens=9), expected
    )


def test_context_is_causal_and_the_window_bidirectional() -> None:
    """A context token's state never changes with what follows; a window slot's does, in both directions."""
    drafter = make_drafter()
    context = torch.tensor([[4, 8, 15, 16]])
    with torch.no_grad():
        states = drafter(input_ids=torch.cat([context, WINDOW], 1), window_size=6).last_hidden_state
        other = torch.cat([context, WINDOW], 1)
        other[0, -1] = 9
        changed = drafter(input_ids=other, window_size=6).last_hidden_state
        first = torch.cat([context, WINDOW], 1)
        first[0, 0] = 9
        shifted = drafter(input_ids=first, window_size=6).last_hidden_state
    torch.testing.assert_close(states[:, :4], changed[:, :4])
    assert bool(((states[:, 4:] - changed[:, 4:]).abs().amax(-1) > 1e-6).all())
    assert bool(((states - shifted).abs().amax(-1) > 1e-6).all())


@pytest.mark.parametrize("layers", [None, [0, 2]])
@pytest.mark.parametrize(
    ("implementation", "device"),
    [
        ("eager", "cpu"),
        pytest.param(
            "flex_attention",
            "cuda",
            # torch's compiled flex attention ends the process on some CPUs (2.13.0), so only a GPU can tell.
            marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="flex attention needs a GPU"),
        ),
    ],
)
@pytest.mark.parametrize("is_padded", [False, True])
def test_attention_implementations_agree(implementation: str, device: str, layers: list[int] | None, is_padded: bool) -> None:
    reference = make_drafter(layers).to(device)
    reference.set_attn_implementation("sdpa")
    other = make_drafter(layers).to(device)
    other.set_attn_implementation(implementation)
    mask = torch.tensor([[0, 0] + [1] * 8], device=device) if is_padded else None
    torch.manual_seed(0)
    if layers is None:
        ids = torch.cat([torch.tensor([[0, 0, 7, 8]]), WINDOW], 1)
        inputs = {"input_ids": ids.to(device), "window_size": 6}
    else:
        inputs = {
            "noise_embeds": torch.randn(1, 6, 16).to(device),
            "context_hidden_states": torch.randn(1, 4, 32).to(device),
        }
    with torch.no_grad():
        expected = reference(**inputs, attention_mask=mask).last_hidden_state
        result = other(**inputs, attention_mask=mask).last_hidden_state
    torch.testing.assert_close(result[:, -6:], expected[:, -6:], atol=1e-5, rtol=1e-4)


def test_flash_attention_is_refused_where_a_mask_is_needed() -> None:
    drafter = make_drafter()
    drafter.config._attn_implementation_internal = "flash_attention_2"
    with pytest.raises(ValueError, match="reads no mask"):
        drafter(input_ids=torch.cat([torch.tensor([[4, 8]]), WINDOW], 1), window_size=6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_any_float_dtype_drafts_losslessly(dtype: torch.dtype, drafter: SpecDiffDrafter, prompt: torch.Tensor) -> None:
    other = make_drafter(drafter.config.target_layer_ids).to(dtype)
    expected = shared_target().generate(prompt, do_sample=False, max_new_tokens=16)
    result = hf_specdiff.generate(shared_target(), prompt, assistant_model=other, do_sample=False, max_new_tokens=16)
    assert torch.equal(result, expected)
    sampled = hf_specdiff.generate(make_target().to(dtype), prompt, assistant_model=other, do_sample=True, max_new_tokens=16)
    assert sampled.shape[1] > prompt.shape[1]


def test_cached_context_gives_the_states_of_an_uncached_pass() -> None:
    drafter = make_drafter()
    text = torch.randint(3, 29, (1, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        at_once = drafter(input_ids=torch.cat([text, WINDOW], 1), window_size=6).last_hidden_state[:, -6:]
        cache = DynamicCache(config=drafter.config)
        drafter(input_ids=torch.cat([text[:, :5], WINDOW], 1), past_key_values=cache, window_size=6)
        cache.crop(-6)
        stepwise = drafter(input_ids=torch.cat([text[:, 5:], WINDOW], 1), past_key_values=cache, window_size=6)
    torch.testing.assert_close(stepwise.last_hidden_state[:, -6:], at_once, atol=1e-5, rtol=1e-4)


def test_a_target_over_cpu_and_disk_gives_the_same_tokens(
    drafter: SpecDiffDrafter, prompt: torch.Tensor, tmp_path: Path
) -> None:
    """Accelerate keeps some layers, the embedding and the head on disk; tensors move at the border."""
    expected = shared_target().generate(prompt, do_sample=False, max_new_tokens=16)
    make_target().save_pretrained(tmp_path / "target")
    device_map = {
        "model.embed_tokens": "disk",
        "model.layers.0": "cpu",
        "model.layers.1": "disk",
        "model.layers.2": "disk",
        "model.norm": "cpu",
        "model.rotary_emb": "cpu",
        "lm_head": "disk",
    }
    target = LlamaForCausalLM.from_pretrained(
        tmp_path / "target", device_map=device_map, offload_folder=str(tmp_path / "offload")
    ).eval()
    assert target.lm_head.weight.device.type == "meta"
    result = hf_specdiff.generate(target, prompt, assistant_model=drafter, do_sample=False, max_new_tokens=16)
    assert torch.equal(result, expected)


def test_a_drafter_on_disk_gives_the_same_tokens(drafter: SpecDiffDrafter, prompt: torch.Tensor, tmp_path: Path) -> None:
    other = make_drafter(drafter.config.target_layer_ids)
    modules = [name for name, module in other.named_children() if any(True for _ in module.parameters())]
    device_map = {name: "disk" if name == "layers" else "cpu" for name in modules} | {"rotary_emb": "cpu"}
    placed = dispatch_model(other, device_map=device_map, offload_dir=str(tmp_path), main_device="cpu", force_hooks=True)
    expected = shared_target().generate(prompt, do_sample=False, max_new_tokens=16)
    result = hf_specdiff.generate(shared_target(), prompt, assistant_model=placed, do_sample=False, max_new_tokens=16)
    assert torch.equal(result, expected)


@pytest.mark.parametrize("layers", [None, [0, 2]])
def test_positions_are_looked_up_as_a_pass_would_embed_them(
    layers: list[int] | None, prompt: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the text outgrows what was embedded ahead."""
    monkeypatch.setattr("hf_specdiff.core.drafters.TABLE_ROOM", 3)
    drafter, checked = make_drafter(layers), []
    forward = drafter.forward

    def watched(**inputs: Any) -> Any:
        tables = inputs["position_embeddings"]
        expected = drafter.position_tables(drafter.norm.weight, inputs["position_ids"])
        checked.append(all(torch.equal(*pair) for pair in zip(tables, expected, strict=True)))
        return forward(**inputs)

    monkeypatch.setattr(drafter, "forward", watched)
    settings: dict[str, Any] = {"do_sample": False, "max_new_tokens": 16, "draft_shape": "chain", "gamma": 3}
    hf_specdiff.generate(shared_target(), prompt, assistant_model=drafter, **settings)
    assert len(checked) > 3
    assert all(checked)

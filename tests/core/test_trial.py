"""Models are tried before they are trusted: what the trial sees, what it lets pass, and what a call then says."""

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers import BloomConfig
from transformers import Cohere2MoeConfig
from transformers import CpmAntConfig
from transformers import DynamicCache
from transformers import Gemma3TextConfig
from transformers import GitConfig
from transformers import Llama4TextConfig
from transformers import MistralConfig
from transformers import MptConfig
from transformers import OpenAIGPTConfig
from transformers import ProphetNetConfig
from transformers import Qwen3Config
from transformers import RobertaConfig
from transformers import WhisperConfig
from transformers import WhisperForCausalLM
from transformers import XLMConfig
from transformers import XLNetConfig
from transformers.models.minimax.modeling_minimax import MiniMaxCache

import hf_specdiff
from hf_specdiff import SpecDiffDrafter
from hf_specdiff.core import masked_target
from hf_specdiff.core.cache import check_takes_back
from hf_specdiff.core.trial import why_not_chained
from hf_specdiff.core.trial import why_not_masked
from tests.conftest import SPECIAL_IDS
from tests.conftest import VOCAB_SIZE
from tests.conftest import make_drafter
from tests.conftest import make_target

CPU = torch.device("cpu")
SMALL = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "initializer_range": 0.6,
    **SPECIAL_IDS,
}
ROBERTA = RobertaConfig(**{**SMALL, "pad_token_id": 1, "bos_token_id": 0}, is_decoder=True)
BIDIRECTIONAL = Gemma3TextConfig(**SMALL, use_bidirectional_attention=True, query_pre_attn_scalar=8)
# What plain decoding reads otherwise than a pass of several tokens would, or what keeps no cache to take tokens back from.
NOT_CHAINED = {
    "looks ahead": CpmAntConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=16,
        num_attention_heads=2,
        dim_head=8,
        dim_ff=32,
        num_hidden_layers=2,
        prompt_length=4,
    ),
    "bidirectional": BIDIRECTIONAL,
    "one token a pass": ProphetNetConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=16,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        num_decoder_layers=2,
        num_decoder_attention_heads=2,
        max_position_embeddings=64,
        is_decoder=True,
        is_encoder_decoder=False,
        **SPECIAL_IDS,
    ),
    "no cache": OpenAIGPTConfig(vocab_size=VOCAB_SIZE, n_positions=64, n_embd=16, n_layer=2, n_head=2, **SPECIAL_IDS),
    "a mask behind the text": XLMConfig(
        vocab_size=VOCAB_SIZE, emb_dim=16, n_layers=2, n_heads=2, mask_token_id=5, **SPECIAL_IDS
    ),
}


def make_model(config: object) -> torch.nn.Module:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


def drafter_of(model: torch.nn.Module, target_layer_ids: list[int] | None = None) -> SpecDiffDrafter:
    """Return a drafter with the ids that a model has."""
    config = model.config.get_text_config()
    return make_drafter(target_layer_ids, **{name: getattr(config, name, None) for name in SPECIAL_IDS})


@pytest.mark.parametrize("config", NOT_CHAINED.values(), ids=NOT_CHAINED)
@pytest.mark.parametrize("shape", ["chain", "tree", "auto"])
def test_models_that_read_a_pass_otherwise_are_refused(config: object, shape: str, prompt: torch.Tensor) -> None:
    model = make_model(config)
    assert why_not_chained(model, CPU) is not None
    with pytest.raises(ValueError, match="one by one"):
        hf_specdiff.generate(model, prompt, assistant_model=drafter_of(model), max_new_tokens=5, draft_shape=shape)


@pytest.mark.parametrize("config", [Qwen3Config(**SMALL), ROBERTA, MistralConfig(**SMALL, sliding_window=4)])
def test_ordinary_models_pass(config: object) -> None:
    model = make_model(config)
    assert why_not_chained(model, CPU) is None
    assert why_not_masked(model, CPU) is None
    assert why_not_masked(model, CPU, has_padding=True) is None


@pytest.mark.parametrize("config", [Qwen3Config(**SMALL), ROBERTA], ids=["rotary", "learned"])
def test_positions_off_by_one_are_seen(config: object, monkeypatch: pytest.MonkeyPatch) -> None:
    """A control: noise is measured against the host's own decoding, so the same mistake on both sides cannot hide."""
    monkeypatch.setattr(masked_target, "lag_of", lambda positions, last_place, num_rows: -1)
    model = make_model(config)
    assert why_not_chained(model, CPU) is None
    assert "other logits" in why_not_masked(model, CPU)


def test_positions_of_padded_rows_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """A control: as if every row stood at its slots, which is right only where nothing is padded."""
    monkeypatch.setattr(masked_target, "lag_of", lambda positions, last_place, num_rows: 0)
    model = make_model(ROBERTA)
    assert why_not_masked(model, CPU) is None
    assert "padded rows" in why_not_masked(model, CPU, has_padding=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_what_passes_in_one_precision_passes_in_all(dtype: torch.dtype) -> None:
    assert why_not_masked(make_model(Qwen3Config(**SMALL)).to(dtype), CPU, has_padding=True) is None
    assert why_not_chained(make_model(BIDIRECTIONAL).to(dtype), CPU) is not None


def test_dropout_is_seen(prompt: torch.Tensor) -> None:
    target = make_target(attention_dropout=0.3)
    assert why_not_chained(target, CPU) is None
    with pytest.raises(ValueError, match="in training mode"):
        hf_specdiff.generate(target.train(), prompt, assistant_model=make_drafter(), max_new_tokens=5)


def test_a_trial_leaves_no_trace(prompt: torch.Tensor) -> None:
    target = make_target(7)
    before = target.generate(prompt, do_sample=False, max_new_tokens=20)
    state = torch.get_rng_state()
    assert why_not_masked(target, CPU, has_padding=True) is None
    assert torch.equal(torch.get_rng_state(), state)
    assert not target._forward_pre_hooks
    assert torch.equal(target.generate(prompt, do_sample=False, max_new_tokens=20), before)


def test_settings_of_the_model_do_not_reach_the_trial(capsys: pytest.CaptureFixture[str]) -> None:
    target = make_target(3)
    target.generation_config.update(
        num_beams=3, num_return_sequences=2, max_length=50, temperature=0.3, cache_implementation="static"
    )
    assert why_not_masked(target, CPU) is None
    assert capsys.readouterr().err == ""


def test_a_pattern_of_layers_is_no_window(prompt: torch.Tensor) -> None:
    fields = {"num_experts": 4, "num_experts_per_tok": 2, "sliding_window": 5, "prefix_dense_sliding_window_pattern": 4}
    model = make_model(Cohere2MoeConfig(**SMALL, **fields, layer_types=["sliding_attention", "full_attention"]))
    assert why_not_masked(model, CPU) is None
    settings = {"do_sample": False, "max_new_tokens": 20}
    result = hf_specdiff.generate(model, prompt, assistant_model=drafter_of(model), draft_shape="tree", **settings)
    assert torch.equal(result, model.generate(prompt, **settings))


def test_padded_rows_that_the_host_itself_reads_otherwise_are_refused() -> None:
    """GIT's padded batch differs from its rows alone; a single prompt without padding is drafted for by trees."""
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16}
    model = make_model(GitConfig(vision_config={**vision, "patch_size": 8}, **SMALL))
    assert why_not_masked(model, CPU) is None
    assert "padded rows" in why_not_masked(model, CPU, has_padding=True)


def test_branches_may_not_reach_where_llama_4_scales_by_slots(prompt: torch.Tensor) -> None:
    fields = {"num_local_experts": 2, "num_experts_per_tok": 1, "attn_temperature_tuning": True, "attn_scale": 2.0}
    kinds = {"layer_types": ["chunked_attention", "full_attention"], "no_rope_layers": [1, 0], "attention_chunk_size": 64}
    sizes = {"intermediate_size_mlp": 32}
    for floor_scale, is_near in ((24, True), (8192, False)):
        model = make_model(Llama4TextConfig(**SMALL, **fields, **kinds, **sizes, floor_scale=floor_scale))
        settings = {"do_sample": False, "max_new_tokens": 30}
        expected = model.generate(prompt, **settings)
        drafter = drafter_of(model)
        result = hf_specdiff.generate(model, prompt, assistant_model=drafter, **settings, return_dict_in_generate=True)
        assert torch.equal(result.sequences, expected)
        assert result.speculation.draft_shape == ("chain" if is_near else "tree")
        if is_near:
            with pytest.raises(ValueError, match="slots of the cache"):
                hf_specdiff.generate(model, prompt, assistant_model=drafter, draft_shape="tree", **settings)


def test_windows_of_several_sizes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model(MistralConfig(**SMALL, sliding_window=4))
    cache = DynamicCache(config=model.config)
    cache.layers[1].sliding_window = 6
    monkeypatch.setattr("hf_specdiff.core.trial.DynamicCache", lambda config: cache)
    assert "several sizes" in why_not_masked(model, CPU)


def test_a_mask_that_is_not_known_is_said_to_be_so(prompt: torch.Tensor) -> None:
    model = make_target(layer_types=["full_attention"] * 3)
    model.config.layer_types = ["full_attention", "indexed_attention", "full_attention"]
    assert "'indexed_attention', for which we know no mask" in why_not_masked(model, CPU)


def test_models_without_a_cache_of_the_hosts_are_told_so(prompt: torch.Tensor) -> None:
    xlnet = make_model(XLNetConfig(vocab_size=VOCAB_SIZE, d_model=16, n_layer=2, n_head=2, d_inner=32, **SPECIAL_IDS))
    with pytest.raises(ValueError, match="keeps its text in a form of its own"):
        hf_specdiff.generate(xlnet, prompt, assistant_model=drafter_of(xlnet), max_new_tokens=5, use_cache=True)
    mpt = make_model(MptConfig(vocab_size=VOCAB_SIZE, d_model=16, n_heads=2, n_layers=2, **SPECIAL_IDS))
    settings = {"do_sample": False, "max_new_tokens": 9}
    with pytest.raises(ValueError, match=r"model's own config.*pass use_cache=True"):
        hf_specdiff.generate(mpt, prompt, assistant_model=drafter_of(mpt), **settings)
    result = hf_specdiff.generate(mpt, prompt, assistant_model=drafter_of(mpt), use_cache=True, **settings)
    assert torch.equal(result, mpt.generate(prompt, **settings))


def test_a_cache_that_cannot_be_cropped_is_refused(prompt: torch.Tensor) -> None:
    settings = {"assistant_model": make_drafter(), "max_new_tokens": 5}
    with pytest.raises(ValueError, match="MiniMaxCache, which says that it cannot"):
        hf_specdiff.generate(make_target(), prompt, past_key_values=MiniMaxCache(), **settings)


def test_layers_that_keep_something_else_than_the_text_are_refused() -> None:
    """As cross-attention keeps an image's keys beside the text's: cropping would take both."""
    cache = DynamicCache()
    cache.update(torch.zeros(1, 1, 5, 4), torch.zeros(1, 1, 5, 4), 0)
    check_takes_back(cache, "Tiny")
    cache.update(torch.zeros(1, 1, 9, 4), torch.zeros(1, 1, 9, 4), 1)
    with pytest.raises(ValueError, match="keys of the text alone"):
        check_takes_back(cache, "Tiny")


def test_alibi_is_chained_but_not_masked() -> None:
    model = make_model(
        BloomConfig(vocab_size=VOCAB_SIZE, hidden_size=16, n_layer=2, n_head=2, initializer_range=0.6, **SPECIAL_IDS)
    )
    assert why_not_chained(model, CPU) is None
    assert "Bloom" in why_not_masked(model, CPU)


def test_a_model_whose_forward_names_no_positions_stands_at_its_slots() -> None:
    sizes = {"d_model": 16, "decoder_layers": 2, "decoder_attention_heads": 2, "decoder_ffn_dim": 32, "encoder_layers": 2}
    fields = {"vocab_size": VOCAB_SIZE, "max_target_positions": 64, "init_std": 0.6, "decoder_start_token_id": 1, **SPECIAL_IDS}
    torch.manual_seed(0)
    model = WhisperForCausalLM(WhisperConfig(**sizes, **fields, begin_suppress_tokens=None)).eval()
    assert why_not_masked(model, CPU, has_padding=True) is None

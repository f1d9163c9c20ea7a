"""Places and positions: greedy rows are plain decoding's wherever the model stands by its own count."""

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers import AutoModelForImageTextToText
from transformers import DynamicCache
from transformers import Gemma2Config
from transformers import Gemma3nTextConfig
from transformers import Gemma3TextConfig
from transformers import GemmaConfig
from transformers import LongcatFlashConfig
from transformers import MistralConfig
from transformers import MllamaForCausalLM
from transformers import MllamaTextConfig
from transformers import MoshiConfig
from transformers import PaliGemmaConfig
from transformers import Qwen2VLConfig
from transformers import WhisperConfig
from transformers import WhisperForCausalLM

import hf_specdiff
from hf_specdiff import SpecDiffDrafter
from hf_specdiff.core.masked_target import masks_its_windows
from hf_specdiff.core.masked_target import unmasked_window
from tests.conftest import SPECIAL_IDS
from tests.conftest import VOCAB_SIZE
from tests.conftest import make_drafter
from tests.conftest import make_target
from tests.conftest import shared_target

SHAPES = {"chain": {"draft_shape": "chain"}, "tree": {"draft_shape": "tree", "tree_budget": 12}, "auto": {}}
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
TYPES = {"layer_types": ["sliding_attention", "full_attention"]}
VISION = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16}


def make_model(config: object, auto: type = AutoModelForCausalLM) -> torch.nn.Module:
    """Return a random model; whatever a wrapper's own configuration says, its weights are large enough to write texts."""
    torch.manual_seed(0)
    model = auto.from_config(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.normal_(0, 0.6)
    return model


def make_whisper() -> torch.nn.Module:
    sizes = {"d_model": 16, "decoder_layers": 2, "decoder_attention_heads": 2, "decoder_ffn_dim": 32, "encoder_layers": 2}
    fields = {"vocab_size": VOCAB_SIZE, "max_target_positions": 64, "init_std": 0.6, "decoder_start_token_id": 1, **SPECIAL_IDS}
    torch.manual_seed(0)
    return WhisperForCausalLM(WhisperConfig(**sizes, **fields, begin_suppress_tokens=None)).eval()


def make_paligemma() -> torch.nn.Module:
    config = PaliGemmaConfig(
        vision_config={**VISION, "patch_size": 8, "projection_dim": 16, "model_type": "siglip_vision_model"},
        text_config=GemmaConfig(**SMALL).to_dict(),
        image_token_index=29,
        projection_dim=16,
        hidden_size=16,
        **SPECIAL_IDS,
    )
    return make_model(config, AutoModelForImageTextToText)


def make_qwen2_vl() -> torch.nn.Module:
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
    vision = {"depth": 1, "embed_dim": 16, "hidden_size": 16, "num_heads": 2, "mlp_ratio": 2, "patch_size": 4}
    config = Qwen2VLConfig(
        text_config={**SMALL, "rope_parameters": rope}, vision_config=vision, image_token_id=28, video_token_id=29
    )
    return make_model(config, AutoModelForImageTextToText)


MAKERS = {"positions from 1": make_paligemma, "positions of slots": make_whisper, "positions in planes": make_qwen2_vl}


@pytest.fixture(scope="module", params=MAKERS)
def model(request: pytest.FixtureRequest) -> torch.nn.Module:
    """A model that counts positions in its own way; what the loop tries of one it tries once."""
    return MAKERS[request.param]()


def drafter_of(model: torch.nn.Module, target_layer_ids: list[int] | None = None) -> SpecDiffDrafter:
    """Return a drafter with the ids that a model has."""
    config = model.config.get_text_config()
    return make_drafter(target_layer_ids, **{name: getattr(config, name, None) for name in SPECIAL_IDS})


def batch_of(lengths: list[int], seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Return prompts of different lengths, padded on the left, and their mask."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 28, (len(lengths), max(lengths)), generator=generator)
    mask = torch.stack([torch.arange(max(lengths)) >= max(lengths) - length for length in lengths]).long()
    return ids.masked_fill(mask == 0, 0), mask


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("lengths", [[9], [3, 10, 6]], ids=["one", "batch"])
def test_positions_are_what_the_model_was_given(model: torch.nn.Module, lengths: list[int], shape: str) -> None:
    ids, mask = batch_of(lengths)
    settings = {"do_sample": False, "max_new_tokens": 20, "attention_mask": mask, "eos_token_id": None, "pad_token_id": 0}
    expected = model.generate(ids, **settings)
    result = hf_specdiff.generate(model, ids, assistant_model=drafter_of(model), **settings, **SHAPES[shape])
    assert torch.equal(result, expected)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_single_prompt_may_be_padded(model: torch.nn.Module, shape: str) -> None:
    ids, mask = batch_of([4, 9])
    settings = {"do_sample": False, "max_new_tokens": 20, "attention_mask": mask[:1], "eos_token_id": None, "pad_token_id": 0}
    expected = model.generate(ids[:1], **settings)
    result = hf_specdiff.generate(model, ids[:1], assistant_model=drafter_of(model), **settings, **SHAPES[shape])
    assert torch.equal(result, expected)


@pytest.mark.parametrize("is_inferred", [False, True], ids=["mask", "pads"])
@pytest.mark.parametrize("kind", [Gemma2Config, Gemma3TextConfig])
def test_windows_are_measured_in_places_where_a_mask_has_a_hole(kind: type, is_inferred: bool) -> None:
    model = make_model(kind(**SMALL, **TYPES, sliding_window=6, query_pre_attn_scalar=8))
    drafter = drafter_of(model)
    for seed in range(4):
        ids, _ = batch_of([14], seed)
        ids[:, 9:12] = 0
        settings = {"do_sample": False, "max_new_tokens": 20, "eos_token_id": None, "pad_token_id": 0}
        settings |= {} if is_inferred else {"attention_mask": (ids != 0).long()}
        expected = model.generate(ids, **settings)
        for shape in ("chain", "tree"):
            result = hf_specdiff.generate(model, ids, assistant_model=drafter, **settings, **SHAPES[shape])
            assert torch.equal(result, expected), shape


@pytest.mark.parametrize("lengths", [[3], [20], [3, 10, 6]], ids=["short", "long", "batch"])
def test_a_window_that_only_the_cache_keeps_is_kept(lengths: list[int]) -> None:
    """Moshi masks no window: plain decoding has one because the cache drops what is older."""
    sizes = {"hidden_act": "silu", "ffn_dim": 32, "sliding_window": 12, "num_codebooks": 2}
    model = make_model(MoshiConfig(**SMALL, **sizes, audio_vocab_size=32))
    assert not masks_its_windows(model)
    assert unmasked_window(model, DynamicCache(config=model.config.get_text_config())) == 12
    ids, mask = batch_of(lengths)
    settings = {"do_sample": False, "max_new_tokens": 24, "attention_mask": mask, "eos_token_id": None, "pad_token_id": 0}
    expected = model.generate(ids, **settings)
    for shape in SHAPES:
        result = hf_specdiff.generate(model, ids, assistant_model=drafter_of(model), **settings, **SHAPES[shape])
        assert torch.equal(result, expected), shape


def test_a_window_that_only_the_callers_cache_keeps_ends_the_text_within_it() -> None:
    sizes = {"hidden_act": "silu", "ffn_dim": 32, "sliding_window": 12, "num_codebooks": 2}
    model = make_model(MoshiConfig(**SMALL, **sizes, audio_vocab_size=32))
    ids, _ = batch_of([5])
    settings = {"do_sample": False, "eos_token_id": None, "draft_shape": "chain", "assistant_model": drafter_of(model)}
    cache = DynamicCache(config=model.config.get_text_config())
    with pytest.raises(ValueError, match="within 12 tokens"):
        hf_specdiff.generate(model, ids, past_key_values=cache, max_new_tokens=8, **settings)
    result = hf_specdiff.generate(model, ids, past_key_values=cache, max_new_tokens=7, **settings)
    assert torch.equal(result, model.generate(ids, do_sample=False, eos_token_id=None, max_new_tokens=7))


def test_most_models_mask_their_windows() -> None:
    assert masks_its_windows(make_model(MistralConfig(**SMALL, sliding_window=6)))
    assert unmasked_window(make_target(), DynamicCache(config=make_target().config)) is None


STATES = {
    "four for a token": Gemma3nTextConfig(
        **SMALL,
        **TYPES,
        vocab_size_per_layer_input=VOCAB_SIZE,
        hidden_size_per_layer_input=8,
        num_kv_shared_layers=0,
        laurel_rank=4,
        sliding_window=6,
        activation_sparsity_pattern=[0.0, 0.0],
    ),
    "fewer than layers": LongcatFlashConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=16,
        ffn_hidden_size=32,
        expert_ffn_hidden_size=16,
        num_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        q_lora_rank=8,
        kv_lora_rank=8,
        qk_nope_head_dim=8,
        qk_rope_head_dim=8,
        v_head_dim=8,
        head_dim=8,
        n_routed_experts=4,
        moe_topk=2,
        zero_expert_num=2,
        **SPECIAL_IDS,
    ),
}


@pytest.mark.parametrize("config", STATES.values(), ids=STATES)
def test_hidden_states_that_no_drafter_can_read_are_refused(config: object, prompt: torch.Tensor) -> None:
    model = make_model(config)
    last = model.config.num_hidden_layers - 1
    settings = {"do_sample": False, "max_new_tokens": 12}
    with pytest.raises(ValueError, match=r"hidden states are \(rows, tokens, 16\), got"):
        hf_specdiff.generate(model, prompt, assistant_model=drafter_of(model, [0, last]), **settings)
    result = hf_specdiff.generate(model, prompt, assistant_model=drafter_of(model), **settings)
    assert torch.equal(result, model.generate(prompt, **settings))


def test_layers_that_read_images_alone_hold_no_keys_of_a_text(prompt: torch.Tensor) -> None:
    torch.manual_seed(0)
    model = MllamaForCausalLM(MllamaTextConfig(**{**SMALL, "num_hidden_layers": 3}, cross_attention_layers=[1])).eval()
    for ids in (prompt, torch.cat([prompt, prompt.flip(1)])):
        settings = {"do_sample": False, "max_new_tokens": 15, "attention_mask": torch.ones_like(ids), "eos_token_id": None}
        result = hf_specdiff.generate(model, ids, assistant_model=drafter_of(model), **settings, **SHAPES["tree"])
        assert torch.equal(result, model.generate(ids, **settings))


@pytest.mark.parametrize("shape", ["chain", "tree"])
@pytest.mark.parametrize("is_padded", [False, True])
def test_a_batch_leaves_the_callers_cache_as_plain_generate_does(is_padded: bool, shape: str, drafter: SpecDiffDrafter) -> None:
    """Rows end at different lengths, and a second turn goes on from the cache."""
    target = shared_target(2)
    num_apart = 0
    for seed in range(6):
        ids, mask = batch_of([4, 7, 5] if is_padded else [6, 6, 6], seed)
        more = torch.randint(3, 28, (3, 2), generator=torch.Generator().manual_seed(seed))
        settings = {"do_sample": False, "max_new_tokens": 12, "eos_token_id": 9, "pad_token_id": 0}
        caches, turns = [], []
        for is_plain in (True, False):
            kwargs = settings if is_plain else {**settings, **SHAPES[shape], "assistant_model": drafter}
            call = hf_specdiff.generate if not is_plain else type(target).generate
            caches.append(DynamicCache())
            first = call(target, ids, attention_mask=mask, past_key_values=caches[-1], **kwargs)
            assert caches[-1].get_seq_length() == first.shape[1] - 1
            layers = [(layer.keys.clone(), layer.values.clone()) for layer in caches[-1].layers]
            text = torch.cat([first, more], dim=1)
            text_mask = torch.cat([mask, torch.ones(3, text.shape[1] - mask.shape[1], dtype=torch.long)], dim=1)
            second = call(target, text, attention_mask=text_mask, past_key_values=caches[-1], **kwargs)
            turns.append((first, second, layers))
        assert torch.equal(turns[0][0], turns[1][0])
        assert torch.equal(turns[0][1], turns[1][1])
        real = torch.nn.functional.pad(mask, (0, turns[0][0].shape[1] - 1 - mask.shape[1]), value=1).bool()[:, None, :, None]
        for theirs, ours in zip(turns[0][2], turns[1][2], strict=True):
            for one, other in zip(theirs, ours, strict=True):
                torch.testing.assert_close(one * real, other * real, atol=1e-4, rtol=1e-4)
        num_apart += int((turns[0][0][:, ids.shape[1] :] == 0).any())
    assert num_apart >= 2

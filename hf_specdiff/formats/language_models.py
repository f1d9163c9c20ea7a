"""Diffusion language models of others as drafters: which native body holds their weights, and how it is to be read.

Reads config.json and the headers of the weights, never code. Knows the families and what is known of each.
"""

from collections.abc import Callable
from collections.abc import Iterable
from dataclasses import dataclass
from dataclasses import field
from dataclasses import replace
from typing import Any

from transformers import CONFIG_MAPPING
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers import GPT2Config
from transformers import GPT2LMHeadModel
from transformers import LlamaConfig
from transformers import LlamaForCausalLM
from transformers import PreTrainedConfig
from transformers import Qwen2Config
from transformers import Qwen2ForCausalLM
from transformers import Qwen3Config
from transformers import Qwen3ForCausalLM

from hf_specdiff.diffusion.mdlm import MDLMConfig
from hf_specdiff.diffusion.mdlm import MDLMForMaskedLM
from hf_specdiff.diffusion.saving import NOTES
from hf_specdiff.diffusion.saving import SECTION
from hf_specdiff.formats.record import Fields
from hf_specdiff.formats.record import Record

Shapes = dict[str, tuple[int, ...]]
# (attention, block length): who sees whom.
Attention = tuple[str, int | None]
FULL: Attention = ("full", None)
# Switches of training and of kernels that these families' files hold; none of them changes a logit.
TRAINING_FIELDS = {
    "debug",
    "ep_size",
    "fuse_cross_entropy",
    "micro_forward",
    "skip_checkpoint",
    "use_deepep",
}
# What LLaDA's files must say for its body to be Llama's.
LLADA_FIELDS = {
    "activation_type": "silu",
    "alibi": False,
    "attention_layer_norm": False,
    "bias_for_layer_norm": False,
    "block_group_size": 1,
    "block_type": "llama",
    "clip_qkv": None,
    "include_bias": False,
    "include_qkv_bias": False,
    "input_emb_norm": False,
    "layer_norm_type": "rms",
    "layer_norm_with_affine": True,
    "rope": True,
    "scale_logits": False,
}
# What it may say without a change: dropouts, initialisation, precision of the forms above.
LLADA_UNREAD = {
    "alibi_bias_max",
    "attention_dropout",
    "attention_layer_norm_with_affine",
    "embedding_dropout",
    "flash_attention",
    "init_cutoff_factor",
    "init_device",
    "init_fn",
    "init_std",
    "mlp_ratio",
    "multi_query_attention",
    "precision",
    "residual_dropout",
    "rope_full_precision",
}
# One group a pattern: the host's loading (transformers 5.23) puts no second one back.
LLADA_RENAMES = {
    r"^model\.transformer\.wte\.": "model.embed_tokens.",
    r"^model\.transformer\.ln_f\.": "model.norm.",
    r"^model\.transformer\.ff_out\.": "lm_head.",
    r"^model\.transformer\.blocks\.(\d+)\.q_proj\.": r"model.layers.\1.self_attn.q_proj.",
    r"^model\.transformer\.blocks\.(\d+)\.k_proj\.": r"model.layers.\1.self_attn.k_proj.",
    r"^model\.transformer\.blocks\.(\d+)\.v_proj\.": r"model.layers.\1.self_attn.v_proj.",
    r"^model\.transformer\.blocks\.(\d+)\.attn_out\.": r"model.layers.\1.self_attn.o_proj.",
    r"^model\.transformer\.blocks\.(\d+)\.ff_proj\.": r"model.layers.\1.mlp.gate_proj.",
    r"^model\.transformer\.blocks\.(\d+)\.up_proj\.": r"model.layers.\1.mlp.up_proj.",
    r"^model\.transformer\.blocks\.(\d+)\.ff_out\.": r"model.layers.\1.mlp.down_proj.",
    r"^model\.transformer\.blocks\.(\d+)\.attn_norm\.": r"model.layers.\1.input_layernorm.",
    r"^model\.transformer\.blocks\.(\d+)\.ff_norm\.": r"model.layers.\1.post_attention_layernorm.",
}
MDLM_RENAMES = {
    r"^backbone\.vocab_embed\.embedding$": "embed_tokens.weight",
    r"^backbone\.sigma_map\.mlp\.": "sigma_map.",
    r"^backbone\.(blocks|output_layer|rotary_emb)\.": r"\1.",
}
GPT2_FIELDS = (
    "n_embd",
    "n_head",
    "n_inner",
    "n_layer",
    "n_positions",
    "layer_norm_epsilon",
    "activation_function",
    "scale_attn_weights",
    "scale_attn_by_inverse_layer_idx",
    "reorder_and_upcast_attn",
)
GPT2_UNREAD = {"n_ctx", "attn_pdrop", "embd_pdrop", "resid_pdrop", "initializer_range"} | {
    f"summary_{name}" for name in ("activation", "first_dropout", "proj_to_labels", "type", "use_proj")
}


@dataclass
class LanguageModel:
    """A diffusion language model on disk.

    Attributes:
        record (`Record`): its format's name, and how its tensors are called here.
        body (`type`): the native class that holds its weights.
        config (`PreTrainedConfig`): of the body.
        mask_token_id (`int`, *optional*): as the folder or the family says.
        logit_offset (`int`): see `DiffusionDrafter`.
        is_offset_open (`bool`): whether that is only what the family's own models have, and files do not say it.
        attentions (`list`): what its attention may be; several where the files do not say.
        block_size (`int`, *optional*): slots of its window, where the folder says.
        foreign_ids (`list[int]`): ids that the folder says mean something else to its target.
        notes (`dict`): more of the drafter's configuration, where the folder was written by us.
    """

    record: Record
    body: Any
    config: PreTrainedConfig
    mask_token_id: int | None
    logit_offset: int
    attentions: list[Attention] = field(default_factory=lambda: [FULL])
    block_size: int | None = None
    foreign_ids: list[int] = field(default_factory=list)
    notes: dict[str, Any] = field(default_factory=dict)
    is_offset_open: bool = False


def family_of(config: dict[str, Any], read_shapes: Callable[[], Shapes]) -> Any:
    """Return the reader of a diffusion language model, `None` if the folder holds something else.

    Args:
        config (`dict`): config.json.
        read_shapes (`Callable`): returns the shapes of the weights, where only those tell.

    Returns:
        `Callable`, *optional*: from configuration, shapes and ignored fields to a `LanguageModel`.
    """
    kind = config.get("model_type")
    if SECTION in config:
        return _own
    if kind in READERS:
        return READERS[kind]
    # Saved under the name of the model that they were made from.
    if kind in WRAPPED and "dflash_config" not in config and any(name.startswith("denoise_model.") for name in read_shapes()):
        return WRAPPED[kind]
    return None


def _own(config: dict[str, Any], shapes: Shapes, ignored: Iterable[str]) -> LanguageModel:
    """What `DiffusionDrafter.save_pretrained` wrote."""
    section, kind = config[SECTION], config.get("model_type")
    if not isinstance(section, dict):
        raise ValueError(f"`{SECTION}` in config.json must name all of a drafter's settings, got {section!r}. Save it anew.")
    notes = {name: section.get(name) for name in NOTES}
    if kind == MDLMConfig.model_type:
        body, config_class = MDLMForMaskedLM, MDLMConfig
    elif kind in CONFIG_MAPPING and CONFIG_MAPPING[kind] in MODEL_FOR_CAUSAL_LM_MAPPING:
        config_class = CONFIG_MAPPING[kind]
        body = MODEL_FOR_CAUSAL_LM_MAPPING[config_class]
    else:
        raise ValueError(
            f"`model_type` in config.json of a diffusion drafter must be a language model of transformers, got {kind!r}. "
            "Update transformers, or load the model by hand and wrap it in DiffusionDrafter."
        )
    try:
        attention = (section["attention"], section["block_length"])
        settings = (section["mask_token_id"], section["logit_offset"], [attention], section["block_size"])
        values = {name: value for name, value in config.items() if name != SECTION}
        record = Record("hf_specdiff's diffusion drafters", {})
        return LanguageModel(record, body, config_class(**values), *settings, section["foreign_ids"], notes)
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"`{SECTION}` in config.json must name all of a drafter's settings, got {str(config[SECTION])[:100]} "
            f"({type(error).__name__}: {error}). Save the drafter anew."
        ) from error


def _dream(config: dict[str, Any], shapes: Shapes, ignored: Iterable[str]) -> LanguageModel:
    """Dream and DiffuCoder: Qwen2.5, whose head still speaks of the next token."""
    return _qwen("Dream", Qwen2ForCausalLM, Qwen2Config, config, shapes, ignored, mask=151666, offset=-1)


def _fast_dllm(config: dict[str, Any], shapes: Shapes, ignored: Iterable[str]) -> LanguageModel:
    """Fast-dLLM v2: Qwen2.5 in blocks."""
    attentions = [("block_causal", config.get("bd_size", 32))]
    return _qwen("Fast-dLLM v2", Qwen2ForCausalLM, Qwen2Config, config, shapes, ignored, 151665, -1, attentions)


def _sdar(config: dict[str, Any], shapes: Shapes, ignored: Iterable[str]) -> LanguageModel:
    """SDAR: Qwen3 in blocks of 4 unless its files name another length."""
    attentions = [("block_causal", config.get("block_size") or config.get("block_length") or 4)]
    return _qwen("SDAR", Qwen3ForCausalLM, Qwen3Config, config, shapes, ignored, 151669, 0, attentions)


def _a2d_qwen2(config: dict[str, Any], shapes: Shapes, ignored: Iterable[str]) -> LanguageModel:
    """Conversions of Qwen2.5 by the package dLLM: the files do not say whether they were trained in blocks, or shifted."""
    model = _qwen("a2d-qwen2", Qwen2ForCausalLM, Qwen2Config, config, shapes, ignored, None, 0, _a2d_attentions(config))
    return replace(model, is_offset_open=True)


def _a2d_qwen3(config: dict[str, Any], shapes: Shapes, ignored: Iterable[str]) -> LanguageModel:
    """Conversions of Qwen3 by the same package."""
    model = _qwen("a2d-qwen3", Qwen3ForCausalLM, Qwen3Config, config, shapes, ignored, None, 0, _a2d_attentions(config))
    return replace(model, is_offset_open=True)


def _a2d_attentions(config: dict[str, Any]) -> list[Attention]:
    named = config.get("block_size")
    return [("block_causal", named)] if named else [FULL, ("block_causal", 32)]


def _diffullama(config: dict[str, Any], shapes: Shapes, ignored: Iterable[str]) -> LanguageModel:
    """DiffuLLaMA: Llama's layers in a wrapper, with a mask behind its vocabulary."""
    renames = {r"^denoise_model\.": "model.", r"^embed_tokens\.": "model.embed_tokens."}
    return _qwen("DiffuLLaMA", LlamaForCausalLM, LlamaConfig, config, shapes, ignored, 32000, -1, renames=renames)


def _qwen(
    name: str,
    body: Any,
    config_class: Any,
    values: dict[str, Any],
    shapes: Shapes,
    ignored: Iterable[str],
    mask: int | None,
    offset: int,
    attentions: list[Attention] | None = None,
    renames: dict[str, str] | None = None,
) -> LanguageModel:
    """Read a configuration with the fields of Llama, Qwen2 and Qwen3."""
    fields = Fields(values, name)
    record = Record(name, {}, renames or {}, [r"rotary_emb\.inv_freq$"])
    taken = fields.body()
    for own in ("bd_size", "block_size", "block_length", *TRAINING_FIELDS):
        fields.take(own)
    _must(name, "use_mrope", fields.take("use_mrope"), (None, False))
    mask_token_id = fields.take("mask_token_id", mask)
    bias = taken.pop("attention_bias", None)
    if config_class is Qwen2Config:
        _must(name, "attention_bias", bias, (None, True))  # Qwen2's queries, keys and values have one, and no field for it
    elif bias is not None:
        taken["attention_bias"] = bias
    fields.finish(ignored)
    embedding, is_tied = _embedding(record, shapes)
    taken |= {"vocab_size": embedding[0], "tie_word_embeddings": is_tied}
    return LanguageModel(record, body, config_class(**taken), mask_token_id, offset, attentions or [FULL])


def _llada(config: dict[str, Any], shapes: Shapes, ignored: Iterable[str]) -> LanguageModel:
    """LLaDA: Llama with names of its own."""
    fields = Fields(config, "LLaDA")
    record = Record("LLaDA", {}, LLADA_RENAMES, [])
    for name, value in LLADA_FIELDS.items():
        _must("LLaDA", name, fields.take(name), (None, value))
    for name in (*LLADA_UNREAD, "embedding_size", "weight_tying", "vocab_size"):
        fields.take(name)
    width, num_heads = fields.need("d_model"), fields.need("n_heads")
    mask_token_id = fields.take("mask_token_id", 126336)
    embedding, is_tied = _embedding(record, shapes)
    body = LlamaConfig(
        vocab_size=embedding[0],
        hidden_size=width,
        intermediate_size=fields.need("mlp_hidden_size"),
        num_hidden_layers=fields.need("n_layers"),
        num_attention_heads=num_heads,
        num_key_value_heads=fields.take("n_kv_heads", num_heads),
        max_position_embeddings=fields.take("max_sequence_length", 4096),
        rms_norm_eps=fields.take("rms_norm_eps", 1e-5),
        rope_theta=fields.take("rope_theta", 10000.0),
        tie_word_embeddings=is_tied,
    )
    fields.finish(ignored)
    return LanguageModel(record, LlamaForCausalLM, body, mask_token_id, 0)


def _diffugpt(config: dict[str, Any], shapes: Shapes, ignored: Iterable[str]) -> LanguageModel:
    """DiffuGPT: GPT-2's layers in a wrapper, with a mask behind its vocabulary."""
    fields = Fields(config, "DiffuGPT")
    renames = {r"^denoise_model\.": "transformer.", r"^embed_tokens\.": "transformer.wte."}
    if "embed_tokens.weight" not in shapes:
        renames[r"^lm_head\."] = "transformer.wte."  # one tensor under two names is saved under one of them
    record = Record("DiffuGPT", {}, renames, [r"\.attn\.(masked_)?bias$"])
    taken = {name: fields.take(name) for name in GPT2_FIELDS if config.get(name) is not None}
    for name in (*GPT2_UNREAD, "vocab_size"):
        fields.take(name)
    mask_token_id = fields.take("mask_token_id", 50257)
    fields.finish(ignored)
    embedding, is_tied = _embedding(record, shapes, "transformer.wte.weight")
    body = GPT2Config(vocab_size=embedding[0], tie_word_embeddings=is_tied, **taken)
    return LanguageModel(record, GPT2LMHeadModel, body, mask_token_id, -1)


def _mdlm(config: dict[str, Any], shapes: Shapes, ignored: Iterable[str]) -> LanguageModel:
    """MDLM: a network of its own, with the mask as its last token."""
    fields = Fields(config, "MDLM")
    record = Record("MDLM", {}, MDLM_RENAMES, [r"rotary_emb\.inv_freq$"])
    _must("MDLM", "time_conditioning", fields.take("time_conditioning"), (None, False))
    fields.take("dropout")
    vocab_size = fields.need("vocab_size")
    body = MDLMConfig(
        vocab_size=vocab_size,
        hidden_size=fields.need("hidden_dim"),
        num_hidden_layers=fields.need("n_blocks"),
        num_attention_heads=fields.need("n_heads"),
        cond_dim=fields.need("cond_dim"),
        max_position_embeddings=fields.take("model_length", 1024),
    )
    mask_token_id = fields.take("mask_token_id", vocab_size - 1)
    fields.finish(ignored)
    return LanguageModel(record, MDLMForMaskedLM, body, mask_token_id, 0)


def _embedding(record: Record, shapes: Shapes, name: str = "model.embed_tokens.weight") -> tuple[tuple[int, ...], bool]:
    """Return the embedding's shape, and whether it is the head too: by the tensors that are there, not by what a file says."""
    renamed = {record.renamed(theirs): shape for theirs, shape in shapes.items()}
    if name not in renamed:
        raise ValueError(f"a folder of the format {record.format} must hold the embedding `{name}`, got none. Is it whole?")
    return renamed[name], "lm_head.weight" not in renamed


def _must(format_name: str, name: str, value: Any, allowed: tuple[Any, ...]) -> None:
    """Refuse a field whose value would make the body another one."""
    if value not in allowed:
        raise ValueError(
            f"`{name}` in config.json of the format {format_name} must be {allowed[-1]!r}, got {value!r}, whose network is not "
            "read here."
        )


READERS: dict[Any, Any] = {
    "Dream": _dream,
    "Fast_dLLM_Qwen": _fast_dllm,
    "sdar": _sdar,
    "a2d-qwen2": _a2d_qwen2,
    "a2d-qwen3": _a2d_qwen3,
    "llada": _llada,
    "mdlm": _mdlm,
}
WRAPPED: dict[Any, Any] = {"llama": _diffullama, "gpt2": _diffugpt}

"""Every refusal that needs a whole pair or a whole call, in one home: the entry, the doctor and the commands read it alike.

Letters: B batch, L prompt tokens, M columns of the mask. Knows what the loop cannot do; does nothing itself.
"""

from typing import Any

import torch
from transformers import Cache
from transformers import GenerationConfig
from transformers import LogitsProcessorList
from transformers.cache_utils import LinearAttentionLayer
from transformers.generation import EncoderNoRepeatNGramLogitsProcessor
from transformers.generation import EncoderRepetitionPenaltyLogitsProcessor
from transformers.generation import GenerationMode
from transformers.generation import PrefixConstrainedLogitsProcessor

from .cache import cache_of
from .cache import is_quantized
from .sampling import check_processors
from .speculation import MAX_TREE_BUDGET
from .text import Text

# They hold something for each row of the batch, and our rows come to them one by one.
BATCH_PROCESSORS = (
    EncoderNoRepeatNGramLogitsProcessor,
    EncoderRepetitionPenaltyLogitsProcessor,
    PrefixConstrainedLogitsProcessor,
)

SPECIAL_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")

# Rows by which embeddings are padded: to a multiple of a power of 2 that no model known to us exceeds.
MOST_PADDING = 1024


def check_pair(model: Any, network: Any) -> None:
    """Refuse a drafter that was not made for this target.

    Args:
        model (`transformers.PreTrainedModel`): the target.
        network (`SpecDiffDrafter`): the drafter's.

    Raises:
        TypeError: if it is another kind of object.
        ValueError: if the two do not fit.
    """
    config: Any = getattr(network, "config", None)
    if getattr(config, "model_type", None) != "specdiff":
        raise TypeError(
            f"`assistant_model` must be a SpecDiffDrafter or an object with `draft` and `target_layer_ids`, got "
            f"{type(network).__name__}. Load drafters of any format with hf_specdiff.load_drafter(source, target=model), and "
            "pass other assistants to model.generate."
        )
    check_target(model)
    target_config = model.config.get_text_config()
    check_vocabulary(target_config, config)
    for name in SPECIAL_IDS:
        check_special_id(name, target_config, config)
    check_layers(target_config, config)
    check_width(target_config, config)
    if config.target_layer_ids is not None and model.get_output_embeddings() is None:
        raise ValueError(f"`model` must have a language-modelling head, got {type(model).__name__}.")


def check_target(model: Any) -> None:
    """Refuse what is no decoder-only language model.

    Args:
        model (`transformers.PreTrainedModel`): the target.

    Raises:
        ValueError: if so.
    """
    if model.config.is_encoder_decoder:
        raise ValueError(f"`model` must be a decoder-only language model, got {type(model).__name__}.")


def check_vocabulary(target_config: Any, config: Any) -> None:
    """Refuse a drafter that could draft a token which the target does not have.

    A target may have more: rows that only pad its embedding. A token that the drafter does not know is never drafted. A target
    that has many more is another one than the drafter was made for. A language model may have rows of padding of its own, which
    it never drafts.

    Args:
        target_config (`PreTrainedConfig`): of the target's text model.
        config (`SpecDiffConfig`): the drafter's.

    Raises:
        ValueError: if so.
    """
    has_own = config.has_own_embedding or config.has_own_head or config.draft_vocab_size is not None
    missing = target_config.vocab_size - config.vocab_size
    fewest = -MOST_PADDING if is_language_model(config) else 0
    if not fewest <= missing <= (0 if has_own else MOST_PADDING):
        raise ValueError(
            f"`assistant_model` must have the target's vocabulary of {target_config.vocab_size} tokens, or it without at most "
            f"{MOST_PADDING} rows of padding, got {config.vocab_size}. Use a drafter that was made for this target."
        )


def check_special_id(name: str, target_config: Any, config: Any) -> None:
    """Refuse a token-conditioned drafter with another special id: it was made for another tokenizer.

    It decides nothing for a feature-conditioned one, which reads the target's states and borrows its embedding, nor for a
    language model of its own, which may end its texts in another way.

    Args:
        name (`str`): of `SPECIAL_IDS`.
        target_config (`PreTrainedConfig`): of the target's text model.
        config (`SpecDiffConfig`): the drafter's.

    Raises:
        ValueError: if so.
    """
    if config.target_layer_ids is not None or is_language_model(config):
        return
    own, theirs = getattr(config, name, None), getattr(target_config, name, None)
    if own != theirs:
        raise ValueError(
            f"`assistant_model` must have the target's `{name}` {theirs}, got {own}. Use a drafter that was made for this "
            "target, or correct the drafter's config."
        )


def is_language_model(config: Any) -> bool:
    """Return whether a drafter is a diffusion language model, which was made for a tokenizer and for no target."""
    return bool(getattr(config, "is_language_model", False))


def check_layers(target_config: Any, config: Any) -> None:
    """Refuse a feature-conditioned drafter that reads layers which the target does not have.

    Args:
        target_config (`PreTrainedConfig`): of the target's text model.
        config (`SpecDiffConfig`): the drafter's.

    Raises:
        ValueError: if so.
    """
    if config.target_layer_ids is None:
        return
    if max(config.target_layer_ids) >= target_config.num_hidden_layers:
        raise ValueError(
            f"`assistant_model` must read layers that the target has (0 to {target_config.num_hidden_layers - 1}), got "
            f"`target_layer_ids` {config.target_layer_ids}. Use a drafter that was made for this target."
        )


def check_width(target_config: Any, config: Any) -> None:
    """Refuse a feature-conditioned drafter that reads states of another width than the target's.

    Args:
        target_config (`PreTrainedConfig`): of the target's text model.
        config (`SpecDiffConfig`): the drafter's.

    Raises:
        ValueError: if so.
    """
    width = config.target_hidden_size or config.hidden_size
    if config.target_layer_ids is not None and width != target_config.hidden_size:
        raise ValueError(
            f"`assistant_model` must read states of the target's `hidden_size` {target_config.hidden_size}, got "
            f"{width}. Use a drafter that was made for this target."
        )


def check_cache_name(name: str | None) -> None:
    """Refuse caches that the host cannot give us, before it fails on them.

    Args:
        name (`str`, *optional*): the call's `cache_implementation`.

    Raises:
        ValueError: for paged caches, which the host hands to another loop; for static ones that are offloaded; and for
            offloaded ones on a machine without an accelerator.
    """
    if name == "paged":
        raise ValueError(
            "`cache_implementation` must be a cache of one call, got 'paged', with which the host takes a loop of its own. "
            "Leave the argument out, or use plain model.generate."
        )
    if name is not None and name.startswith("offloaded") and not torch.accelerator.is_available():
        raise ValueError(
            f"`cache_implementation` must keep the cache where the model is, got {name!r}, and this machine has no "
            "accelerator to offload from. Leave the argument out."
        )
    if name == "offloaded_static":
        raise ValueError(
            "`cache_implementation` must not be 'offloaded_static', got it: accepted keys are moved within a cache that may "
            "be on its way to another device. Pass 'offloaded' or 'static'."
        )


def check_call(
    input_ids: torch.Tensor,
    processors: LogitsProcessorList,
    config: GenerationConfig,
    model_kwargs: dict[str, Any],
    streamer: Any | None,
) -> None:
    """Refuse what the loop does not do, before any pass; the host has merged all settings by now.

    Args:
        input_ids (`torch.Tensor` of shape `(B, L)`, int64): the prompts.
        processors (`LogitsProcessorList`): what `generate` built.
        config (`GenerationConfig`): the call's, merged.
        model_kwargs (`dict[str, Any]`): what `generate` prepared: cache, mask, positions.
        streamer (`BaseStreamer`, *optional*): the caller's.

    Raises:
        ValueError: if the call asks for it.
    """
    if config.num_beams > 1:
        raise ValueError(f"`num_beams` must be 1, got {config.num_beams}. Use plain model.generate for beam search.")
    mode = config.get_generation_mode()
    if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        raise ValueError(
            f"`generation_config` must ask for greedy decoding or sampling, got {mode.value}. Use plain model.generate for it, "
            "or clear the settings that ask for it."
        )
    if input_ids.shape[0] > 1 and streamer is not None:
        raise ValueError(
            f"`streamer` must be None for several sequences, got one for {input_ids.shape[0]}. Rows of a batch grow at "
            "different paces, so there is no order to stream them in."
        )
    if input_ids.shape[1] == 0:
        raise ValueError(
            "`input_ids` must hold at least one token, got an empty prompt (`inputs_embeds` cannot be drafted from)."
        )
    if not model_kwargs.get("use_cache", True):
        raise ValueError(
            "`use_cache` must be True, got False from this call or the model's own config. Rounds build on the keys and values "
            "of the committed text: pass use_cache=True."
        )
    cache = cache_of(model_kwargs)
    if cache is None:
        raise ValueError(
            "`model` must keep a cache that `generate` prepares, got none: this one keeps its text in a form of its own, from "
            "which no token can be taken back. Use plain model.generate for it."
        )
    if config.cache_implementation != "static":  # which the host made and `StaticTarget` replaces
        check_can_roll_back(cache)
    if config.output_attentions:
        raise ValueError("`output_attentions` must be False, got True. Use plain model.generate for it.")
    if config.assistant_ensemble_weight is not None:
        raise ValueError(
            f"`assistant_ensemble_weight` must be None, got {config.assistant_ensemble_weight}: it would mix the drafter's law "
            "into the target's. Leave it out."
        )
    check_processors(processors)


def check_stop_strings(model: Any, stop_strings: Any | None, tokenizer: Any | None) -> None:
    """Refuse stop strings without their tokenizer.

    Args:
        model (`transformers.PreTrainedModel`): the target; its own generation config may hold some.
        stop_strings (`str` or `list[str]`, *optional*): of this call.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): of this call.

    Raises:
        ValueError: if there are any.
    """
    if stop_strings is None and model.generation_config.stop_strings is not None:
        raise ValueError(
            f"`stop_strings` must be passed to this call, got {model.generation_config.stop_strings!r} in "
            "model.generation_config, whose tokenizer a custom loop is never handed. "
            "Set that one to None and pass stop_strings= and tokenizer= here."
        )
    if stop_strings is not None and tokenizer is None:
        raise ValueError(f"`tokenizer` must be given together with `stop_strings`, got stop_strings={stop_strings!r} alone.")


def check_profile(profile: Any | None, *, is_adaptive: bool) -> None:
    """Refuse a profile that nothing would read.

    Args:
        profile (`Profile` or path, *optional*): the caller's.
        is_adaptive (`bool`): whether the size of drafts follows the machine.

    Raises:
        ValueError: if so.
    """
    if profile is not None and not is_adaptive:
        raise ValueError("`profile` must be None unless `gamma` or `tree_budget` is 'auto', got one. Leave it out.")


def check_processes(model: Any, profile: Any | None, *, is_adaptive: bool) -> None:
    """Refuse sizes that follow the clock where several processes run one model, each with a clock of its own.

    Args:
        model (`transformers.PreTrainedModel`): the target; by tensor parallelism every process runs a part of it.
        profile (`Profile` or path, *optional*): the caller's, with which no clock is read.
        is_adaptive (`bool`): whether the size of drafts follows the machine.

    Raises:
        ValueError: if so: processes would wait for each other in passes of different sizes.
    """
    num_processes = getattr(model, "tp_size", None) or 1
    if num_processes > 1 and is_adaptive and profile is None:
        raise ValueError(
            f"`gamma` and `tree_budget` must be numbers for a target that is split over {num_processes} processes, got 'auto', "
            "with which each would go by its own clock. Pass gamma=, and tree_budget= for trees, or a profile."
        )


def check_can_roll_back(cache: Cache) -> None:
    """Refuse a cache from which rejected tokens cannot be taken back.

    Args:
        cache (`transformers.Cache`): the target's cache, as `generate` prepared it.

    Raises:
        ValueError: if the cache is compiled, quantized in a way unknown to us, or of a class that says so. (What a layer holds
            is seen after the prefill only.)
    """
    name = type(cache).__name__
    if getattr(type(cache), "is_croppable", True) is False:
        raise ValueError(
            f"`past_key_values` must be a cache whose tokens can be taken back, got a {name}, which says that it cannot. "
            "Use plain model.generate for it."
        )
    # A cache that holds nothing but running states always says that it can be compiled.
    is_all_state = all(isinstance(layer, LinearAttentionLayer) for layer in getattr(cache, "layers", []))
    if (getattr(cache, "is_compileable", False) and not is_all_state) or "Static" in name:
        raise ValueError(
            f"`past_key_values` must be a dynamic cache, got {name}. Leave it out, and pass cache_implementation='static' for "
            "a static cache, which is then made as long as drafts need it."
        )
    layers = {type(layer).__name__ for layer in getattr(cache, "layers", [])}
    refused = sorted(layer for layer in layers if "Quantized" in layer)
    if (refused or "Quantized" in name) and not is_quantized(cache):
        raise ValueError(
            f"`past_key_values` must be a cache whose tokens can be taken back, got {name} with layers "
            f"{refused or sorted(layers)}. Leave the argument out, or pass a DynamicCache."
        )


def check_rotary(config: Any, prompt_length: int, max_length: int | None) -> None:
    """Refuse rotary embeddings whose frequencies follow the longest position of a pass, where drafted tokens would change them.

    Args:
        config (`PreTrainedConfig`): of the text model.
        prompt_length (`int`): tokens of the prompt.
        max_length (`int`, *optional*): most tokens of the finished text.

    Raises:
        ValueError: if the text may come to where they change.
    """
    parameters = getattr(config, "rope_parameters", None) or {}
    kinds = [parameters] if "rope_type" in parameters else [value for value in parameters.values() if isinstance(value, dict)]
    for kind in kinds:
        if kind.get("rope_type") not in ("dynamic", "longrope"):
            continue  # such a model need not even have a limit
        limit = kind.get("original_max_position_embeddings") or getattr(config, "original_max_position_embeddings", None)
        limit = limit or config.max_position_embeddings
        # "longrope" changes once, "dynamic" with every token past the limit.
        changes = kind["rope_type"] == "dynamic" or prompt_length <= limit
        if changes and (max_length is None or max_length > limit):
            raise ValueError(
                f"`max_new_tokens` must end the text within {limit} tokens for a model whose rotary frequencies change there "
                f"(rope type {kind['rope_type']!r}), got a limit of {max_length} in all. Drafted tokens would change them "
                "early, and so the text. Pass fewer, or use plain model.generate."
            )


def check_batch(
    text: Text,
    obstacle: str | None,
    processors: LogitsProcessorList,
    config: GenerationConfig,
    *,
    rows_end_apart: bool,
    pads: bool,
) -> None:
    """Refuse batches whose rows could not be decoded as if they were alone.

    Args:
        text (`Text`): the prompts.
        obstacle (`str`, *optional*): why the target can neither keep rows apart in one pass nor read them one by one.
        processors (`LogitsProcessorList`): what `generate` built.
        config (`GenerationConfig`): the call's, merged.
        rows_end_apart (`bool`): whether a criterion of the caller's may end one row before another.
        pads (`bool`): whether the host writes padding in rows that have ended: not without an end token.

    Raises:
        ValueError: if so; also for a single prompt that is padded on the right.
    """
    mask = text.prompt_mask
    if mask is not None and bool((mask[:, -1] == 0).any()):
        raise ValueError(
            "`attention_mask` must pad on the left, got padding at the end of a prompt. Set tokenizer.padding_side = 'left'."
        )
    if text.num_rows == 1:
        return
    if obstacle is not None:
        raise ValueError(
            f"`input_ids` must be one sequence and `num_return_sequences` 1 for this call, got {text.num_rows} sequences: "
            f"{obstacle}. Call generate once for each prompt."
        )
    for processor in processors:
        if isinstance(processor, BATCH_PROCESSORS):
            raise ValueError(
                f"`logits_processor` must read one row at a time, got {type(processor).__name__}, which knows its rows by "
                "their place in the batch. Call generate once for each prompt."
            )
    if rows_end_apart and not pads:
        raise ValueError(
            "`eos_token_id` must be given when a criterion can end rows at different tokens, got None: plain model.generate "
            "would write on in rows that have ended. Pass eos_token_id=tokenizer.eos_token_id, or -1 for one that never comes."
        )
    if rows_end_apart and config.pad_token_id is None:
        raise ValueError(
            "`pad_token_id` must be given when rows can end at different tokens, got None. Pass "
            "pad_token_id=tokenizer.pad_token_id."
        )


def check_not_offloaded(cache: Any) -> None:
    """Refuse an offloaded cache for a model with a running state, whose states may be on their way when they are to be kept.

    Args:
        cache (`transformers.Cache`): the target's.

    Raises:
        ValueError: if so.
    """
    if getattr(cache, "offloading", False):
        raise ValueError(
            "`cache_implementation` must not be 'offloaded' for a model with a running state, got an offloaded cache. Leave "
            "the argument out: states are small, whatever the length of the text."
        )


def check_chains(obstacle: str | None) -> None:
    """Refuse a model that does not verify drafted tokens as it decodes them one by one.

    Args:
        obstacle (`str`, *optional*): why it does not.

    Raises:
        ValueError: if there is one.
    """
    if obstacle is not None:
        raise ValueError(
            f"`model` must give drafted tokens in one pass the logits that it gives them one by one, but {obstacle}. "
            "Use plain model.generate for it."
        )


def check_window(window: int, obstacle: str, max_length: int | None) -> None:
    """Refuse a text longer than a window that exists by the cache's dropping alone, where no mask of ours can stand in.

    Args:
        window (`int`): tokens that the cache keeps.
        obstacle (`str`): why there is no mask of ours.
        max_length (`int`, *optional*): most tokens of the finished text.

    Raises:
        ValueError: if so.
    """
    if max_length is None or max_length > window:
        raise ValueError(
            f"`max_new_tokens` must end the text within {window} tokens for this model, whose window is only what its cache "
            f"drops, got a limit of {max_length} in all: drafted tokens would see past it, and {obstacle}. Pass fewer, or use "
            "plain model.generate."
        )


def why_call_not_masked(config: Any, model_kwargs: dict[str, Any], own_cache: Any | None, max_length: int | None) -> str | None:
    """Return why a call cannot be verified with masks of ours, which trees and batches need, whatever its model can do.

    Args:
        config (`PreTrainedConfig`): of the text model.
        model_kwargs (`dict[str, Any]`): what `generate` prepared: cache, mask, positions.
        own_cache (`transformers.Cache`, *optional*): the caller's.
        max_length (`int`, *optional*): most tokens of the finished text.

    Returns:
        `str`, *optional*: the reason.
    """
    cache = cache_of(model_kwargs)
    if own_cache is not None and any(getattr(layer, "is_sliding", False) for layer in cache.layers):
        return "the `past_key_values` that were passed have sliding layers, which drop tokens by count"
    if getattr(cache, "offloading", False):
        return "the cache is offloaded"
    if is_quantized(cache):
        return "the cache is quantized"
    # Llama 4 scales its queries by the slot of the cache, in steps (transformers 5.23): a branch stands in later slots than the
    # text it stands for, so no slot of a tree may reach the first step.
    step = getattr(config, "floor_scale", None) if getattr(config, "attn_temperature_tuning", False) else None
    if step and (max_length is None or cache.get_seq_length() + max_length + MAX_TREE_BUDGET >= step):
        return f"the model scales attention by slots of the cache, from {step} on, which branches may reach before the text"
    return None

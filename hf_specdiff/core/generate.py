"""The entry: every argument of `model.generate`, checked once, then the host's own preparation and our loop.

Knows the host's `generate` and how it calls a custom loop. Imports no modelling file: a drafter object is passed in, and one
loaded from the Hub is of another class than the installed one. This file is also a Hub repository's
`custom_generate/generate.py`.
"""

from copy import deepcopy
from dataclasses import replace
from typing import Any

import torch
from transformers import GenerationConfig
from transformers import GenerationMixin
from transformers import LogitsProcessorList
from transformers import StoppingCriteriaList
from transformers import StopStringCriteria
from transformers.generation import EncoderNoRepeatNGramLogitsProcessor
from transformers.generation import EncoderRepetitionPenaltyLogitsProcessor
from transformers.generation import GenerateDecoderOnlyOutput
from transformers.generation import GenerationMode
from transformers.generation import PrefixConstrainedLogitsProcessor
from transformers.generation import SynthIDTextWatermarkLogitsProcessor
from transformers.generation import UnbatchedClassifierFreeGuidanceLogitsProcessor

from .budget import Budget
from .cache import check_can_roll_back
from .conditioning import make_drafter
from .decoding import run
from .inference import inference
from .inference import ordinary
from .masked_target import MaskedTarget
from .masked_target import why_not_masked
from .profiling import learn
from .profiling import profile_of
from .speculation import SPECULATION_ARGUMENTS
from .speculation import check_prompt
from .speculation import resolve_speculation
from .stopping import StopCheck
from .target import Target
from .target import check_rotary
from .text import Text

# They carry a state from call to call that rejected tokens would spoil.
STATEFUL_PROCESSORS = (SynthIDTextWatermarkLogitsProcessor, UnbatchedClassifierFreeGuidanceLogitsProcessor)
# They hold something for each row of the batch, and our rows come to them one by one.
BATCH_PROCESSORS = (
    EncoderNoRepeatNGramLogitsProcessor,
    EncoderRepetitionPenaltyLogitsProcessor,
    PrefixConstrainedLogitsProcessor,
)


def generate(
    model: Any, inputs: torch.Tensor | None = None, *, assistant_model: Any = None, **kwargs: Any
) -> GenerateDecoderOnlyOutput | torch.Tensor:
    """Generate what `model.generate` would, several times faster.

    Args:
        model (`transformers.PreTrainedModel`): the target, a decoder-only language model that can take tokens back.
        inputs (`torch.Tensor` of shape `(B, L)`, int64, *optional*): the prompts, padded on the left; or `input_ids`, as for
            `model.generate`.
        assistant_model (`SpecDiffDrafter`): the drafter, made for this target.
        **kwargs: all arguments of `model.generate`, and those of speculation, each with the drafter's own default:
            `gamma` (`int`): tokens drafted per round, by default `block_size - 1`; `"auto"`: as many as pay on this machine
            (also for a tree's nodes);
            `num_denoising_steps` (`int`): drafter passes per round, by default 1;
            `reveal_order` (`str`): `"confidence"` (default) or `"left_to_right"`, for more than one denoising step;
            `draft_shape` (`str`): `"chain"`, `"samples"`, `"tree"` or `"auto"` (default: a tree where the model takes one);
            `num_drafts` (`int`): joint drafts of the shape `"samples"`, by default 8;
            `tree_budget` (`int`): nodes of the shape `"tree"`, by default 32; `"auto"`: as many as pay on this machine;
            `profile` (`Profile` or path, *optional*): what passes cost, for `"auto"`; by default measured once and kept in the
            user's cache;
            `draft_temperature` (`float`): of the draft distribution; 0 drafts the most probable tokens; by default 1.0, but
            `"auto"` for the drawn children of a tree: round by round what agreed best with the target so far;
            `acceptance` (`str`): `"match"`, `"ratio"`, `"block"`, `"self_selection"` or `"auto"` (default: the rule that
            accepts most).

    Returns:
        What `model.generate` returns. With `return_dict_in_generate=True` the output also has `.speculation`, a
        `SpeculationStats`. Batches return no `past_key_values`: rows leave the cache when they end.

    Raises:
        TypeError: if `assistant_model` is no drafter.
        ValueError: if target and drafter do not fit, or an argument is out of range or would not be lossless; for beams, for
            models whose state cannot be rolled back, and for batches of models that take no mask of ours.

    Lossless when: always; what is known not to be is refused, and whether a model reads masks of ours is tried. Greedy tokens
    equal `model.generate`'s in float32; in lower precision near-ties can flip, as they do between any two batch shapes.
    Processors and criteria must be functions of ids and scores.
    """
    if getattr(getattr(model, "config", None), "model_type", None) == "specdiff":
        # A drafter loaded from a Hub repository that also holds this file gets it as its `generate`.
        return type(model).generate(model, inputs, **kwargs)
    check_pair(model, assistant_model)
    prompt = inputs if inputs is not None else kwargs.get("input_ids")
    if prompt is not None:
        check_prompt(prompt, assistant_model.config.mask_token_id)
    arguments = _pop_speculation(kwargs)
    profile = kwargs.pop("profile", None)
    own_cache = kwargs.get("past_key_values")
    streamer = kwargs.pop("streamer", None)
    kwargs = _with_stop_strings(model, kwargs)

    # The host hands a callable only the arguments that it names, and drops `assistant_model` and `streamer`, so they are bound
    # here (transformers 5.17 to 5.23).
    def speculative_loop(
        model: Any,
        input_ids: torch.Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        **model_kwargs: Any,
    ) -> GenerateDecoderOnlyOutput | torch.Tensor:
        _check_call(input_ids, logits_processor, generation_config, model_kwargs, streamer)
        check_rotary(model.config.get_text_config(), input_ids.shape[1], generation_config.max_length)
        speculation = resolve_speculation(
            arguments,
            assistant_model,
            do_sample=generation_config.do_sample,
            why_no_tree=lambda: _why_no_masks(model, input_ids, model_kwargs, own_cache),
        )
        if profile is not None and not speculation.is_adaptive:
            raise ValueError("`profile` must be None unless `gamma` or `tree_budget` is 'auto', got one. Leave it out.")
        text = Text.of_prompt(input_ids, model_kwargs.get("attention_mask"))
        stop = StopCheck(stopping_criteria, text.num_rows, keep_scores=_wants(generation_config, "output_scores"))
        obstacle = _why_no_masks(model, input_ids, model_kwargs, own_cache) if text.num_rows > 1 else None
        _check_batch(text, obstacle, logits_processor, generation_config, stop)
        # A greedy target meets every draft by match, so there is nothing to draw for another rule.
        drafting = speculation if generation_config.do_sample else replace(speculation, acceptance="match")
        drafter = make_drafter(assistant_model, model, drafting, logits_processor, generation_config.max_length)
        needs_masks = text.num_rows > 1 or speculation.draft_shape != "chain"
        target_class = MaskedTarget if needs_masks else Target
        callbacks = [*logits_processor, *stopping_criteria, streamer]
        with inference([model, assistant_model], callbacks, own_cache):
            if speculation.is_adaptive:
                measured = profile_of(model, assistant_model, speculation, input_ids.device, profile)
                draws_children = drafting.draft_shape == "tree" and drafting.acceptance == "ratio"
                drafter.budget = Budget(measured, text.num_rows, draws_children=draws_children)
            target = target_class(model, generation_config, model_kwargs, drafter.target_layer_ids)
            output = run(target, drafter, speculation, stop, logits_processor, text, streamer)
        if drafter.budget is not None and profile is None:
            learn(model, assistant_model, speculation, drafter.budget.calibration.factors)
        output = ordinary(output)
        return output if generation_config.return_dict_in_generate else output.sequences

    return GenerationMixin.generate(model, inputs, streamer=streamer, custom_generate=speculative_loop, **kwargs)


def _pop_speculation(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Take the arguments of speculation out of `kwargs`, or find them on the generation config that was passed."""
    config = kwargs.get("generation_config")
    found = {name: getattr(config, name, None) for name in SPECULATION_ARGUMENTS}
    return found | {name: kwargs.pop(name) for name in SPECULATION_ARGUMENTS if name in kwargs}


def check_pair(model: Any, drafter: Any) -> None:
    """Refuse a drafter that was not made for this target.

    Args:
        model (`transformers.PreTrainedModel`): the target.
        drafter (`SpecDiffDrafter`): the drafter.

    Raises:
        TypeError: if `drafter` is none.
        ValueError: if the two do not fit, or the target cannot take tokens back.
    """
    config: Any = getattr(drafter, "config", None)
    if getattr(config, "model_type", None) != "specdiff":
        raise TypeError(
            f"`assistant_model` must be a SpecDiffDrafter, got {type(drafter).__name__}. Load one with "
            "AutoModelForCausalLM.from_pretrained after `import hf_specdiff`, or pass other assistants to model.generate."
        )
    if model.config.is_encoder_decoder:
        raise ValueError(f"`model` must be a decoder-only language model, got {type(model).__name__}.")
    if getattr(model, "_is_stateful", False):
        raise ValueError(
            f"`model` must be able to take tokens back, got {type(model).__name__}, which keeps a recurrent state. "
            "Use plain model.generate for it."
        )
    target_config = model.config.get_text_config()
    if config.vocab_size != target_config.vocab_size:
        raise ValueError(
            f"`assistant_model` must have the target's vocabulary of {target_config.vocab_size} tokens, got "
            f"{config.vocab_size}. Use a drafter that was made for this target."
        )
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        own, theirs = getattr(config, name, None), getattr(target_config, name, None)
        if own != theirs:
            raise ValueError(
                f"`assistant_model` must have the target's `{name}` {theirs}, got {own}. Use a drafter that was made for this "
                "target, or correct the drafter's config."
            )
    _check_layers(model, target_config, config)


def _check_layers(model: Any, target_config: Any, config: Any) -> None:
    """Refuse a feature-conditioned drafter whose layers or width the target does not have."""
    if config.target_layer_ids is None:
        return
    if max(config.target_layer_ids) >= target_config.num_hidden_layers:
        raise ValueError(
            f"`assistant_model` must read layers that the target has (0 to {target_config.num_hidden_layers - 1}), got "
            f"`target_layer_ids` {config.target_layer_ids}. Use a drafter that was made for this target."
        )
    if config.hidden_size != target_config.hidden_size:
        raise ValueError(
            f"`assistant_model` must have the target's `hidden_size` {target_config.hidden_size} to borrow its embedding, got "
            f"{config.hidden_size}. Use a drafter that was made for this target."
        )
    if model.get_output_embeddings() is None:
        raise ValueError(f"`model` must have a language-modelling head, got {type(model).__name__}.")


def _check_call(
    input_ids: torch.Tensor,
    processors: LogitsProcessorList,
    config: GenerationConfig,
    model_kwargs: dict[str, Any],
    streamer: Any | None,
) -> None:
    """Refuse what the loop does not do, before any pass; the host has merged all settings by now."""
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
    if not model_kwargs.get("use_cache", True) or model_kwargs.get("past_key_values") is None:
        raise ValueError("`use_cache` must be True, got False. Rounds build on the keys and values of the committed text.")
    check_can_roll_back(model_kwargs["past_key_values"])
    if config.output_attentions:
        raise ValueError("`output_attentions` must be False, got True. Use plain model.generate for it.")
    for processor in processors:
        if isinstance(processor, STATEFUL_PROCESSORS):
            raise ValueError(
                f"`logits_processor` must be functions of ids and scores, got {type(processor).__name__}, which keeps a state "
                "that rejected tokens would spoil. Leave its setting out or use plain model.generate."
            )


def _why_no_masks(model: Any, input_ids: torch.Tensor, model_kwargs: dict[str, Any], own_cache: Any | None) -> str | None:
    """Return why this call cannot verify with masks of ours, which trees and batches need; `None` if it can."""
    cache = model_kwargs["past_key_values"]
    if own_cache is not None and any(getattr(layer, "is_sliding", False) for layer in cache.layers):
        return "the `past_key_values` that were passed have sliding layers, which drop tokens by count"
    if getattr(cache, "offloading", False):
        return "the cache is offloaded"
    if not _are_places(model_kwargs.get("position_ids"), model_kwargs.get("attention_mask")):
        return "its `position_ids` are not the tokens' places in the text"
    return why_not_masked(model, input_ids.device)


def _are_places(positions: torch.Tensor | None, mask: torch.Tensor | None) -> bool:
    """Return whether positions `(B, n)` count the tokens of the text that are no padding, as they do by default."""
    if positions is None:
        return True
    if positions.dim() != 2:
        return False
    if mask is None:
        mask = torch.ones_like(positions)
    num_new = positions.shape[1]
    places = (mask.cumsum(dim=1) - 1)[:, -num_new:]
    return bool(((positions == places) | (mask[:, -num_new:] == 0)).all())


def _check_batch(
    text: Text, obstacle: str | None, processors: LogitsProcessorList, config: GenerationConfig, stop: StopCheck
) -> None:
    """Refuse batches whose rows could not be decoded as if they were alone."""
    mask = text.prompt_mask
    if mask is not None and bool((mask[:, -1] == 0).any()):
        raise ValueError(
            "`attention_mask` must pad on the left, got padding at the end of a prompt. Set tokenizer.padding_side = 'left'."
        )
    if text.num_rows == 1:
        return
    if obstacle is not None:
        raise ValueError(
            f"`input_ids` must be one sequence and `num_return_sequences` 1 for this model, got {text.num_rows} sequences: "
            f"{obstacle}. Call generate once for each prompt."
        )
    for processor in processors:
        if isinstance(processor, BATCH_PROCESSORS):
            raise ValueError(
                f"`logits_processor` must read one row at a time, got {type(processor).__name__}, which knows its rows by "
                "their place in the batch. Call generate once for each prompt."
            )
    if stop.others and config.pad_token_id is None:
        raise ValueError(
            "`pad_token_id` must be given when rows can end at different tokens, got None. Pass "
            "pad_token_id=tokenizer.pad_token_id."
        )


def _wants(config: GenerationConfig, name: str) -> bool:
    """Return whether the output shall hold something that only a dictionary can."""
    return bool(config.return_dict_in_generate and getattr(config, name))


def _with_stop_strings(model: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Turn `stop_strings` into the host's criterion: a custom loop is never handed the tokenizer that they need."""
    tokenizer = kwargs.pop("tokenizer", None)
    config = kwargs.get("generation_config")
    stop_strings = kwargs.pop("stop_strings", None)
    if stop_strings is None and config is not None and config.stop_strings is not None:
        kwargs["generation_config"] = config = deepcopy(config)
        stop_strings, config.stop_strings = config.stop_strings, None
    if stop_strings is None and model.generation_config.stop_strings is not None:
        raise ValueError(
            f"`stop_strings` must be passed to this call, got {model.generation_config.stop_strings!r} in "
            "model.generation_config, whose tokenizer a custom loop is never handed. "
            "Set that one to None and pass stop_strings= and tokenizer= here."
        )
    if stop_strings is None:
        return kwargs
    if tokenizer is None:
        raise ValueError(f"`tokenizer` must be given together with `stop_strings`, got stop_strings={stop_strings!r} alone.")
    criteria = StoppingCriteriaList(kwargs.get("stopping_criteria") or [])
    criteria.append(StopStringCriteria(tokenizer, stop_strings))
    return {**kwargs, "stopping_criteria": criteria}

"""The entry: every argument of `model.generate`, checked once, then the host's own preparation and our loop.

Knows the host's `generate` and how it calls a custom loop. Imports no modelling file: a drafter object is passed in, and one
loaded from the Hub is of another class than the installed one. This file is also a Hub repository's
`custom_generate/generate.py`.
"""

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import replace
from typing import Any

import torch
from transformers import GenerationConfig
from transformers import GenerationMixin
from transformers import LogitsProcessorList
from transformers import StoppingCriteriaList
from transformers import StopStringCriteria
from transformers.generation import GenerateDecoderOnlyOutput

from .budget import Budget
from .cache import cache_of
from .checks import check_batch
from .checks import check_cache_name
from .checks import check_call
from .checks import check_chains
from .checks import check_not_offloaded
from .checks import check_pair
from .checks import check_processes
from .checks import check_profile
from .checks import check_rotary
from .checks import check_stop_strings
from .checks import check_target
from .checks import why_call_not_masked
from .conditioning import make_drafter
from .copies import Copies
from .decoding import run
from .drafters import Drafter
from .inference import inference
from .inference import ordinary
from .own_drafter import OwnDrafter
from .own_drafter import check_own_drafter
from .own_drafter import is_own_drafter
from .profiling import learn
from .profiling import profile_of
from .rowwise_target import why_not_divided
from .shapes import DraftShaper
from .speculation import SPECULATION_ARGUMENTS
from .speculation import SpeculationConfig
from .speculation import names_size
from .speculation import own_speculation
from .speculation import resolve_speculation
from .stateful_target import is_stateful
from .static_drafter import compile_drafter
from .static_target import StaticTarget
from .stopping import StopCheck
from .target import Target
from .targets import make_target
from .targets import wants_passes
from .text import Text
from .text import check_prompt
from .trial import why_not_chained
from .trial import why_not_masked


def generate(
    model: Any, inputs: torch.Tensor | None = None, *, assistant_model: Any = None, **kwargs: Any
) -> GenerateDecoderOnlyOutput | torch.Tensor:
    """Generate what `model.generate` would, several times faster.

    Args:
        model (`transformers.PreTrainedModel`): the target, a decoder-only language model.
        inputs (`torch.Tensor` of shape `(B, L)`, int64, *optional*): the prompts, padded on the left; or `input_ids`, as for
            `model.generate`.
        assistant_model (`SpecDiffDrafter` or `Drafter`): the drafter, made for this target; or any object with `draft` and
            `target_layer_ids`, with which of the arguments of speculation only `draft_shape` and `acceptance` go.
        **kwargs: all arguments of `model.generate`, and those of speculation, each with the drafter's own default:
            `gamma` (`int`): tokens drafted per round; `"auto"`: at most `block_size - 1`, round by round as many as pay on this
            machine (also of a tree's nodes). The default, as that of `tree_budget`, unless the drafter names a measured size of
            its own in its generation config: then the whole window;
            `num_denoising_steps` (`int`): drafter passes per round, by default 1; more are experimental (not measured);
            `reveal_order` (`str`): `"confidence"` (default) or `"left_to_right"`, for several denoising steps (experimental);
            `draft_shape` (`str`): `"chain"`, `"samples"`, `"tree"` or `"auto"` (default: a tree where the model takes one);
            `num_drafts` (`int`): joint drafts of the shape `"samples"`, by default 8;
            `tree_budget` (`int`): nodes of the shape `"tree"`; `"auto"`, the default as of `gamma`: as many as pay;
            `profile` (`Profile` or path, *optional*): what passes cost, for `"auto"`; by default measured once, for 2 seconds
            or 20 plain steps, kept in the user's cache, and corrected by what rounds take. With a given profile no clock is
            read, and a seed gives the same sampled text again;
            `draft_temperature` (`float`): of the draft distribution; 0 drafts the most probable tokens; by default 1.0, but
            `"auto"` for the drawn children of a tree: round by round what agreed best with the target so far;
            `acceptance` (`str`): `"match"`, `"ratio"`, `"block"`, `"self_selection"` or `"auto"` (default: the rule that
            accepts most);
            `prompt_lookup_num_tokens` (`int`, *optional*): most tokens of a copied branch: what followed the last tokens where
            they stood before in the text is drafted too; 0, and the default of most drafters: nothing is copied;
            `max_matching_ngram_size` (`int`): the longest runs of last tokens that are looked up for it, by default 2.

    Returns:
        What `model.generate` returns. With `return_dict_in_generate=True` the output also has `.speculation`, a
        `SpeculationStats`. Rows of a batch whose model takes no mask of ours, or keeps a running state, are verified one after
        another: the log says so once. Batches return no `past_key_values`: rows leave the cache when they end. One that
        you pass in is left as `model.generate` leaves it.

    Raises:
        TypeError: if `assistant_model` is no drafter.
        ValueError: if target and drafter do not fit, or an argument is out of range or would not be lossless; for beams, and
            for models that read drafted tokens otherwise than one by one.

    Lossless when: always; what is known not to be is refused, and whether a model reads masks of ours is tried. Greedy tokens
    equal `model.generate`'s in float32; in lower precision near-ties can flip, as they do between any two batch shapes.
    Processors and criteria must be functions of ids and scores.
    """
    if getattr(getattr(model, "config", None), "model_type", None) == "specdiff":
        # A drafter loaded from a Hub repository that also holds this file gets it as its `generate`.
        return type(model).generate(model, inputs, **kwargs)
    is_own = is_own_drafter(assistant_model)
    if is_own:
        check_target(model)
    else:
        check_pair(model, assistant_model)
    prompt = inputs if inputs is not None else kwargs.get("input_ids")
    if prompt is not None and not is_own:
        check_prompt(prompt, assistant_model.config.mask_token_id, model.config.get_text_config().vocab_size)
    arguments = _pop_speculation(kwargs)
    check_cache_name(_setting(model, kwargs, "cache_implementation"))
    profile = kwargs.pop("profile", None)
    own_cache = cache_of(kwargs)
    streamer = kwargs.pop("streamer", None)
    kwargs = _with_stop_strings(model, kwargs)

    # The host hands a callable only the arguments that it names, and drops `assistant_model` and `streamer`, so they are bound
    # here (transformers 5.17 to 5.23).
    loop = SpeculativeLoop(assistant_model, arguments, profile, own_cache, streamer)
    return GenerationMixin.generate(model, inputs, streamer=streamer, custom_generate=loop, **kwargs)


class SpeculativeLoop:
    """What takes the place of the host's own loop for one call; the host has prepared and merged everything by then.

    Args:
        assistant_model (`SpecDiffDrafter` or `Drafter`): a network of ours, or a drafter of the caller's own.
        arguments (`dict[str, Any]`): of speculation, by name.
        profile (`Profile` or path, *optional*): what passes cost; `None`: measured, and corrected by the clock.
        own_cache (`transformers.Cache`, *optional*): the caller's.
        streamer (`BaseStreamer`, *optional*): the caller's.
    """

    # What runs when everything is put together; a benchmark replaces it by one that only looks.
    run = staticmethod(run)

    def __init__(
        self, assistant_model: Any, arguments: dict[str, Any], profile: Any | None, own_cache: Any | None, streamer: Any | None
    ) -> None:
        self.assistant_model = assistant_model
        self.arguments = arguments
        self.profile = profile
        self.own_cache = own_cache
        self.streamer = streamer
        self.is_own = is_own_drafter(assistant_model)

    def __call__(
        self,
        model: Any,
        input_ids: torch.Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        **model_kwargs: Any,
    ) -> GenerateDecoderOnlyOutput | torch.Tensor:
        """Check the call, put drafter and target together, run them; arguments and result as of the host's `_sample`."""
        check_call(input_ids, logits_processor, generation_config, model_kwargs, self.streamer)
        text_config, max_length = model.config.get_text_config(), generation_config.max_length
        check_rotary(text_config, input_ids.shape[1], max_length)
        text = Text.of_prompt(input_ids, model_kwargs.get("attention_mask"))
        if is_stateful(model):
            check_not_offloaded(cache_of(model_kwargs))

        def why_no_masks() -> str | None:
            check_chains(why_not_chained(model, input_ids.device))  # where there is no chain, there is no tree
            obstacle = why_call_not_masked(text_config, model_kwargs, self.own_cache, max_length)
            return obstacle or why_not_masked(model, input_ids.device, has_padding=text.prompt_mask is not None)

        speculation = self._speculation(model, generation_config, text, why_no_masks)
        stop = StopCheck(stopping_criteria, text.num_rows, keep_scores=_wants(generation_config, "output_scores"))
        obstacle = why_no_masks() if text.num_rows > 1 else None
        if obstacle is not None:  # then rows are verified one by one
            apart = why_not_divided(text_config, model_kwargs, self.own_cache)
            obstacle = None if apart is None else f"{obstacle}, and {apart}"
        check_batch(
            text, obstacle, logits_processor, generation_config, rows_end_apart=bool(stop.others), pads=stop.has_end_tokens
        )
        check_chains(why_not_chained(model, input_ids.device))
        # A greedy target meets every draft by match, so there is nothing to draw for another rule.
        drafting = speculation if generation_config.do_sample else replace(speculation, acceptance="match")
        with self._mode(model, generation_config, [*logits_processor, *stopping_criteria]):
            target = self._target(model, generation_config, model_kwargs, speculation, text.num_rows, why_no_masks)
            static = target if isinstance(target, StaticTarget) else None
            budget = self._budget(model, drafting, text, static)
            drafter = self._drafter(model, drafting, logits_processor, generation_config, stop, budget)
            passes = compile_drafter(drafter, target, speculation, generation_config, text.num_rows)
            is_kept = self.own_cache is not None or bool(generation_config.return_dict_in_generate)
            if self.own_cache is not None or wants_passes(generation_config):
                target.keep_rows()
            output = self.run(target, drafter, speculation, stop, logits_processor, text, self.streamer, is_kept=is_kept)
            if not generation_config.return_dict_in_generate or output.past_key_values is None:
                target.release()
            if passes is not None:
                passes.release()
        if budget is not None and self.profile is None:
            learn(model, self.assistant_model, input_ids.device, budget, static)
        output = ordinary(output)
        return output if generation_config.return_dict_in_generate else output.sequences

    def _speculation(
        self, model: Any, generation_config: GenerationConfig, text: Text, why_no_masks: Callable[[], str | None]
    ) -> SpeculationConfig:
        """Return how to draft and how to accept, checked."""
        if self.is_own:
            check_own_drafter(model, self.assistant_model, text.num_rows)
            speculation = own_speculation(self.arguments, why_no_masks)
        else:
            do_sample = generation_config.do_sample
            speculation = resolve_speculation(
                self.arguments, self.assistant_model, do_sample=do_sample, why_no_tree=why_no_masks
            )
        check_profile(self.profile, is_adaptive=speculation.is_adaptive)
        check_processes(model, self.profile, is_adaptive=speculation.is_adaptive)
        return speculation

    def _mode(self, model: Any, generation_config: GenerationConfig, callbacks: list[Any]) -> AbstractContextManager[None]:
        """Return the mode to run in: torch's inference mode where nothing speaks against it."""
        if generation_config.cache_implementation == "static":
            return nullcontext()  # such a cache outlives the call, and its tensors with it
        models = [model] if self.is_own else [model, self.assistant_model]
        more = [self.streamer, *([self.assistant_model] if self.is_own else [])]
        return inference(models, [*callbacks, *more], self.own_cache)

    def _target(
        self,
        model: Any,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
        speculation: SpeculationConfig,
        num_rows: int,
        why_no_masks: Callable[[], str | None],
    ) -> Target:
        """Return the target, which hands back what the drafter reads."""
        layer_ids = (self.assistant_model if self.is_own else self.assistant_model.config).target_layer_ids
        layer_ids = None if layer_ids is None else list(layer_ids)
        return make_target(model, generation_config, model_kwargs, layer_ids, speculation, num_rows, why_no_masks)

    def _budget(self, model: Any, speculation: SpeculationConfig, text: Text, static: StaticTarget | None) -> Budget | None:
        """Return what settles the size of each draft, if it is to follow the machine."""
        if not speculation.is_adaptive:
            return None
        measured = profile_of(model, self.assistant_model, speculation, text.tokens.device, self.profile, static)
        draws_children = speculation.draft_shape == "tree" and speculation.acceptance == "ratio"
        # With a given profile nothing depends on a clock, so that a run can be repeated.
        clock = time.perf_counter if self.profile is None else None
        widths = None if static is None else static.widths
        is_vouched_for = names_size(self.assistant_model)
        return Budget(
            measured,
            text.num_rows,
            draws_children=draws_children,
            clock=clock,
            widths=widths,
            is_vouched_for=is_vouched_for,
        )

    def _drafter(
        self,
        model: Any,
        speculation: SpeculationConfig,
        logits_processor: LogitsProcessorList,
        generation_config: GenerationConfig,
        stop: StopCheck,
        budget: Budget | None,
    ) -> Drafter:
        """Return the drafter: the caller's own, or one around our network."""
        max_length = generation_config.max_length
        if self.is_own:
            return OwnDrafter(self.assistant_model, speculation, model.config.get_text_config().vocab_size, max_length)
        num_copied, size = speculation.prompt_lookup_num_tokens, speculation.max_matching_ngram_size
        copies = None if num_copied is None else Copies(num_copied, size, model.config.get_text_config().vocab_size)
        shaper, ends = DraftShaper(speculation, budget, copies), stop.eos_token_ids
        return make_drafter(self.assistant_model, model, speculation, logits_processor, max_length, shaper, ends)


def _pop_speculation(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Take the arguments of speculation out of `kwargs`, or find them on the generation config that was passed."""
    config = kwargs.get("generation_config")
    found = {name: getattr(config, name, None) for name in SPECULATION_ARGUMENTS}
    if config is not None and found["prompt_lookup_num_tokens"] is not None:
        # The host would take it for its own way to speculate.
        kwargs["generation_config"] = config = deepcopy(config)
        config.prompt_lookup_num_tokens = None
    return found | {name: kwargs.pop(name) for name in SPECULATION_ARGUMENTS if name in kwargs}


def _setting(model: Any, kwargs: dict[str, Any], name: str) -> Any:
    """Return a setting as the host will merge it: of the call, of the config that was passed, of the model's own."""
    configs = [kwargs.get("generation_config"), model.generation_config]
    return next((value for value in [kwargs.get(name), *(getattr(c, name, None) for c in configs)] if value is not None), None)


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
    check_stop_strings(model, stop_strings, tokenizer)
    if stop_strings is None:
        return kwargs
    criteria = StoppingCriteriaList(kwargs.get("stopping_criteria") or [])
    criteria.append(StopStringCriteria(tokenizer, stop_strings))
    return {**kwargs, "stopping_criteria": criteria}

"""What target and drafter passes cost here, measured within a bounded time.

Knows clocks.
"""

import itertools
import math
import os
import platform
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from transformers import GenerationConfig
from transformers import LogitsProcessorList

from .conditioning import make_drafter
from .costs import Profile
from .draft import Draft
from .draft import DraftTree
from .masked_target import MaskedTarget
from .shapes import DraftShaper
from .speculation import SpeculationConfig
from .stateful_target import chain_target_class
from .static_drafter import compile_drafter
from .static_target import StaticTarget
from .target import Target
from .target import fresh_kwargs
from .text import Text

# Measuring takes at most this many seconds, or the time of this many plain steps where that is more.
MOST_SECONDS = 2.0
MOST_STEPS = 20
MOST_SWEEPS = 5
# Where passes become dearer, roughly. Where time is left: both sides of where matrix kernels begin a new tile of rows (there a
# pass becomes dearer at once, between hardly at all), and passes over batches.
COARSE_SIZES = [1, 2, 8, 16, 32, 64]
FINE_SIZES = [1, 2, 4, 8, 9, 16, 17, 24, 25, 32, 33, 48, 49, 64, 65, 128, 256]
CONTEXT_LENGTH = 64
# The drafts that are timed: of one node, of as many as there may be, and of as many with drawn children. Of a chain the first.
ONE_NODE, ALL_NODES, ALL_DRAWN = 0, -1, -2
# A smaller pass that took this much longer than a larger one: something else was running.
NOISE = 1.25


def measure_profile(
    model: Any, network: Any, speculation: SpeculationConfig, device: torch.device, static: StaticTarget | None = None
) -> Profile:
    """Measure target passes over 1 to 256 tokens and the drafter's pass, each with all that the loop does around it.

    It takes at most 2 seconds, or 20 plain steps where that is more: what does not fit is left out.

    Args:
        model (`transformers.PreTrainedModel`): the target.
        network (`SpecDiffDrafter`): the drafter's.
        speculation (`SpeculationConfig`): what rounds look like.
        device (`torch.device`): of the call's inputs.
        static (`StaticTarget`, *optional*): the call's target, where its cache is static: then passes of its widths are
            measured, compiled as its are. What is not compiled yet is compiled before, which takes longer than measuring.

    Returns:
        `Profile`: the least that each pass took; `is_doubtful` where something else was running. torch's generators are left
        as they were.
    """

    def clock() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    start, most = clock(), _room(model) - _text_length(model)
    with torch.no_grad(), torch.random.fork_rng():
        drafts, target_pass, release = _passes(model, network, speculation, device, static)
        if static is not None:
            for width in static.widths:
                target_pass(width)
            drafts[ONE_NODE]()
            start, most = clock(), min(most, static.widths[-1])
        seconds = least_seconds(drafts, target_pass, most, clock, start)
        release()
    return profile_from(seconds, machine_of(device), speculation.tree_budget)


def profile_from(seconds: dict[int, float], machine: str, num_nodes: int) -> Profile:
    """Make a profile of the least times of passes.

    What else runs on a machine can only add to a pass, so none takes more than a larger one took at its best.

    Args:
        seconds (`dict[int, float]`): of `least_seconds`.
        machine (`str`): of `machine_of`.
        num_nodes (`int`): of the larger drafts that were timed.

    Returns:
        `Profile`: `is_doubtful` where a pass took clearly more than a larger one.
    """
    sizes = sorted(size for size in seconds if size > 0)
    least = list(itertools.accumulate((seconds[size] for size in reversed(sizes)), min))[::-1]
    is_doubtful = any(seconds[size] > NOISE * bound for size, bound in zip(sizes, least, strict=True))
    whole = max(seconds.get(ALL_NODES, 0.0), seconds[ONE_NODE])
    drawn = max(seconds.get(ALL_DRAWN, 0.0), whole)
    node_seconds, drawn_seconds = (whole - seconds[ONE_NODE]) / num_nodes, (drawn - whole) / num_nodes
    return Profile(
        sizes,
        least,
        seconds[ONE_NODE],
        machine,
        is_doubtful=is_doubtful,
        node_seconds=node_seconds,
        drawn_seconds=drawn_seconds,
    )


def least_seconds(
    drafts: dict[int, Callable[[], Any]],
    target_pass: Callable[[int], Any],
    most: float,
    clock: Callable[[], float],
    start: float,
) -> dict[int, float]:
    """Time passes in turn, so that a drifting machine hits all alike, for as long as the time allows.

    Args:
        drafts (`dict[int, Callable]`): passes with all that is done with them: `ONE_NODE`, and more where they differ.
        target_pass (`Callable`): a target pass over a number of tokens.
        most (`float`): most tokens of a pass.
        clock (`Callable`): returns seconds, all that was asked of the device being done.
        start (`float`): when measuring began, in seconds of the clock.

    Returns:
        `dict[int, float]`: the least seconds by tokens, and of each of the drafts.
    """
    least: dict[int, float] = {}

    def time_pass(size: int) -> None:
        began = clock()
        target_pass(size) if size > 0 else drafts[size]()
        least[size] = min(least.get(size, math.inf), clock() - began)

    def expected(size: int) -> float:
        """Return the seconds of a pass; of one not seen yet, as if each token cost as much as the last known ones did."""
        if size in least:
            return least[size]
        known = max(other for other in least if other <= max(size, 1))
        return least[known] * max(size, 1) / max(known, 1)

    for size in (*drafts, 1) * 2:  # the first passes are not like the others
        time_pass(size)
    end = start + max(MOST_SECONDS, MOST_STEPS * least[1])
    sizes = [size for size in COARSE_SIZES if 1 < size <= most]
    for sweep in range(MOST_SWEEPS + 1):
        for size in (*drafts, 1, *sizes) if sweep else sizes:
            if clock() + expected(size) <= end:
                time_pass(size)
        if sweep == 0:
            fine = [size for size in FINE_SIZES if 1 < size <= most]
            # Each of them twice at least, or the coarse ones more often.
            if clock() + 2 * sum(map(expected, fine)) <= end:
                sizes = fine
    if max(least) < 2:  # not even two tokens fit into the time
        time_pass(2)
    return least


def _passes(
    model: Any, network: Any, speculation: SpeculationConfig, device: torch.device, static: StaticTarget | None
) -> tuple[dict[int, Callable[[], Any]], Callable[[int], Any], Callable[[], Any]]:
    """Return drafter passes, and a target pass over a number of tokens, behind a short text; and what ends measuring."""
    config = model.config.get_text_config()
    ids = torch.arange(_text_length(model), device=device)[None] * 7 % config.vocab_size
    ids = torch.where(ids == network.config.mask_token_id, (ids + 1) % config.vocab_size, ids)
    drafter = make_drafter(network, model, speculation, LogitsProcessorList(), shaper=DraftShaper(speculation))
    is_tree = speculation.draft_shape != "chain"
    kwargs, passes = fresh_kwargs(model, ids), None
    target: Target
    if static is None:
        target_class = MaskedTarget if is_tree else chain_target_class(model)
        target = target_class(model, GenerationConfig(), kwargs, drafter.target_layer_ids)
    else:
        target = static.like(kwargs, drafter.target_layer_ids, 2 * CONTEXT_LENGTH)
        passes = compile_drafter(drafter, target, speculation, target.generation_config, 1)
    text = Text.of_prompt(ids)
    target.prefill(text)
    features = target.commit([[0]], 0)
    text = text.extended([[int(ids[0, 0])]])
    drafter.draft(text, features)

    def target_pass(size: int) -> None:
        tokens = ids[:, :1].expand(1, size - 1)
        path = [list(range(size - 1))]
        target.verify(text, DraftTree(tokens, path) if is_tree else Draft(tokens, None, has_prefix_law=True))
        target.forget(size)  # the next pass stands where this one stood

    def draft_with(shaper: DraftShaper) -> Callable[[], Any]:
        def draft_pass() -> None:
            drafter.shaper = shaper
            drafter.draft(text, None)

        return draft_pass

    whole = replace(speculation, acceptance="match", prompt_lookup_num_tokens=None)
    kinds = {ONE_NODE: replace(whole, tree_budget=1)}
    if is_tree:
        kinds |= {ALL_NODES: whole, ALL_DRAWN: replace(whole, acceptance="ratio")}
    drafts = {kind: draft_with(DraftShaper(settings)) for kind, settings in kinds.items()}

    def release() -> None:
        target.release()
        if passes is not None:
            passes.release()

    return drafts, target_pass, release


def _room(model: Any) -> float:
    """Return the tokens that a model has positions for."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None) or math.inf


def _text_length(model: Any) -> int:
    """Return the tokens that passes are measured behind."""
    return int(max(1, min(CONTEXT_LENGTH, _room(model) // 2)))


def machine_of(device: torch.device) -> str:
    """Return what tells this machine from another one, as far as speed goes."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()} {platform.processor()}"
    return f"{name} ({os.cpu_count()} cores, {torch.get_num_threads()} threads), torch {torch.__version__}"

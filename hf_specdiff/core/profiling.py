"""What rounds cost here: measured once for a pair of models, kept in the user's cache, and given to `Budget`.

Knows clocks and files.
"""

import hashlib
import itertools
import json
import math
import os
import platform
import statistics
import time
from collections.abc import Callable
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
import transformers
from transformers import GenerationConfig
from transformers import LogitsProcessorList
from transformers.utils import logging

from .budget import Profile
from .conditioning import make_drafter
from .draft import Draft
from .draft import DraftTree
from .masked_target import MaskedTarget
from .shapes import DraftShaper
from .speculation import SpeculationConfig
from .stateful_target import chain_target_class
from .target import fresh_kwargs
from .text import Text

logger = logging.get_logger(__name__)

# Both sides of where matrix kernels begin a new tile of rows: there a pass becomes dearer at once, between hardly at all.
SIZES = [1, 2, 4, 8, 9, 16, 17, 24, 25, 32, 33, 48, 49, 64, 65]
CONTEXT_LENGTH = 192
NUM_REPEATS = 9
CACHE_VARIABLE = "HF_SPECDIFF_CACHE"
# A calibration is written again when the logarithm of a factor has moved by so much since it was written.
NOTABLE_CHANGE = 0.5
# What was measured or read in this process, by the pair's key.
_KNOWN: dict[str, Profile] = {}
# The factors that stand in the pair's file, as far as this process knows.
_WRITTEN: dict[str, list[float]] = {}
# Keys by target, drafter and what else may change from call to call: writing out two configurations takes a millisecond.
_KEYS: WeakKeyDictionary[Any, WeakKeyDictionary[Any, dict[tuple[Any, ...], str]]] = WeakKeyDictionary()


def profile_of(
    model: Any, drafter: Any, speculation: SpeculationConfig, device: torch.device, given: Profile | str | Path | None = None
) -> Profile:
    """Return what rounds cost: as given, as stored, or measured now and stored.

    Args:
        model (`transformers.PreTrainedModel`): the target.
        drafter (`SpecDiffDrafter`): the drafter.
        speculation (`SpeculationConfig`): the shape decides how passes are prepared.
        device (`torch.device`): of the call's inputs.
        given (`Profile` or path, *optional*): to be used as it is, so that a run can be repeated.

    Returns:
        `Profile`: of this machine, unless one was given.

    Raises:
        ValueError: if `given` is no profile.
    """
    if isinstance(given, Profile):
        return given
    if given is not None:
        if not isinstance(given, str | Path):
            raise ValueError(f"`profile` must be a Profile or a file that holds one, got {type(given).__name__}.")
        return _read(Path(given))
    key = _pair_key(model, drafter, speculation)
    if key not in _KNOWN:
        _KNOWN[key] = _stored_or_measured(cache_folder() / f"{key}.json", model, drafter, speculation, device)
    return _KNOWN[key]


def learn(model: Any, drafter: Any, speculation: SpeculationConfig, factors: list[float]) -> None:
    """Let the next call with this pair start from what this one has learnt of the drafter.

    Args:
        model (`transformers.PreTrainedModel`): the target.
        drafter (`SpecDiffDrafter`): the drafter.
        speculation (`SpeculationConfig`): of the call.
        factors (`list[float]`): where the call's `Calibration` ended.
    """
    key = _pair_key(model, drafter, speculation)
    known = _KNOWN[key]
    # Half way from knowing nothing: one text is not like the next. Of what did not come up nothing new is known.
    halved = [math.sqrt(new) if new != old else old for new, old in zip(factors, known.factors, strict=True)]
    _KNOWN[key] = profile = replace(known, factors=halved)
    written = _WRITTEN.setdefault(key, known.factors)
    if max(abs(math.log(new / old)) for new, old in zip(halved, written, strict=True)) < NOTABLE_CHANGE:
        return
    path = cache_folder() / f"{key}.json"
    try:
        if path.is_file():
            write_profile(profile, path)
            _WRITTEN[key] = halved
    except OSError as error:
        # The text has been generated; what was learnt of the drafter must not cost it.
        logger.warning(f"What was learnt of this drafter could not be kept in {path} ({error}).")


def measure_profile(model: Any, drafter: Any, speculation: SpeculationConfig, device: torch.device) -> Profile:
    """Measure target passes over 1 to 65 tokens and the drafter's pass, each with all that the loop does around it.

    Args:
        model (`transformers.PreTrainedModel`): the target.
        drafter (`SpecDiffDrafter`): the drafter.
        speculation (`SpeculationConfig`): what rounds look like.
        device (`torch.device`): of the call's inputs.

    Returns:
        `Profile`: medians of several passes; a larger pass never counts as cheaper than a smaller one. torch's generators are
        left as they were.
    """
    config = model.config.get_text_config()
    room = getattr(config, "max_position_embeddings", None) or CONTEXT_LENGTH + SIZES[-1]
    sizes = [size for size in SIZES if size <= max(2, room - CONTEXT_LENGTH)]
    ids = torch.arange(max(1, min(CONTEXT_LENGTH, room - sizes[-1] - 1)), device=device)[None] * 7 % config.vocab_size
    ids = torch.where(ids == drafter.config.mask_token_id, (ids + 1) % config.vocab_size, ids)
    put_around = make_drafter(drafter, model, speculation, LogitsProcessorList(), shaper=DraftShaper(speculation))
    target_class = chain_target_class(model) if speculation.draft_shape == "chain" else MaskedTarget
    target = target_class(model, GenerationConfig(), fresh_kwargs(model, ids), put_around.target_layer_ids)
    with torch.no_grad(), torch.random.fork_rng():
        text = Text.of_prompt(ids)
        target.prefill(text)
        features = target.commit([[0]], 0)
        text = text.extended([[int(ids[0, 0])]])
        put_around.draft(text, features)

        def one_pass(draft: Draft | DraftTree) -> None:
            target.verify(text, draft)
            target.forget(draft.num_tokens + 1)  # the next pass stands where this one stood

        is_tree = speculation.draft_shape != "chain"
        calls: list[Callable[[], Any]] = [partial(one_pass, _chain_of(ids[:, :1], size - 1, is_tree=is_tree)) for size in sizes]
        calls.append(lambda: put_around.draft(text, None))
        # In turn, so that a drifting machine hits all alike; the first passes are not like the others.
        times = [[_seconds(call, device) for call in calls] for _ in range(NUM_REPEATS + 1)][1:]
    *target_seconds, drafter_seconds = (statistics.median(column) for column in zip(*times, strict=True))
    return Profile(sizes, list(itertools.accumulate(target_seconds, max)), drafter_seconds, machine_of(device))


def machine_of(device: torch.device) -> str:
    """Return what tells this machine from another one, as far as speed goes."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()} {platform.processor()}"
    return f"{name} ({os.cpu_count()} cores, {torch.get_num_threads()} threads), torch {torch.__version__}"


@contextmanager
def isolated_profiles(folder: Path) -> Iterator[None]:
    """Keep profiles, and what is learnt of drafters, in a folder of their own inside `with`: what is measured there shall not
    depend on what was generated before.

    Args:
        folder (`pathlib.Path`): made when something is kept; an earlier run's profiles in it are used.
    """
    elsewhere, known = os.environ.get(CACHE_VARIABLE), dict(_KNOWN)
    _KNOWN.clear()
    os.environ[CACHE_VARIABLE] = str(folder)
    try:
        yield
    finally:
        _KNOWN.clear()
        _KNOWN.update(known)
        if elsewhere is None:
            del os.environ[CACHE_VARIABLE]
        else:
            os.environ[CACHE_VARIABLE] = elsewhere


def cache_folder() -> Path:
    """Return where profiles are kept: `HF_SPECDIFF_CACHE`, or `hf_specdiff` beside the host's own cache."""
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "huggingface"
    return Path(os.environ.get(CACHE_VARIABLE) or Path(home) / "hf_specdiff") / "profiles"


def _stored_or_measured(path: Path, model: Any, drafter: Any, speculation: SpeculationConfig, device: torch.device) -> Profile:
    machine = machine_of(device)
    if path.is_file():
        try:
            stored = _read(path)
            if stored.machine == machine:
                return stored
            reason = f"was measured on {stored.machine}"
        except ValueError as error:
            reason = f"cannot be read ({error})"
        logger.warning(f"The stored profile {path} {reason}; measuring again on {machine}.")
    profile = measure_profile(model, drafter, speculation, device)
    try:
        write_profile(profile, path)
    except OSError as error:
        logger.warning(f"The profile of this pair could not be kept in {path} ({error}); the next process measures it again.")
    return profile


def write_profile(profile: Profile, path: Path) -> None:
    """Write a profile as JSON, beside its place first, so that the file is whole or absent."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(f".{os.getpid()}.partial")
    beside.write_text(json.dumps(asdict(profile), indent=2), encoding="utf-8")
    os.replace(beside, path)


def _read(path: Path) -> Profile:
    try:
        return Profile(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"`profile` must be a Profile or a file that holds one, got {str(path)!r}: {error}") from error


def _pair_key(model: Any, drafter: Any, speculation: SpeculationConfig) -> str:
    """Return a name for everything about a pair that decides what its rounds cost, but for the machine."""
    parts = [transformers.__version__, str(SIZES), speculation.draft_shape, speculation.acceptance, str(speculation.gamma)]
    for network in (model, drafter):
        placement = getattr(network, "hf_device_map", None) or network.device.type
        config = network.config.get_text_config()
        parts += [str(network.dtype), str(network.config._attn_implementation), str(placement)]
        parts += [str(config.num_hidden_layers), str(config.hidden_size), str(config.vocab_size)]
    keys = _KEYS.setdefault(model, WeakKeyDictionary()).setdefault(drafter, {})
    state = tuple(parts)
    if state not in keys:
        parts += [model.config.to_json_string(), drafter.config.to_json_string()]
        keys[state] = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]
    return keys[state]


def _chain_of(token: torch.Tensor, count: int, *, is_tree: bool) -> Draft | DraftTree:
    tokens = token.expand(1, count)
    return DraftTree(tokens, [list(range(count))]) if is_tree else Draft(tokens, None, has_prefix_law=True)


def _seconds(call: Callable[[], Any], device: torch.device) -> float:
    """Return the time of a call."""
    _wait(device)
    start = time.perf_counter()
    call()
    _wait(device)
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)

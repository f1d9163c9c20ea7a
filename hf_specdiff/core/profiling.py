"""What rounds cost here: measured once for a pair of models, within a bounded time, kept in the user's cache, and corrected by
what later calls see.

Knows clocks and files.
"""

import hashlib
import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from dataclasses import dataclass
from dataclasses import fields
from dataclasses import replace
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
import transformers
from transformers.utils import logging

from .budget import Budget
from .costs import Profile
from .files import write_text_whole
from .measuring import FINE_SIZES
from .measuring import MOST_SECONDS
from .measuring import MOST_STEPS
from .measuring import machine_of
from .measuring import measure_profile
from .speculation import SpeculationConfig
from .static_target import StaticTarget

logger = logging.get_logger(__name__)

CACHE_VARIABLE = "HF_SPECDIFF_CACHE"
# What was learnt is written again when the logarithm of a factor, or the allowance in plain steps, has moved by this much.
NOTABLE_CHANGE = 0.5
# Weights that a fingerprint reads: tensors, and numbers of each.
NUM_SAMPLES = 16


@dataclass(slots=True)
class _Known:
    """What this process knows of a pair: its profile, what stands in its file, and when a doubtful one is measured again."""

    profile: Profile | None
    written: Profile | None = None
    calls_left: int = 0
    interval: int = 1


_KNOWN: dict[str, _Known] = {}
# Hashes of two configurations by target, network and what else may change: writing them out takes a millisecond.
_CONFIGS: WeakKeyDictionary[Any, WeakKeyDictionary[Any, dict[tuple[Any, ...], str]]] = WeakKeyDictionary()


def profile_of(
    model: Any,
    network: Any,
    speculation: SpeculationConfig,
    device: torch.device,
    given: Profile | str | Path | None = None,
    static: StaticTarget | None = None,
) -> Profile:
    """Return what rounds cost: as given, as stored, or measured now and stored.

    One profile serves a pair on a machine in every shape, greedy and sampled: `Budget` learns the difference from the rounds.
    One that turns out doubtful is measured again by the next call, and, where it stays doubtful, after 1, 2, 4, ... more.

    Args:
        model (`transformers.PreTrainedModel`): the target.
        network (`SpecDiffDrafter`): the drafter's.
        speculation (`SpeculationConfig`): how passes are prepared, where there is something to measure.
        device (`torch.device`): of the call's inputs.
        given (`Profile` or path, *optional*): to be used as it is, so that a run can be repeated.
        static (`StaticTarget`, *optional*): the call's target, where its cache is static, which has a profile of its own.

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
    key = _pair_key(model, network, device, static)
    path = cache_folder() / f"{key}.json"
    known = _KNOWN.setdefault(key, _Known(_stored(path)))
    if known.profile is None or (known.profile.is_doubtful and known.calls_left == 0):
        known.profile = known.written = _measured(path, known.profile, model, network, speculation, device, static)
        known.calls_left, known.interval = known.interval, 2 * known.interval
    elif known.profile.is_doubtful:
        known.calls_left -= 1
    return known.profile


def learn(model: Any, network: Any, device: torch.device, budget: Budget, static: StaticTarget | None = None) -> None:
    """Let the next call with this pair start from what this one has learnt.

    Args:
        model (`transformers.PreTrainedModel`): the target.
        network (`SpecDiffDrafter`): the drafter's.
        device (`torch.device`): of the call's inputs.
        budget (`Budget`): of the call, at its end.
        static (`StaticTarget`, *optional*): as for `profile_of`.
    """
    key = _pair_key(model, network, device, static)
    known = _KNOWN[key]
    assert known.profile is not None
    old, factors = known.profile, budget.calibration.factors
    # Half way from knowing nothing: one text is not like the next. Of what did not come up nothing new is known.
    halved = [math.sqrt(new) if new != before else before for new, before in zip(factors, old.factors, strict=True)]
    is_doubtful = old.is_doubtful or budget.pace.is_too_quick
    known.profile = replace(old, factors=halved, allowance=budget.allowance.for_next_call, is_doubtful=is_doubtful)
    if not _is_notable(known.written, known.profile):
        return
    path = cache_folder() / f"{key}.json"
    try:
        if path.is_file():
            write_profile(known.profile, path)
            known.written = known.profile
    except OSError as error:
        # The text has been generated; what was learnt of the drafter must not cost it.
        logger.warning(f"What was learnt of this drafter could not be kept in {path} ({error}).")


def _is_notable(written: Profile | None, now: Profile) -> bool:
    if written is None or now.is_doubtful != written.is_doubtful or written.allowance is None:
        return True
    changes = [math.log(new / old) for new, old in zip(now.factors, written.factors, strict=True)]
    assert now.allowance is not None
    return max(map(abs, [*changes, now.allowance - written.allowance])) >= NOTABLE_CHANGE


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


def _stored(path: Path) -> Profile | None:
    if not path.is_file():
        return None
    try:
        return _read(path)
    except ValueError as error:
        logger.warning(f"The stored profile {path} cannot be read ({error}); measuring again.")
        return None


def _measured(
    path: Path,
    earlier: Profile | None,
    model: Any,
    network: Any,
    speculation: SpeculationConfig,
    device: torch.device,
    static: StaticTarget | None,
) -> Profile:
    """Measure, say so, and keep the result, or the least of it and of an earlier profile."""
    reason = "" if earlier is None else " again, since rounds did not agree with it or other programs were running"
    logger.warning_once(
        f"Measuring what passes of this pair cost{reason}, for at most {MOST_SECONDS:.0f} seconds or {MOST_STEPS} plain steps. "
        f"It is kept in {path}; with `profile=` nothing is measured."
    )
    profile = measure_profile(model, network, speculation, device, static)
    if earlier is not None:
        profile = profile.least(earlier)
    try:
        write_profile(profile, path)
    except OSError as error:
        logger.warning(f"The profile of this pair could not be kept in {path} ({error}); the next process measures it again.")
    return profile


def write_profile(profile: Profile, path: Path) -> None:
    """Write a profile as JSON; its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text_whole(path, json.dumps(asdict(profile), indent=2))


def _read(path: Path) -> Profile:
    try:
        return Profile(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"`profile` must be a Profile or a file that holds one, got {str(path)!r}: {error}") from error


def _pair_key(model: Any, network: Any, device: torch.device, static: StaticTarget | None) -> str:
    """Return a name for the machine and for everything about a pair that decides what its rounds cost and bring."""
    parts = [machine_of(device), transformers.__version__, str(FINE_SIZES), *(one.name for one in fields(Profile))]
    if static is not None:
        compiled = static.generation_config.compile_config if static.is_compiled else None
        parts += [str(static.widths), str(static.num_slots), str(static.is_compiled), str(compiled)]
    for one in (model, network):
        placement = getattr(one, "hf_device_map", None) or one.device.type
        config = one.config.get_text_config()
        parts += [str(one.dtype), str(one.config._attn_implementation), str(placement)]
        parts += [str(config.num_hidden_layers), str(config.hidden_size), str(config.vocab_size)]
    configs = _CONFIGS.setdefault(model, WeakKeyDictionary()).setdefault(network, {})
    state = tuple(parts)
    if state not in configs:
        configs[state] = _hash(*parts, model.config.to_json_string(), network.config.to_json_string())
    return _hash(configs[state], _fingerprint(model), _fingerprint(network))


def _fingerprint(network: Any) -> str:
    """Return what tells a network's weights from others: a few numbers of a few tensors. Offloaded ones are not read."""
    weights = [weight.detach() for weight in network.parameters() if weight.device.type != "meta" and weight.numel()]
    some = weights[:: max(1, len(weights) // NUM_SAMPLES)]
    return str([weight.flatten()[:: max(1, weight.numel() // NUM_SAMPLES)][:NUM_SAMPLES].tolist() for weight in some])


def _hash(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]

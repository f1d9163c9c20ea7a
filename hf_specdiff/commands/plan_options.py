"""Options that are fields of `TrainingPlan`: made of what the plan says of them, and read back into fields."""

import inspect
from collections.abc import Callable
from typing import Annotated
from typing import Any

import typer

from hf_specdiff.training.losses import LOSSES
from hf_specdiff.training.plan import FIELDS
from hf_specdiff.training.settings import check_setting
from hf_specdiff.training.settings import default_of
from hf_specdiff.training.settings import kind_of
from hf_specdiff.training.settings import setting_of

NAMES = [name for name, field in FIELDS.items() if not setting_of(field).without_option]


def with_plan_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command an option for each field of a plan that has one, in place of its `**settings`.

    Args:
        command (`Callable`): receives by the fields' names what was given on the command line, and `None` for the others.

    Returns:
        `Callable`: the same, with a signature that typer reads.
    """
    signature = inspect.signature(command)
    own = [each for each in signature.parameters.values() if each.kind is not inspect.Parameter.VAR_KEYWORD]
    options = [inspect.Parameter(name, own[-1].kind, default=None, annotation=_option(name)) for name in NAMES]
    vars(command)["__signature__"] = signature.replace(parameters=[*own, *options])
    return command


def read_settings(words: dict[str, Any]) -> dict[str, Any]:
    """Return the fields that options name.

    Args:
        words (`dict`): what a command with these options received as `**settings`.

    Returns:
        `dict`: values by field, checked; fields that no option named are not in it.

    Raises:
        ValueError: if a value is none that its field can have.
    """
    named = {name: value for name, value in words.items() if value is not None}
    if "loss_weights" in named:
        named["loss_weights"] = read_loss_weights(named["loss_weights"])
    for name, value in named.items():
        check_setting(FIELDS[name], value, option_of(name))
    return named


def option_of(name: str) -> str:
    """Return what the command calls a field: of a flag with two names the one that turns it on."""
    return _words(name).split("/")[0]


def _words(name: str) -> str:
    return setting_of(FIELDS[name]).option or f"--{name.replace('_', '-')}"


def _option(name: str) -> Any:
    """Return the annotation of an option; what is not named stays `None`, and the plan's default holds."""
    kind = list[str] if name == "loss_weights" else kind_of(FIELDS[name])
    option = typer.Option(_words(name), help=_help(name), rich_help_panel=setting_of(FIELDS[name]).panel)
    return Annotated[kind | None, option]


def _help(name: str) -> str:
    """Return an option's line: its meaning, its rule, its default."""
    setting, kind = setting_of(FIELDS[name]), kind_of(FIELDS[name])
    meaning, rule = setting.meaning, None if setting.rule is None else setting.rule.words
    if name == "loss_weights":
        meaning, rule = "several times: objective:weight", f"of {', '.join(LOSSES)}"
    elif kind == list[str]:
        meaning = f"several times: {meaning}"
    default = setting.otherwise.format(default=_shown(name)) or _shown(name)
    notes = "; ".join(note for note in (rule, default and f"by default {default}") if note)
    return f"{meaning} ({notes})" if notes else meaning


def _shown(name: str) -> str:
    """Return a field's default as one would type it; of a flag that is off nothing."""
    value = default_of(FIELDS[name])
    if isinstance(value, bool):
        return option_of(name) if value else ""
    if isinstance(value, dict):
        return " ".join(f"{key}:{weight:g}" for key, weight in value.items())
    return f"{value:g}" if isinstance(value, float) else str(value)


def read_loss_weights(terms: list[str]) -> dict[str, float]:
    """Read `--loss` arguments.

    Args:
        terms (`list[str]`): each an objective's name, a colon and its weight; the weight may be left out and is then 1.

    Returns:
        `dict[str, float]`: weights by name.

    Raises:
        ValueError: if an objective is unknown or named twice, or a weight is no positive number.
    """
    weights: dict[str, float] = {}
    for term in terms:
        name, _, weight = term.partition(":")
        try:
            value = float(weight or 1)
        except ValueError:
            value = 0.0
        if name not in LOSSES or name in weights or not 0 < value < float("inf"):
            raise ValueError(
                f"`--loss` must be objective:weight, each of {', '.join(LOSSES)} at most once and with a positive weight, "
                f"got {term!r}."
            )
        weights[name] = value
    return weights

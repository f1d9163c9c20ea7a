"""What a field of settings is besides its type and its default: what it means, what it may be, how a command calls it.

Knows no setting.
"""

import types
from collections.abc import Callable
from collections.abc import Mapping
from dataclasses import MISSING
from dataclasses import Field
from dataclasses import dataclass
from numbers import Integral
from numbers import Real
from textwrap import fill
from typing import Any
from typing import get_args
from typing import get_origin

WIDTH = 128  # of a docstring
# What a value is, by what it is declared as; containers are looked at by rules.
KINDS: dict[Any, type] = {int: Integral, float: Real, bool: bool, str: str}


@dataclass(frozen=True, slots=True)
class Rule:
    """What a value must be.

    Attributes:
        words (`str`): what stands after "must be".
        holds (`Callable`): from a value of the right kind to whether it is.
    """

    words: str
    holds: Callable[[Any], bool]


def at_least(low: float) -> Rule:
    """Return the rule of numbers from `low` on."""
    return Rule(f"at least {low:g}", lambda value: low <= value < float("inf"))


def between(low: float, high: float) -> Rule:
    """Return the rule of numbers from `low` to `high`, both included."""
    return Rule(f"from {low} to {high}", lambda value: low <= value <= high)


def positive() -> Rule:
    """Return the rule of numbers above 0."""
    return Rule("positive", lambda value: 0 < value < float("inf"))


def one_of(*words: str) -> Rule:
    """Return the rule of a choice."""
    return Rule(" or ".join(words), lambda value: value in words)


def weights_of(*names: str) -> Rule:
    """Return the rule of dictionaries that give some of the names a positive weight."""

    def holds(value: Any) -> bool:
        is_known = isinstance(value, Mapping) and len(value) > 0 and set(value) <= set(names)
        return is_known and all(0 < weight < float("inf") for weight in value.values())

    return Rule(f"positive weights of some of {', '.join(names)}", holds)


@dataclass(frozen=True, slots=True)
class Setting:
    """What is to be known of a field beside its type and its default.

    Attributes:
        meaning (`str`): for docstring and help.
        panel (`str`): the group of options that it belongs to.
        rule (`Rule`, *optional*): what it must be.
        advice (`str`): what to do where it is not.
        option (`str`): how the command calls it, by default as the field is called; of a flag both names.
        otherwise (`str`): what the command goes by where the option is left out, if that is more than the field's default;
            `{default}` stands for that.
        without_option (`str`): why it has no option, if so.
    """

    meaning: str
    panel: str
    rule: Rule | None = None
    advice: str = ""
    option: str = ""
    otherwise: str = ""
    without_option: str = ""


def about(meaning: str, panel: str, rule: Rule | None = None, **more: str) -> dict[str, Setting]:
    """Return the metadata of a field, see `Setting`."""
    return {"setting": Setting(meaning, panel, rule, **more)}


def setting_of(field: Field) -> Setting:
    """Return what `about` said of a field."""
    setting: Setting = field.metadata["setting"]
    return setting


def is_optional(field: Field) -> bool:
    """Return whether a field may be `None`."""
    return types.NoneType in get_args(field.type)


def kind_of(field: Field) -> Any:
    """Return the type that a field is declared as, `None` left out."""
    return next(part for part in get_args(field.type) if part is not types.NoneType) if is_optional(field) else field.type


def default_of(field: Field) -> Any:
    """Return a field's default; `None` for one that has none."""
    if field.default_factory is not MISSING:
        return field.default_factory()
    return None if field.default is MISSING else field.default


def check_setting(field: Field, value: Any, called: str = "") -> None:
    """Refuse a value that a setting cannot have.

    Args:
        field (`dataclasses.Field`): the setting.
        value: for it.
        called (`str`): how the message is to call it, by default by its name.

    Raises:
        TypeError: if it is nothing of the field's kind.
        ValueError: if it is not what it must be.
    """
    if value is None and is_optional(field):
        return
    setting, kind = setting_of(field), KINDS.get(kind_of(field))
    advice = f" {setting.advice}" if setting.advice else ""
    if kind is not None and (not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool)):
        raise TypeError(f"`{called or field.name}` must be of type {kind_of(field).__name__}, got {value!r}.{advice}")
    if setting.rule is not None and not setting.rule.holds(value):
        raise ValueError(f"`{called or field.name}` must be {setting.rule.words}, got {value!r}.{advice}")


def docstring_line(field: Field) -> str:
    """Return a field's line under "Attributes:"."""
    kind, setting = kind_of(field), setting_of(field)
    type_name = str(kind) if get_origin(kind) else kind.__name__
    rule = f" ({setting.rule.words})" if setting.rule is not None else ""
    line = f"{field.name} (`{type_name}`{', *optional*' if is_optional(field) else ''}): {setting.meaning}{rule}."
    return fill(line, WIDTH, initial_indent=" " * 8, subsequent_indent=" " * 12)

"""The arguments of speculation, their defaults, and which of them may be combined.

Knows no tensors. Imported by the drafters, the loop and the entry.
"""

from dataclasses import dataclass
from dataclasses import fields
from dataclasses import replace
from typing import Any

from .denoising import REVEAL_ORDERS

DRAFT_SHAPES = ("auto", "chain")
ACCEPTANCES = ("auto", "match", "ratio", "block")


@dataclass(frozen=True, slots=True)
class SpeculationConfig:
    """How to draft and how to accept, every choice made and checked.

    Attributes:
        gamma (`int`): tokens drafted per round, 1 to the drafter's `block_size - 1`.
        num_denoising_steps (`int`): drafter passes per round, 1 to gamma.
        reveal_order (`str`): `"confidence"` or `"left_to_right"`; with one denoising step both are the same.
        draft_shape (`str`): `"chain"`.
        draft_temperature (`float`): of the draft distribution; 0 drafts the most probable tokens.
        acceptance (`str`): `"match"`, `"ratio"` or `"block"`.
    """

    gamma: int
    num_denoising_steps: int = 1
    reveal_order: str = "confidence"
    draft_shape: str = "chain"
    draft_temperature: float = 1.0
    acceptance: str = "match"

    @property
    def reveals_in_order(self) -> bool:
        """Whether a token is never drawn looking at a token to its right."""
        return self.num_denoising_steps == 1 or self.reveal_order == "left_to_right"

    @property
    def has_prefix_law(self) -> bool:
        """Whether, given the accepted prefix, each token has the law it is said to be drawn from (see `Draft`)."""
        return self.reveals_in_order or self.draft_temperature == 0


SPECULATION_ARGUMENTS = tuple(field.name for field in fields(SpeculationConfig))


def resolve_speculation(arguments: dict[str, Any], drafter: Any, *, do_sample: bool) -> SpeculationConfig:
    """Fill in defaults and refuse what is out of range or would not be lossless.

    Args:
        arguments (`dict[str, Any]`): what the user passed, by name; absent or `None` means the drafter's own default from its
            `generation_config`, then the package's.
        drafter (`SpecDiffDrafter`): has `config.block_size` and `generation_config`.
        do_sample (`bool`): whether the target samples. A greedy target is met with greedy drafts.

    Returns:
        `SpeculationConfig`: complete; `"auto"` is replaced by what was picked.

    Raises:
        ValueError: for a value out of range, a rule that would not be lossless, or a shape or rule that this version does not
            have.
    """
    values = {name: _value(name, arguments, drafter) for name in SPECULATION_ARGUMENTS}
    max_gamma = drafter.config.block_size - 1
    gamma = _integer("gamma", max_gamma if values["gamma"] is None else values["gamma"], 1, max_gamma, "`block_size` - 1")
    steps = 1 if values["num_denoising_steps"] is None else values["num_denoising_steps"]
    steps = _integer("num_denoising_steps", steps, 1, gamma, "`gamma`")
    order = _choice("reveal_order", values["reveal_order"] or "confidence", REVEAL_ORDERS)
    _choice("draft_shape", values["draft_shape"] or "auto", DRAFT_SHAPES, planned=("samples", "tree"))
    acceptance = _choice("acceptance", values["acceptance"] or "auto", ACCEPTANCES, planned=("self_selection",))
    temperature = _temperature(1.0 if values["draft_temperature"] is None else values["draft_temperature"])
    speculation = SpeculationConfig(gamma, steps, order, "chain", temperature if do_sample else 0.0, acceptance)
    return _with_rule(speculation)


def check_prompt(input_ids: Any, mask_token_id: int | None) -> None:
    """Refuse a prompt that is empty or holds the mask, and a drafter without a mask.

    Args:
        input_ids (`torch.Tensor` of shape `(B, L)`, int64): the prompt.
        mask_token_id (`int`, *optional*): the drafter's.

    Raises:
        ValueError: if so.
    """
    if mask_token_id is None:
        raise ValueError(
            "`assistant_model` must have a `mask_token_id` in its config, got None. Set the id it was trained with."
        )
    if input_ids.shape[-1] == 0:
        raise ValueError(
            "`input_ids` must hold at least one token, got an empty prompt. Pass the bos token to start from nothing."
        )
    if bool((input_ids == mask_token_id).any()):
        raise ValueError(
            f"`input_ids` must not hold the drafter's mask id {mask_token_id}, which means 'not yet known'. "
            "Take it out of the prompt."
        )


def _with_rule(speculation: SpeculationConfig) -> SpeculationConfig:
    """Replace `"auto"` by the rule that accepts most, and refuse a rule that would change the target's law."""
    if speculation.acceptance == "auto":
        is_drawn = speculation.draft_temperature > 0
        return replace(speculation, acceptance="block" if is_drawn and speculation.has_prefix_law else "match")
    if speculation.acceptance in ("ratio", "block") and not speculation.has_prefix_law:
        raise ValueError(
            f"`acceptance` must be 'match' when tokens are drawn out of order, got {speculation.acceptance!r} with "
            f"`num_denoising_steps` {speculation.num_denoising_steps} and `reveal_order` 'confidence': a token drawn looking "
            "at one to its right does not have the probability it was drawn with, given the accepted prefix, so the output "
            "would not have the target's law. Pass acceptance='match', reveal_order='left_to_right' or num_denoising_steps=1."
        )
    return speculation


def _value(name: str, arguments: dict[str, Any], drafter: Any) -> Any:
    value = arguments.get(name)
    return getattr(drafter.generation_config, name, None) if value is None else value


def _integer(name: str, value: Any, low: int, high: int, high_name: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise ValueError(f"`{name}` must be an integer from {low} to {high} ({high_name}), got {value!r}.")
    return value


def _choice(name: str, value: Any, choices: tuple[str, ...], planned: tuple[str, ...] = ()) -> str:
    if value in planned:
        raise ValueError(f"`{name}` must be one of {', '.join(choices)} in this version, got {value!r}, which is yet to come.")
    if value not in choices:
        raise ValueError(f"`{name}` must be one of {', '.join(choices)}, got {value!r}.")
    return value


def _temperature(value: Any) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value < float("inf"):
        raise ValueError(f"`draft_temperature` must be a finite number of at least 0, got {value!r}.")
    return float(value)

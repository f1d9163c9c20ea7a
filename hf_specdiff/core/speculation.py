"""The arguments of speculation, their defaults, and which of them may be combined.

Knows no tensors.
"""

from collections.abc import Callable
from dataclasses import dataclass
from dataclasses import fields
from dataclasses import replace
from typing import Any

REVEAL_ORDERS = ("confidence", "left_to_right")
DRAFT_SHAPES = ("auto", "chain", "samples", "tree")
ACCEPTANCES = ("auto", "match", "ratio", "block", "self_selection")
MAX_NUM_DRAFTS = 256
MAX_TREE_BUDGET = 1024
DEFAULT_TREE_BUDGET = 32
AUTO_TREE_BUDGET = 64
MAX_NUM_COPIED = 1024
MAX_NGRAM_SIZE = 64
# What each rule does with each shape. A pair that is not here would not be lossless, or mean nothing.
RULES_OF_SHAPE = {"chain": ("match", "ratio", "block"), "samples": ("match", "self_selection"), "tree": ("match", "ratio")}
WHY_NOT = {
    ("chain", "self_selection"): "there is one draft and nothing to select; pass draft_shape='samples'",
    (
        "samples",
        "ratio",
    ): "the ratio test is made for one draft, and applied to the best of several it would change the target's "
    "law; pass acceptance='match', or draft_shape='tree', whose ratio rule knows of the siblings",
    ("samples", "block"): "block verification is made for one draft, and applied to the best of several it would change the "
    "target's law; pass acceptance='match'",
    ("tree", "block"): "block verification weighs one draft as a whole, and a tree's branches share their prefixes; pass "
    "acceptance='match' or 'ratio'",
    ("tree", "self_selection"): "it selects among joint samples; pass draft_shape='samples'",
}


@dataclass(frozen=True, slots=True)
class SpeculationConfig:
    """How to draft and how to accept, every choice made and checked.

    Attributes:
        gamma (`int`): tokens drafted per round, 1 to the drafter's `max_gamma`; the most of them if `is_adaptive`; 0: as
            many as a drafter of the user's own likes.
        num_denoising_steps (`int`): drafter passes per round, 1 to gamma.
        reveal_order (`str`): `"confidence"` or `"left_to_right"`; with one denoising step both are the same.
        draft_shape (`str`): `"chain"`, `"samples"` or `"tree"`.
        num_drafts (`int`): K, joint drafts of the shape `"samples"`.
        tree_budget (`int`): most nodes of the shape `"tree"`, the anchor not counted.
        is_adaptive (`bool`): whether each round takes as much of gamma (chain) or the budget (tree) as pays on this machine.
        draft_temperature (`float`): of the draft distribution; 0 drafts the most probable tokens.
        is_tempered (`bool`): whether the drawn children of a tree follow the target's temperature (see `ChildTemperature`).
        acceptance (`str`): `"match"`, `"ratio"`, `"block"` or `"self_selection"`.
        prompt_lookup_num_tokens (`int`, *optional*): most tokens of a copied branch; `None`: nothing is copied.
        max_matching_ngram_size (`int`): the longest runs of last tokens that are looked up in the text.
    """

    gamma: int
    num_denoising_steps: int = 1
    reveal_order: str = "confidence"
    draft_shape: str = "chain"
    num_drafts: int = 8
    tree_budget: int = DEFAULT_TREE_BUDGET
    is_adaptive: bool = False
    draft_temperature: float = 1.0
    is_tempered: bool = False
    acceptance: str = "match"
    prompt_lookup_num_tokens: int | None = None
    max_matching_ngram_size: int = 2

    @property
    def reveals_in_order(self) -> bool:
        """Whether a token is never drawn looking at a token to its right."""
        return self.num_denoising_steps == 1 or self.reveal_order == "left_to_right"

    @property
    def is_bounded(self) -> bool:
        """Whether it is known how much a round drafts at most: not of a drafter of the user's own."""
        return self.gamma > 0

    @property
    def max_nodes(self) -> int:
        """The most tokens that a round drafts for a row, all branches counted."""
        num_drafts = self.num_drafts + (self.prompt_lookup_num_tokens is not None)
        return {"chain": self.gamma, "samples": num_drafts * self.gamma, "tree": self.tree_budget}[self.draft_shape]

    @property
    def has_prefix_law(self) -> bool:
        """Whether, given the accepted prefix, each token has the law it is said to be drawn from (see `Draft`)."""
        return self.reveals_in_order or self.draft_temperature == 0


# What a drafter of the user's own leaves open.
OWN_ARGUMENTS = ("draft_shape", "acceptance")
SPECULATION_ARGUMENTS = tuple(field.name for field in fields(SpeculationConfig) if not field.name.startswith("is_"))


def resolve_speculation(
    arguments: dict[str, Any],
    network: Any,
    *,
    do_sample: bool,
    why_no_tree: Callable[[], str | None] = lambda: "this loop verifies one draft a round",
) -> SpeculationConfig:
    """Fill in defaults and refuse what is out of range or would not be lossless.

    Args:
        arguments (`dict[str, Any]`): what the user passed, by name; absent or `None` means the drafter's own default from its
            `generation_config`, then the package's.
        network (`SpecDiffDrafter`): has `config.block_size` and `generation_config`.
        do_sample (`bool`): whether the target samples. A greedy target is met with greedy chains.
        why_no_tree (`Callable`): says why the target cannot verify several drafts in a pass, or `None`; asked only if it
            matters.

    Returns:
        `SpeculationConfig`: complete; `"auto"` is replaced by what was picked.

    Raises:
        ValueError: for a value out of range, or a combination that would not be lossless or that the target cannot verify.
    """
    values = {name: _value(name, arguments, network) for name in SPECULATION_ARGUMENTS}
    max_gamma = network.config.max_gamma
    gamma = max_gamma if values["gamma"] in (None, "auto") else values["gamma"]
    most = "`block_size`" if network.config.predicts_from_anchor else "`block_size` - 1"
    gamma = _integer("gamma", gamma, 1, max_gamma, f" ({most}) or 'auto'")
    steps = 1 if values["num_denoising_steps"] is None else values["num_denoising_steps"]
    steps = _integer("num_denoising_steps", steps, 1, gamma, " (`gamma`)")
    if steps > 1 and getattr(network.config, "knows_token_before", False):
        raise ValueError(
            f"`num_denoising_steps` must be 1 for a drafter whose heads know the token before, got {steps}: they write a "
            "window from left to right already."
        )
    order = _choice("reveal_order", values["reveal_order"] or "confidence", REVEAL_ORDERS)
    shape = _choice("draft_shape", values["draft_shape"] or "auto", DRAFT_SHAPES)
    acceptance = _choice("acceptance", values["acceptance"] or "auto", ACCEPTANCES)
    is_preferred = arguments.get("draft_shape") is None and shape != "auto"
    num_drafts = _integer("num_drafts", 8 if values["num_drafts"] is None else values["num_drafts"], 1, MAX_NUM_DRAFTS)
    budget = None if values["tree_budget"] in (None, "auto") else values["tree_budget"]
    if budget is not None:
        budget = _integer("tree_budget", budget, 1, MAX_TREE_BUDGET, " or 'auto'")
    is_tempered = values["draft_temperature"] in (None, "auto")
    temperature = 1.0 if is_tempered else _temperature(values["draft_temperature"])
    num_copied = _num_copied(arguments, values["prompt_lookup_num_tokens"], steps)
    size = 2 if values["max_matching_ngram_size"] is None else values["max_matching_ngram_size"]
    size = _integer("max_matching_ngram_size", size, 1, MAX_NGRAM_SIZE)
    if is_preferred and not _fits(shape, acceptance, steps, temperature, why_no_tree):
        shape = "auto"  # the drafter's own default yields to what this call and this target ask for
    shape = _shape(shape, acceptance, steps, temperature, why_no_tree)
    if shape == "chain" and not do_sample:
        temperature = 0.0
    why_not_adaptive = _why_not_adaptive(shape, steps)
    if why_not_adaptive is not None and "auto" in (values["gamma"], values["tree_budget"]):
        raise ValueError(f"`gamma` and `tree_budget` must be integers with {why_not_adaptive}, got 'auto'. Pass numbers.")
    is_adaptive = why_not_adaptive is None and _is_adaptive(shape, values, network)
    if budget is None:
        budget = AUTO_TREE_BUDGET if is_adaptive else DEFAULT_TREE_BUDGET
    speculation = SpeculationConfig(
        gamma, steps, order, shape, num_drafts, budget, is_adaptive, temperature, is_tempered, acceptance, num_copied, size
    )
    return _with_rule(speculation, do_sample=do_sample)


def own_speculation(arguments: dict[str, Any], why_no_tree: Callable[[], str | None]) -> SpeculationConfig:
    """Return what was asked for with a drafter of the user's own, which alone knows how it drafts.

    Args:
        arguments (`dict[str, Any]`): what the user passed, by name; absent or `None` means the default.
        why_no_tree (`Callable`): says why the target cannot verify several drafts in a pass, or `None`.

    Returns:
        `SpeculationConfig`: shape and rule; each may be `"auto"`: whatever is drafted, and the rule that accepts most of it.

    Raises:
        ValueError: for an argument that such a drafter cannot honour, a value that is not one of its kind, a combination that
            would not be lossless, or a shape that the target cannot verify.
    """
    for name in SPECULATION_ARGUMENTS:
        if name not in OWN_ARGUMENTS and arguments.get(name) is not None:
            raise ValueError(
                f"`{name}` must be left out with a drafter of your own, got {arguments[name]!r}: how it drafts is its own "
                f"business. Only {' and '.join(f'`{own}`' for own in OWN_ARGUMENTS)} say what is done with the draft."
            )
    shape = _choice("draft_shape", arguments.get("draft_shape") or "auto", DRAFT_SHAPES)
    acceptance = _choice("acceptance", arguments.get("acceptance") or "auto", ACCEPTANCES)
    obstacle = None if shape == "chain" else why_no_tree()
    if obstacle is not None and shape != "auto":
        raise ValueError(f"`draft_shape` must be 'chain' here, got {shape!r}: {obstacle}.")
    shape = shape if obstacle is None else "chain"
    speculation = SpeculationConfig(0, draft_shape=shape, acceptance=acceptance)
    return speculation if "auto" in (shape, acceptance) else _with_rule(speculation, do_sample=True)


def _fits(shape: str, acceptance: str, steps: int, temperature: float, why_no_tree: Callable[[], str | None]) -> bool:
    """Return whether nothing else forbids a shape."""
    if acceptance != "auto" and acceptance not in RULES_OF_SHAPE[shape]:
        return False
    return shape == "chain" or (steps == 1 and temperature > 0 and why_no_tree() is None)


def _shape(shape: str, acceptance: str, steps: int, temperature: float, why_no_tree: Callable[[], str | None]) -> str:
    """Replace `"auto"` by the best shape that everything else allows, and refuse a shape that something does not."""
    if shape == "chain":
        return shape
    obstacle = None
    if steps > 1:
        obstacle = f"with `num_denoising_steps` {steps} a pass has no marginals that several drafts could share"
    elif temperature == 0:
        obstacle = "at `draft_temperature` 0 all drafts are the same"
    if shape == "auto" and acceptance == "self_selection":
        shape = "samples"
    if shape == "auto":
        is_for_trees = acceptance == "auto" or acceptance == "match"
        return "tree" if is_for_trees and obstacle is None and why_no_tree() is None else "chain"
    obstacle = obstacle or why_no_tree()
    if obstacle is not None:
        raise ValueError(f"`draft_shape` must be 'chain' here, got {shape!r}: {obstacle}.")
    return shape


def _num_copied(arguments: dict[str, Any], value: Any, steps: int) -> int | None:
    """Return how many tokens a copied branch may have, and refuse one beside a window that is revealed in several steps."""
    if value is None:
        return None
    value = _integer("prompt_lookup_num_tokens", value, 0, MAX_NUM_COPIED)
    if value == 0:
        return None  # also where the drafter's own default copies
    if steps > 1 and arguments.get("prompt_lookup_num_tokens") is not None:
        raise ValueError(
            f"`prompt_lookup_num_tokens` must be left out with `num_denoising_steps` {steps}, got {value}: what is copied is "
            "weighed by the probabilities of one pass. Pass num_denoising_steps=1."
        )
    return value if steps == 1 else None  # the drafter's own default yields


def _why_not_adaptive(shape: str, steps: int) -> str | None:
    """Return which settings leave no probabilities of one pass to choose a size by, or `None`."""
    if shape != "samples" and steps == 1:
        return None
    return f"`draft_shape` {shape!r} and `num_denoising_steps` {steps}, where no pass says what each size would bring"


def names_size(network: Any) -> bool:
    """Return whether a drafter was published with a measured shape: its generation config names a size of its own."""
    return any(getattr(network.generation_config, name, None) is not None for name in ("gamma", "tree_budget"))


def _is_adaptive(shape: str, values: dict[str, Any], network: Any) -> bool:
    """Return whether a chain or tree follows the machine: where that was asked for, or its size was left to us.

    A drafter that names a size was published with a measured shape: what it leaves open stays as large as it can be.
    """
    if "auto" in (values["gamma"], values["tree_budget"]):
        return True
    return not names_size(network) and values["tree_budget" if shape == "tree" else "gamma"] is None


def _with_rule(speculation: SpeculationConfig, *, do_sample: bool) -> SpeculationConfig:
    """Replace `"auto"` by the rule that accepts most, and refuse a rule that would change the target's law."""
    shape, acceptance = speculation.draft_shape, speculation.acceptance
    if acceptance == "auto":
        is_drawn = do_sample and speculation.draft_temperature > 0 and speculation.has_prefix_law
        best = {"chain": "block", "samples": "match", "tree": "ratio"}[shape]
        return replace(speculation, acceptance=best if is_drawn else "match")
    if acceptance not in RULES_OF_SHAPE[shape]:
        raise ValueError(
            f"`acceptance` must be one of {', '.join(RULES_OF_SHAPE[shape])} with `draft_shape` {shape!r}, got {acceptance!r}: "
            f"{WHY_NOT[shape, acceptance]}."
        )
    if acceptance in ("ratio", "block") and not speculation.has_prefix_law:
        raise ValueError(
            f"`acceptance` must be 'match' when tokens are drawn out of order, got {acceptance!r} with "
            f"`num_denoising_steps` {speculation.num_denoising_steps} and `reveal_order` 'confidence': a token drawn looking "
            "at one to its right does not have the probability it was drawn with, given the accepted prefix, so the output "
            "would not have the target's law. Pass acceptance='match', reveal_order='left_to_right' or num_denoising_steps=1."
        )
    return speculation


def _value(name: str, arguments: dict[str, Any], network: Any) -> Any:
    value = arguments.get(name)
    return getattr(network.generation_config, name, None) if value is None else value


def _integer(name: str, value: Any, low: int, high: int, high_name: str = "") -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise ValueError(f"`{name}` must be an integer from {low} to {high}{high_name}, got {value!r}.")
    return value


def _choice(name: str, value: Any, choices: tuple[str, ...]) -> str:
    if value not in choices:
        raise ValueError(f"`{name}` must be one of {', '.join(choices)}, got {value!r}.")
    return value


def _temperature(value: Any) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value < float("inf"):
        raise ValueError(f"`draft_temperature` must be a finite number of at least 0 or 'auto', got {value!r}.")
    return float(value)

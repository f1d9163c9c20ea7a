"""Ways to decode that can be laid side by side: plain `generate`, the host's own speculation, and ours in every shape and rule.

Knows which arguments make which method. Measures nothing.
"""

from collections.abc import Iterable
from collections.abc import Mapping
from dataclasses import dataclass
from dataclasses import field
from dataclasses import replace
from typing import Any

import torch
from transformers import CompileConfig

from hf_specdiff.core.generate import generate
from hf_specdiff.core.own_drafter import is_own_drafter
from hf_specdiff.core.speculation import ACCEPTANCES

PLAIN = "plain generate"
COMPILED = ", compiled"
PLAIN_COMPILED = PLAIN + COMPILED
NUM_DRAFTS = (1, 2, 4, 8, 16)
# With the anchor 16 and 33 tokens: matrix kernels work through whole tiles of rows, and 16 fill theirs.
TREE_SIZES = (15, 32)
HOT = 1.5  # the temperature that SpecDiff-2 draws joint samples at
# What the host's documentation proposes to begin with.
LOOKUP_TOKENS = 10
# Beside a drafter a copy may be longer: how far it is trusted is learnt.
COPIED_TOKENS = 32


@dataclass(frozen=True, slots=True)
class Models:
    """A target, its tokenizer, and who drafts for it.

    Attributes:
        target (`transformers.PreTrainedModel`): the target.
        tokenizer (`PreTrainedTokenizerBase`): its tokenizer, padding on the left.
        drafters (`dict`): by name, whatever `hf_specdiff.generate` takes: `SpecDiffDrafter`s, `DiffusionDrafter`s, and drafters
            of the user's own.
        assistants (`dict`): autoregressive assistants by name.
    """

    target: Any
    tokenizer: Any
    drafters: dict[str, Any]
    assistants: dict[str, Any] = field(default_factory=dict)

    @property
    def device(self) -> torch.device:
        """Where prompts go."""
        device: torch.device = self.target.device
        return device

    @property
    def is_spread(self) -> bool:
        """Whether the target lies on several devices, where no clock sees all of a pass."""
        return len(set((getattr(self.target, "hf_device_map", None) or {}).values())) > 1


@dataclass(frozen=True, slots=True)
class Method:
    """One way to decode.

    Attributes:
        name (`str`): as it stands in tables.
        arguments (`dict`): of `generate`.
        assistant (`str`, *optional*): the name of the drafter or assistant.
        is_ours (`bool`): whether `hf_specdiff.generate` runs the loop, or the target's own `generate`.
        is_contender (`bool`): whether it is there to win, and not to show what a worse drafter does.
        is_compiled (`bool`): whether passes go through `torch.compile`, over a static cache.
    """

    name: str
    arguments: dict[str, Any]
    assistant: str | None = None
    is_ours: bool = False
    is_contender: bool = True
    is_compiled: bool = False

    @property
    def loop(self) -> str:
        """Whose loop runs."""
        return "hf_specdiff" if self.is_ours else "transformers"

    def assistant_of(self, models: Models) -> Any | None:
        """Return who drafts, if anybody does: a model, or a drafter of the user's own."""
        return None if self.assistant is None else (models.drafters | models.assistants)[self.assistant]

    def decode(self, models: Models, inputs: Mapping[str, Any], **settings: Any) -> Any:
        """Decode a batch.

        Args:
            models (`Models`): who decodes.
            inputs (`Mapping`): `input_ids` and `attention_mask`.
            **settings: of `generate`, the same for every method.

        Returns:
            what `generate` returns.
        """
        arguments = {**inputs, **settings, **self.arguments}
        if self.is_compiled:
            arguments |= {"cache_implementation": "static", "compile_config": compile_config()}
        if self.assistant is not None:
            assistant: Any = self.assistant_of(models)
            arguments["assistant_model"] = assistant
            is_chain = self.arguments.get("draft_shape") == "chain" and not is_own_drafter(assistant)
            if is_chain and getattr(assistant.generation_config, "gamma", None) is None:
                # A chain that is compared is a whole window, also of a drafter that would follow the machine.
                arguments.setdefault("gamma", assistant.config.max_gamma)
        return generate(models.target, **arguments) if self.is_ours else models.target.generate(**arguments)


def ours(drafter: str, name: str, **arguments: Any) -> Method:
    """Return a method of our loop, named after the drafter and what is done with it."""
    return Method(f"{drafter}, {name}", arguments, drafter, is_ours=True)


def host_methods(models: Models, drafters: Iterable[str]) -> list[Method]:
    """Return what transformers can do with the same target and some of the drafters, plain `generate` first.

    Its loops call an assistant's `generate`. A `DiffusionDrafter` has none, nor has a drafter of the user's own.
    """
    methods = [
        Method(PLAIN, {}),
        Method("transformers, prompt lookup", {"prompt_lookup_num_tokens": LOOKUP_TOKENS}),
    ]
    methods += [Method(f"transformers, {name}", {}, name) for name in models.assistants]
    for name in drafters:
        drafter = models.drafters[name]
        if is_own_drafter(drafter) or not hasattr(drafter, "generate"):
            continue
        if drafter.config.target_layer_ids is None:
            methods.append(Method(f"transformers, {name}", {}, name))
        else:
            methods.append(Method(f"transformers' dflash loop, {name}", {"speculation_type": "dflash"}, name))
    return methods


def our_methods(drafter: str, temperature: float, num_drafts: tuple[int, ...] = (8,)) -> list[Method]:
    """Return every shape and rule worth comparing at a temperature.

    Args:
        drafter (`str`): its name.
        temperature (`float`): 0 for greedy.
        num_drafts (`tuple[int, ...]`): the numbers K of joint samples.

    Returns:
        `list[Method]`: chains, trees, auto, joint samples.
    """
    alone = {"prompt_lookup_num_tokens": 0}  # also of a drafter whose own default copies
    if temperature:
        methods = [
            ours(drafter, f"chain by {rule}", draft_shape="chain", acceptance=rule, **alone)
            for rule in ("match", "ratio", "block")
        ]
        methods += [
            ours(drafter, f"tree of {size} by {rule}", draft_shape="tree", tree_budget=size, acceptance=rule, **alone)
            for size, rule in ((7, "ratio"), (32, "match"), (32, "ratio"))
        ]
        fixed: dict[str, Any] = {"draft_shape": "tree", "tree_budget": 7, "acceptance": "ratio"}
        name = "tree of 7 by ratio"
    else:
        methods = [ours(drafter, "chain", draft_shape="chain", **alone)]
        methods += [ours(drafter, f"tree of {size}", draft_shape="tree", tree_budget=size, **alone) for size in TREE_SIZES]
        fixed, name = {"draft_shape": "tree", "tree_budget": TREE_SIZES[0]}, f"tree of {TREE_SIZES[0]}"
    methods.append(ours(drafter, f"{name} with copies", **fixed, prompt_lookup_num_tokens=COPIED_TOKENS))
    methods.append(ours(drafter, "auto", tree_budget="auto", **alone))
    methods.append(ours(drafter, "auto with copies", tree_budget="auto", prompt_lookup_num_tokens=COPIED_TOKENS))
    return methods + [samples(drafter, count, rule) for count in num_drafts for rule in ("match", "self_selection")]


def own_methods(drafter: str, temperature: float) -> list[Method]:
    """Return what can be compared of a drafter of the user's own, which alone knows how it drafts: the rules.

    A rule that its drafts are not made for is refused when it runs, with the reason.

    Args:
        drafter (`str`): its name.
        temperature (`float`): 0 for greedy, where all rules are the same.

    Returns:
        `list[Method]`: the rule that accepts most, then each.
    """
    rules = [rule for rule in ACCEPTANCES if rule != "auto"] if temperature else []
    return [ours(drafter, "auto"), *(ours(drafter, f"by {rule.replace('_', '-')}", acceptance=rule) for rule in rules)]


def samples(drafter: str, count: int, rule: str) -> Method:
    """Return the verification of K joint samples, as in SpecDiff-2 or by the walk over all of them."""
    name = f"{count} samples by {rule.replace('_', '-')}"
    arguments: dict[str, Any] = {"draft_shape": "samples", "num_drafts": count, "draft_temperature": HOT}
    return ours(drafter, name, **arguments, acceptance=rule, prompt_lookup_num_tokens=0)


def compile_config() -> CompileConfig:
    """Return the host's default for `generate`: inductor, and graphs where there is a GPU."""
    config = CompileConfig()
    config._compile_all_devices = True  # else the host compiles on GPUs only (transformers 5.17 to 5.23)
    return config


def with_compiled(methods: list[Method]) -> list[Method]:
    """Return methods, plain `generate` and our chains and trees of a fixed size each followed by itself, compiled.

    Args:
        methods (`list[Method]`): eager ones.

    Returns:
        `list[Method]`: those that stand aside from the contest, that copy, or whose size follows the machine, stay eager.
    """
    found = []
    for method in methods:
        found.append(method)
        if method.name == PLAIN or _has_fixed_passes(method):
            found.append(replace(method, name=f"{method.name}{COMPILED}", is_compiled=True))
    return found


def _has_fixed_passes(method: Method) -> bool:
    arguments = method.arguments
    is_fixed = arguments.get("draft_shape") in ("chain", "tree") and "auto" not in arguments.values()
    return method.is_ours and method.is_contender and is_fixed and not arguments.get("prompt_lookup_num_tokens")

"""Is this drafter loaded right, does it fit this target, and what will it bring here: `hf-specdiff doctor`.

Nearly every report of "nothing is accepted" is a fault of loading, not of training: layers counted from one, another block
length, another target, special ids that differ. So what decides is laid side by side, and a pair that accepts next to nothing
is pointed out.
"""

from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import dataclass
from dataclasses import replace
from functools import partial
from typing import Any

from hf_specdiff.benchmarks.figures import rows_of
from hf_specdiff.benchmarks.journal import Journal
from hf_specdiff.benchmarks.methods import PLAIN
from hf_specdiff.benchmarks.methods import TREE_SIZES
from hf_specdiff.benchmarks.methods import Method
from hf_specdiff.benchmarks.methods import Models
from hf_specdiff.benchmarks.runner import CALL
from hf_specdiff.benchmarks.runner import Block
from hf_specdiff.benchmarks.runner import run_step
from hf_specdiff.benchmarks.runner import warm_up
from hf_specdiff.core.checks import SPECIAL_IDS
from hf_specdiff.core.checks import check_layers
from hf_specdiff.core.checks import check_pair
from hf_specdiff.core.checks import check_special_id
from hf_specdiff.core.checks import check_vocabulary
from hf_specdiff.core.checks import check_width
from hf_specdiff.core.costs import Profile
from hf_specdiff.core.measuring import measure_profile
from hf_specdiff.core.speculation import resolve_speculation
from hf_specdiff.core.trial import why_not_chained
from hf_specdiff.core.trial import why_not_masked
from hf_specdiff.training.prompts import Prompt

AUTO = "auto"
# Below it a drafter is as good as untrained: the target's own token is one of them.
SUSPICIOUS_TOKENS_PER_ROUND = 1.3
# Enough to have run every kind of pass once. Together with a prompt of each set and few tokens it keeps a report short.
WARM_TOKENS = 6


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report.

    Attributes:
        name (`str`): what was looked at.
        target (`str`): the target's side.
        drafter (`str`): the drafter's.
        warning (`str`): what is wrong with it; empty if nothing is.
    """

    name: str
    target: str
    drafter: str
    warning: str = ""


def compare(target: Any, drafter: Any, tokenizer: Any) -> list[Finding]:
    """Lay side by side what must agree between a target and its drafter.

    Args:
        target (`transformers.PreTrainedModel`): the target.
        drafter (`SpecDiffDrafter`): the drafter.
        tokenizer (`PreTrainedTokenizerBase`): the target's.

    Returns:
        `list[Finding]`: one per property, each with a warning if the two do not fit.

    Raises:
        TypeError: if `drafter` is none.
    """
    theirs, own = target.config.get_text_config(), drafter.config
    if own.model_type != "specdiff":
        raise TypeError(
            f"`drafter` must be a SpecDiffDrafter, got {type(drafter).__name__}. The doctor knows no other drafters."
        )
    findings = [
        Finding("vocabulary", str(theirs.vocab_size), str(own.vocab_size), _refusal(check_vocabulary, theirs, own)),
        *(
            Finding(
                name,
                str(getattr(theirs, name, None)),
                str(getattr(own, name, None)),
                _refusal(partial(check_special_id, name), theirs, own),
            )
            for name in SPECIAL_IDS
        ),
        _mask(own, tokenizer),
        _layers(theirs, own),
    ]
    if own.target_layer_ids is not None:
        width = _refusal(check_width, theirs, own)
        findings.append(Finding("hidden size", str(theirs.hidden_size), str(own.hidden_size), width))
    if own.target_model is not None:
        findings.append(Finding("made for", target.name_or_path, own.target_model))
    own_device, their_device = (
        " + ".join(sorted({str(tensor.device) for tensor in model.parameters()})) for model in (drafter, target)
    )
    is_elsewhere = target.device.type != drafter.device.type
    moves = f"every round moves tensors between them: drafter.to({str(target.device)!r})" if is_elsewhere else ""
    findings.append(Finding("device", their_device, own_device, moves))
    findings.append(Finding("dtype", str(target.dtype), str(drafter.dtype)))
    findings.append(Finding("parameters", f"{target.num_parameters():,}", f"{drafter.num_parameters():,}"))
    findings.append(_verifies(target, own))
    return findings


def _verifies(target: Any, own: Any) -> Finding:
    drafts, no_chain = f"drafts up to {own.max_gamma} tokens", why_not_chained(target, target.device)
    if no_chain is not None:
        return Finding("verifies", "nothing", drafts, f"{no_chain}: use plain model.generate")
    no_tree = why_not_masked(target, target.device)
    shapes = "trees and batches" if no_tree is None else f"chains, rows of a batch one after another: {no_tree}"
    return Finding("verifies", shapes, drafts)


def costs(target: Any, drafter: Any) -> Profile:
    """Measure what rounds cost here.

    Args:
        target (`transformers.PreTrainedModel`): the target.
        drafter (`SpecDiffDrafter`): a drafter that fits it.

    Returns:
        `Profile`: passes of both, with all that the loop does around them.

    Raises:
        TypeError: if `drafter` is none.
        ValueError: if the two do not fit.
    """
    check_pair(target, drafter)
    chain = resolve_speculation({"draft_shape": "chain"}, drafter, do_sample=False)
    return measure_profile(target, drafter, chain, target.device)


def cost_lines(profile: Profile, gamma: int) -> list[str]:
    """Return the cost of a round in words.

    Args:
        profile (`Profile`): of `costs`.
        gamma (`int`): drafted tokens.

    Returns:
        `list[str]`: lines of text.
    """
    plain, draft = profile.target_cost(1), profile.draft_cost(gamma)
    whole = profile.target_cost(gamma + 1) + draft
    target_pass, drafter_pass = (f"{1e3 * seconds:.1f} ms" for seconds in (whole - draft, draft))
    return [
        f"a plain step takes {1e3 * plain:.1f} ms",
        f"a round of {gamma} drafted tokens takes {1e3 * whole:.1f} ms: target pass {target_pass}, drafter {drafter_pass}",
        f"so a drafter pays from {whole / plain:.2f} tokens per round on",
    ]


def try_prompts(models: Models, prompts: Mapping[str, Sequence[Prompt]], max_new_tokens: int) -> list[dict[str, Any]]:
    """Decode prompts greedily, plain and in several shapes, in turn.

    Args:
        models (`Models`): the target and one drafter, named "drafter".
        prompts (`Mapping[str, Sequence]`): texts or chats by task.
        max_new_tokens (`int`): the length limit.

    Returns:
        `list[dict]`: rows as `hf-specdiff bench` writes them; for each task plain `generate` first.
    """
    methods = [Method(PLAIN, {}), Method("chain", {"draft_shape": "chain"}, "drafter", is_ours=True)]
    if why_not_masked(models.target, models.target.device) is None:
        methods += [
            Method(f"tree of {nodes}", {"draft_shape": "tree", "tree_budget": nodes}, "drafter", is_ours=True)
            for nodes in TREE_SIZES[:1]
        ]
    methods.append(Method(AUTO, {"tree_budget": "auto"}, "drafter", is_ours=True))
    rows: list[dict[str, Any]] = []
    for task, texts in prompts.items():
        block, journal = Block(task, texts, methods, max_new_tokens, num_detailed=0), Journal()
        batches = block.batches(models)
        if not rows:
            warm_up(models, replace(block, max_new_tokens=WARM_TOKENS), journal, batches[0])
        for number, batch in enumerate(batches):
            run_step(models, block, journal, CALL, number, batch)
        rows += rows_of(block, models, journal)
    for row in rows:
        if "refusal" in row:
            raise ValueError(
                f"`drafter` must be one that the target can verify, got an error for {row['method']}: {row['refusal']}"
            )
    return rows


def verdict(rows: list[dict[str, Any]], profile: Profile, models: Models) -> list[str]:
    """Return what is wrong with what was measured; nothing if all is well.

    Args:
        rows (`list[dict]`): of `try_prompts`.
        profile (`Profile`): of `costs`.
        models (`Models`): who decoded.

    Returns:
        `list[str]`: warnings.
    """
    warnings = []
    drafter = models.drafters["drafter"]
    chains = [row for row in rows if row["method"] == "chain"]
    num_strange = sum(row["num_prompts"] - row["num_identical"] - row["num_near_ties"] for row in rows)
    if num_strange:
        warnings.append(
            f"{num_strange} outputs differ from plain generate's where rounding in {dtype_name(models.target)} does not "
            "explain it: please report this target."
        )
    best = max((row["tokens_per_round"] for row in chains), default=1.0)
    if best < SUSPICIOUS_TOKENS_PER_ROUND:
        config = drafter.config
        layers = "" if config.target_layer_ids is None else f" and the layers {config.target_layer_ids} (counted from 0)"
        warnings.append(
            f"at best {best:.2f} tokens per round: the pair is probably mis-loaded, or the drafter untrained. Look at its "
            f"target and the target's revision, the mask id {config.mask_token_id}, the block size {config.block_size}{layers}."
        )
        return warnings
    gamma = drafter.config.max_gamma
    needed = profile.round_cost(gamma + 1, is_drafted=True, num_nodes=gamma) / profile.target_cost(1)
    if best < needed:
        warnings.append(
            f"{best:.2f} tokens per round, but a round costs as much as {needed:.2f} plain steps here: pass "
            "tree_budget='auto', which drafts only as much as pays."
        )
    return warnings


def tie_line(rows: list[dict[str, Any]], models: Models) -> str:
    """Return in words how often a greedy text is another one than plain decoding's, and how many of those part at a near tie.

    Args:
        rows (`list[dict]`): of `try_prompts`.
        models (`Models`): who decoded.

    Returns:
        `str`: a line of text.
    """
    others = [row for row in rows if row["method"] != PLAIN]
    num_texts, num_ties = (sum(row[name] for row in others) for name in ("num_prompts", "num_near_ties"))
    num_different = num_texts - sum(row["num_identical"] for row in others)
    share = f"{num_different} of {num_texts} greedy texts ({100 * num_different / num_texts:.0f} %)"
    where = f", {num_ties} of them first where two tokens are as close as rounding" if num_different else ""
    return f"in {dtype_name(models.target)} {share} differ from plain generate's{where}"


def dtype_name(model: Any) -> str:
    """Return the name of a model's data type."""
    return str(model.dtype).removeprefix("torch.")


def auto_line(rows: list[dict[str, Any]]) -> str:
    """Return in words what a call without arguments would bring here.

    Args:
        rows (`list[dict]`): of `try_prompts`.

    Returns:
        `str`: a line of text.
    """
    auto = [row for row in rows if row["method"] == AUTO]
    parts = [
        f"{row['ratio_to_plain']:.2f}x plain generate's speed on {row['task']} ({row['drafted_per_round'] or 0:.1f} tokens "
        "drafted a round)"
        for row in auto
    ]
    return f'"auto", which follows the machine and the text, brings {", ".join(parts)}'


def _refusal(check: Callable[[Any, Any], None], theirs: Any, own: Any) -> str:
    """Return what the entry would say about two configurations; empty if nothing."""
    try:
        check(theirs, own)
    except ValueError as error:
        return str(error)
    return ""


def _mask(own: Any, tokenizer: Any) -> Finding:
    """Return whether the mask is an id that no text holds."""
    if own.mask_token_id is None:
        return Finding("mask id", "", "None", "the drafter's config must name the id it was trained with")
    token = tokenizer.convert_ids_to_tokens(own.mask_token_id) if own.mask_token_id < len(tokenizer) else None
    warning = ""
    if token is not None and own.mask_token_id not in tokenizer.all_special_ids:
        warning = f"it is the ordinary token {token!r}, which is never drafted, and read as 'not known' in a text"
    return Finding("mask id", str(token), str(own.mask_token_id), warning)


def _layers(theirs: Any, own: Any) -> Finding:
    """Return whether the target has the layers that the drafter reads."""
    layers = f"{theirs.num_hidden_layers} layers"
    if own.target_layer_ids is None:
        return Finding("layers read", layers, "none (conditioned on tokens)")
    warning = _refusal(check_layers, theirs, own)
    if not warning and own.num_target_layers not in (None, theirs.num_hidden_layers):
        warning = f"the drafter was made for a target of {own.num_target_layers} layers"
    return Finding("layers read", layers, str(own.target_layer_ids), warning)

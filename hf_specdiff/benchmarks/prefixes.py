"""How much of a draft is expected to stand, computed from p and q at the same places of the same texts for every method.

A sampled run's figure hangs on its draws, and each method draws a text of its own. Here the target writes a text once; every
method drafts at the same places of it, and of each draft the expected number of accepted tokens is computed, not drawn. What
chance is left are the drafts' own tokens.

Letters: B batch (1), G drafted tokens, N nodes, V vocabulary. Knows the loop's parts and the rules' laws; reads no clock.
"""

from collections.abc import Set
from dataclasses import replace
from itertools import pairwise
from typing import Any
from weakref import WeakKeyDictionary

import torch
from transformers import GenerationMixin
from transformers import LogitsProcessorList

from hf_specdiff.benchmarks.methods import Method
from hf_specdiff.benchmarks.methods import Models
from hf_specdiff.core.acceptance import block_num_accepted_law
from hf_specdiff.core.acceptance import coupled_laws
from hf_specdiff.core.acceptance import ratio_num_accepted_law
from hf_specdiff.core.acceptance import walk_end_law
from hf_specdiff.core.costs import Profile
from hf_specdiff.core.decoding import SpecDiffGenerateOutput
from hf_specdiff.core.draft import Draft
from hf_specdiff.core.draft import DraftTree
from hf_specdiff.core.draft import Outcome
from hf_specdiff.core.drafters import Drafter
from hf_specdiff.core.features import Features
from hf_specdiff.core.generate import SpeculativeLoop
from hf_specdiff.core.measuring import measure_profile
from hf_specdiff.core.own_drafter import is_own_drafter
from hf_specdiff.core.rules import make_rule
from hf_specdiff.core.rules import selected_draft
from hf_specdiff.core.sampling import Scores
from hf_specdiff.core.sampling import to_probs
from hf_specdiff.core.speculation import SPECULATION_ARGUMENTS
from hf_specdiff.core.speculation import SpeculationConfig
from hf_specdiff.core.speculation import resolve_speculation
from hf_specdiff.core.stats import SpeculationStats
from hf_specdiff.core.stopping import StopCheck
from hf_specdiff.core.target import Target
from hf_specdiff.core.text import Text
from hf_specdiff.core.text import to_device

CHAIN_LAWS = {"ratio": ratio_num_accepted_law, "block": block_num_accepted_law}
# Places of a text at which is drafted.
NUM_PLACES = 16
# Room behind a text: drafts at its end are no shorter than others.
MARGIN = 64
_PROFILES: WeakKeyDictionary[Any, Profile] = WeakKeyDictionary()


def expected_accepted(
    draft: Draft | DraftTree, target_probs: torch.Tensor, acceptance: str, end_token_ids: Set[int] = frozenset()
) -> float:
    """Return how many tokens of a draft the target is expected to accept, over all that acceptance draws.

    Args:
        draft (`Draft` or `DraftTree`): of one row.
        target_probs (`torch.Tensor` of shape `(1, N + 1, V)`): p after the anchor and after each drafted token.
        acceptance (`str`): `"match"`, `"ratio"`, `"block"`, or `"self_selection"` for the draft that it has selected.
        end_token_ids (`set[int]`): with one of them a text ends: what is drafted behind does not count.

    Returns:
        `float`: tokens, the one that the target adds not counted.
    """
    if draft.num_tokens == 0:
        return 0.0
    if isinstance(draft, Draft) and acceptance in CHAIN_LAWS:
        q = draft.dense_probs(target_probs.shape[-1]).to(target_probs.dtype)
        law = CHAIN_LAWS[acceptance](draft.tokens, q, target_probs)[0]
        reached = law.flip(0).cumsum(0).flip(0)[1:]  # (G,): P(num_accepted >= m)
        return float((reached * _counts(DraftTree.of_chain(draft.tokens), end_token_ids)).sum())
    tree = DraftTree.of_chain(draft.tokens) if isinstance(draft, Draft) else draft
    if acceptance != "ratio":
        tree = replace(tree, sampled=None)
    ends = walk_end_law(tree, coupled_laws(tree, target_probs))[0]
    reached = (tree.ancestor_mask()[0] * ends[:, None]).sum(0)[1:]  # (N,): the walk ends there or below
    return float((reached * _counts(tree, end_token_ids)).sum())


def _verified(draft: Draft | DraftTree, scores: Scores, acceptance: str, end_token_ids: Set[int]) -> float:
    """Return `expected_accepted` from the target's scores."""
    if acceptance == "self_selection" and isinstance(draft, DraftTree):
        draft = selected_draft(draft, scores, end_token_ids, do_sample=True)
    if acceptance == "auto":  # what accepts most of each draft, as `make_rule` says
        is_tested = isinstance(draft, DraftTree) or draft.has_prefix_law
        acceptance = ("ratio" if isinstance(draft, DraftTree) else "block") if is_tested else "match"
    if isinstance(draft, Draft) or scores.is_prefix_free:
        return expected_accepted(draft, to_probs(scores.window()), acceptance, end_token_ids)
    paths = [draft.path(0, node) for node in range(draft.num_tokens + 1)]
    rows = [scores.last(0, path if path[0] == 0 else [0]) for path in paths]
    return expected_accepted(draft, to_probs(torch.stack(rows)[None]), acceptance, end_token_ids)


def _counts(tree: DraftTree, end_token_ids: Set[int]) -> torch.Tensor:
    """Return 1 for the nodes that no end of the text stands before, `(N,)`."""
    counts, tokens = [True], tree.tokens[0].tolist()
    for node, parent in enumerate(tree.parents[0], 1):
        is_behind_end = parent > 0 and tokens[parent - 1] in end_token_ids
        # What selection has left out has no parent, and is not reached.
        counts.append(parent >= 0 and counts[parent] and not is_behind_end)
        assert parent < node
    return torch.tensor(counts[1:], device=tree.tokens.device)


class AlongText(SpeculativeLoop):
    """Our loop with a text that is known: it drafts and verifies at some places of it, and commits what stands there.

    What a drafter learns from round to round (copies, budgets, temperatures) it learns from the rule's own decisions.

    Args:
        assistant_model (`SpecDiffDrafter`): the drafter.
        arguments (`dict[str, Any]`): of speculation, by name.
        profile (`Profile`, *optional*): what passes cost, where the size follows the machine.
        written (`list[int]`): the text behind the prompt.

    Attributes:
        expected (`list[float]`): for each place the expected accepted tokens.
        drafted (`list[int]`): for each place the drafted tokens.
    """

    def __init__(self, assistant_model: Any, arguments: dict[str, Any], profile: Profile | None, written: list[int]) -> None:
        super().__init__(assistant_model, arguments, profile, None, None)
        self.written = written
        self.expected: list[float] = []
        self.drafted: list[int] = []

    def run(
        self,
        target: Target,
        drafter: Drafter,
        speculation: SpeculationConfig,
        stop: StopCheck,
        processors: LogitsProcessorList,
        text: Text,
        streamer: Any | None = None,
        *,
        is_kept: bool = False,
    ) -> SpecDiffGenerateOutput:
        """Walk along the text; see `decoding.run`."""
        accept = make_rule(speculation.acceptance, do_sample=True, end_token_ids=stop.eos_token_ids)
        observe = getattr(drafter, "observe", lambda outcome: None)
        target.prefill(text)
        features = target.commit([[0]], 0)
        for part in parts_of(self.written, NUM_PLACES):
            text, seen = _written(target, text, part)
            features = None if features is None else Features.join([features, *seen])
            draft = drafter.draft(text, features).to(text.tokens.device)
            scores = Scores(processors, text, draft.tokens, target.verify(text, draft))
            self.expected.append(_verified(draft, scores, speculation.acceptance, stop.eos_token_ids))
            self.drafted.append(draft.num_drafted()[0])
            acceptance = accept(draft, scores)
            observe(Outcome(draft, acceptance.tokens, acceptance.nodes, [False], acceptance.target_laws))
            features = target.commit([[0]], draft.num_tokens)
        stats = SpeculationStats(speculation.draft_shape, speculation.acceptance, [], [])
        return SpecDiffGenerateOutput(sequences=text.tokens, speculation=stats)


def parts_of(tokens: list[int], count: int) -> list[list[int]]:
    """Return a text in at most so many parts, one after another, each about as long as the others."""
    count = min(count, len(tokens))
    bounds = [len(tokens) * number // count for number in range(count + 1)] if count else []
    return [tokens[start:end] for start, end in pairwise(bounds)]


def _written(target: Target, text: Text, part: list[int]) -> tuple[Text, list[Features]]:
    """Add tokens to a text, and let the target read all but the last of them; return what it tells a drafter of them, too."""
    text = text.extended([part[:1]])
    rest = part[1:]
    if not rest:
        return text, []
    chain = Draft(to_device([rest], text.tokens.device), None, has_prefix_law=True)
    target.verify(text, chain)
    features = target.commit([list(range(len(rest)))], len(rest))
    return text.extended([rest]), [] if features is None else [features]


def accepted_along(method: Method, models: Models, prompt: torch.Tensor, written: list[int], **settings: Any) -> AlongText:
    """Let a method of ours draft along a text.

    Args:
        method (`Method`): of our loop, with a drafter of ours.
        models (`Models`): who decodes.
        prompt (`torch.Tensor` of shape `(1, L)`, int64): what the text begins with.
        written (`list[int]`): the rest of it.
        **settings: of `generate`, the same for every method; those of sampling.

    Returns:
        `AlongText`: with what was found.
    """
    profile = profile_for(method, models) if "auto" in method.arguments.values() else None
    own = {name: value for name, value in method.arguments.items() if name in SPECULATION_ARGUMENTS}
    others = {name: value for name, value in method.arguments.items() if name not in own}
    drafter: Any = method.assistant_of(models)
    if own.get("draft_shape") == "chain" and not is_own_drafter(drafter):
        own.setdefault("gamma", drafter.config.max_gamma)
    loop = AlongText(drafter, {name: own.get(name) for name in SPECULATION_ARGUMENTS}, profile, written)
    settings = settings | others | {"max_new_tokens": len(written) + MARGIN}
    GenerationMixin.generate(models.target, prompt, custom_generate=loop, **settings)
    return loop


def profile_for(method: Method, models: Models) -> Profile:
    """Return what passes cost with a method's drafter, measured once: with a given profile no clock decides what is drafted."""
    drafter = method.assistant_of(models)
    if drafter not in _PROFILES:
        chain = resolve_speculation({"draft_shape": "chain"}, drafter, do_sample=False)
        _PROFILES[drafter] = measure_profile(models.target, drafter, chain, models.device)
    return _PROFILES[drafter]

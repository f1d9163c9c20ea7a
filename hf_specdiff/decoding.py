"""The loop: draft, verify, accept, commit.

Letters: B batch, V vocabulary. Knows drafters through the `Drafter` protocol only.
Imported by the entry.
"""

import time
from collections.abc import Callable
from collections.abc import Iterator
from dataclasses import dataclass
from dataclasses import replace
from typing import Any

import torch
from transformers import LogitsProcessorList
from transformers.generation import GenerateDecoderOnlyOutput

from .acceptance import accept_by_block
from .acceptance import accept_by_match
from .acceptance import accept_by_ratio
from .acceptance import accept_by_walk
from .acceptance import sampled_child_law
from .acceptance import select_draft
from .draft import Acceptance
from .draft import Draft
from .draft import SpeculationStats
from .drafters import Drafter
from .sampling import Scores
from .sampling import draw
from .sampling import to_probs
from .speculation import SpeculationConfig
from .stopping import StopCheck
from .stopwatch import Stopwatch
from .target import Target
from .text import Features
from .text import Text
from .tree import DraftTree

# From a draft and the target's scores after it to what stands of the draft.
AcceptanceRule = Callable[[Draft | DraftTree, Scores], Acceptance]


@dataclass
class SpecDiffGenerateOutput(GenerateDecoderOnlyOutput):
    """The host's output of a decoder-only model, and what speculation did.

    Attributes:
        speculation (`SpeculationStats`): rounds, accepted tokens, seconds.
    """

    speculation: SpeculationStats | None = None


@dataclass(frozen=True, slots=True)
class Round:
    """What one round adds to the rows that are still running.

    Attributes:
        rows (`list[int]`): which rows of the batch these are.
        tokens (`list[list[int]]`): for each of them, accepted tokens and the bonus token, cut where the text ends.
        nodes (`list[list[int]]`): for each of them, the drafted tokens behind whose logits each new token stands; 0 is the
            anchor.
        scores (`Scores`): the target's logits of the pass.
        num_drafted (`list[int]`): tokens that were drafted for each of them; 0 for the prefill.
        draft_depths (`list[int]`): how far ahead the drafts reached.
        hidden_states (`tuple[torch.Tensor, ...]`, *optional*): of the pass, if the call wants them.
    """

    rows: list[int]
    tokens: list[list[int]]
    nodes: list[list[int]]
    scores: Scores
    num_drafted: list[int]
    draft_depths: list[int]
    hidden_states: tuple[torch.Tensor, ...] | None


def decode(
    target: Target,
    drafter: Drafter,
    accept: AcceptanceRule,
    stop: StopCheck,
    processors: LogitsProcessorList,
    text: Text,
) -> Iterator[Round]:
    """Yield the text in rounds, until a stopping criterion has ended every row.

    Args:
        target (`Target`): before its prefill.
        drafter (`Drafter`): fresh.
        accept (`AcceptanceRule`): the rule.
        stop (`StopCheck`): what ends the text.
        processors (`LogitsProcessorList`): of the target's logits.
        text (`Text`): the prompt.

    Yields:
        `Round`: the prompts' own next tokens first, then one round per draft.

    Lossless when: `accept` is lossless for the drafter's drafts. Every token is what `accept` makes of the target's processed
    logits given the text before it; nothing else reaches the text.
    """
    draft: Draft | DraftTree = Draft.nothing(text.tokens)
    logits = target.prefill(text)
    features: Features | None = None
    while True:
        # Accept: as much of the draft as the rule lets stand, then one token of the target's own.
        scores = Scores(processors, text, draft.tokens, logits)
        tokens, nodes = accept(draft, scores).new_tokens(draft.tokens)
        counts, is_done = stop.cut(text, tokens, nodes, scores)
        tokens = [row[:count] for row, count in zip(tokens, counts, strict=True)]
        nodes = [row[:count] for row, count in zip(nodes, counts, strict=True)]
        # Commit: keep the accepted keys and values in place, forget the rest; rows that have ended leave.
        features = target.commit(nodes, draft.num_tokens)
        yield Round(text.rows, tokens, nodes, scores, draft.num_drafted(), draft.deepest(), target.hidden_states)
        if all(is_done):
            return
        text = text.extended(tokens)
        if any(is_done):
            going = [index for index, done in enumerate(is_done) if not done]
            text = text.select(going)
            features = None if features is None else features.select(going)
            target.select_rows(going)
            drafter.select_rows(going)
        # Draft: what may follow, in parallel; nothing where only the target's own token still fits.
        draft = drafter.draft(text, features) if target.has_room(text) else Draft.nothing(text.tokens)
        draft = draft.to(text.tokens.device)
        # Verify: the target's logits after the anchor and after each drafted token, in one pass.
        logits = target.verify(text, draft)


def make_rule(acceptance: str, *, do_sample: bool) -> AcceptanceRule:
    """Return the acceptance rule as a function of a draft and the target's scores.

    Args:
        acceptance (`str`): `"match"`, `"ratio"`, `"block"` or `"self_selection"`.
        do_sample (`bool`): false: the target's law is a point mass on its most probable token, and all rules are the match.

    Returns:
        `AcceptanceRule`: the rule.
    """

    def accept(draft: Draft | DraftTree, scores: Scores) -> Acceptance:
        if isinstance(draft, DraftTree):
            tree = _selected(draft, scores, do_sample=do_sample) if acceptance == "self_selection" else draft
            return accept_by_walk(tree, next_token_at(tree, scores, do_sample=do_sample))
        window = scores.window()
        if not do_sample:
            return accept_by_match(draft.tokens, window.argmax(dim=-1))
        if acceptance in ("match", "self_selection"):
            return accept_by_match(draft.tokens, draw(to_probs(window)))
        if not draft.has_prefix_law:
            raise ValueError(
                f"`acceptance` must be 'match' for drafts without a prefix law, got {acceptance!r}. The drafter says that its "
                "tokens do not have, given the accepted prefix, the probabilities they were drawn with."
            )
        return {"ratio": accept_by_ratio, "block": accept_by_block}[acceptance](draft, to_probs(window))

    return accept


def next_token_at(tree: DraftTree, scores: Scores, *, do_sample: bool) -> Callable[[int, list[int]], int]:
    """Return how the target writes its next token along a path of a tree; see `accept_by_walk`.

    Args:
        tree (`DraftTree`): where a child of the path's end was drawn, the token's law is coupled with that draw.
        scores (`Scores`): of the target's pass over the tree; only those on the path are processed.
        do_sample (`bool`): false: the most probable token.

    Returns:
        `Callable`: from batch row and path to a token.
    """
    if not do_sample and not scores.processors:
        best = scores.logits.argmax(dim=-1).tolist()
        return lambda row, path: best[row][path[-1]]
    if not do_sample:
        return lambda row, path: int(scores.last(row, path).argmax())

    def next_token(row: int, path: list[int]) -> int:
        law = to_probs(scores.last(row, path))
        sampled = tree.sampled
        if sampled is not None and path[-1] in sampled.row_of[row]:
            draft_law = sampled.laws[sampled.row_of[row][path[-1]]].to(law.device)
            law = sampled_child_law(law, draft_law, sampled.token_of[row][path[-1]])
        return int(draw(law[None]))

    return next_token


def _selected(tree: DraftTree, scores: Scores, *, do_sample: bool) -> DraftTree:
    """Return the tree with each row's best draft only, by `select_draft`; the other nodes have no parent any more."""
    parents = []
    for row, drafts in enumerate(tree.drafts or []):
        path_probs: dict[int, float] = {0: 1.0}
        tokens = tree.tokens[row].tolist()
        for draft in drafts:
            laws = scores.along(row, [0, *draft[:-1]])
            laws = to_probs(laws) if do_sample else torch.nn.functional.one_hot(laws.argmax(dim=-1), laws.shape[-1])
            for node, law, parent in zip(draft, laws, [0, *draft[:-1]], strict=True):
                path_probs[node] = path_probs[parent] * float(law[tokens[node - 1]])
        chosen = set(select_draft(drafts, path_probs))
        parents.append([parent if node in chosen else -1 for node, parent in enumerate(tree.parents[row], 1)])
    return replace(tree, parents=parents)


def run(
    target: Target,
    drafter: Drafter,
    speculation: SpeculationConfig,
    stop: StopCheck,
    processors: LogitsProcessorList,
    text: Text,
    streamer: Any | None = None,
) -> SpecDiffGenerateOutput:
    """Run the loop to its end: stream, count and time what it yields.

    Args:
        target (`Target`): before its prefill.
        drafter (`Drafter`): fresh.
        speculation (`SpeculationConfig`): the rule, and what the statistics say was used.
        stop (`StopCheck`): what ends the text.
        processors (`LogitsProcessorList`): of the target's logits.
        text (`Text`): the prompt.
        streamer (`BaseStreamer`, *optional*): gets every token once, on the CPU, in order; for a single row.

    Returns:
        `SpecDiffGenerateOutput`: sequences, scores, logits, hidden states, cache (of a single row: rows of a batch leave it
            when they end) and statistics.
    """
    config, device = target.generation_config, text.tokens.device
    watches = {name: Stopwatch(device) for name in ("prefill", "draft", "verify")}
    for name, watch in watches.items():
        watch.attach(drafter if name == "draft" else target, name)
    stats = SpeculationStats(speculation.draft_shape, speculation.acceptance, [], [])
    record = Record(text, keep_logits=bool(config.return_dict_in_generate and config.output_logits))
    start = time.perf_counter()
    accept = make_rule(speculation.acceptance, do_sample=config.do_sample)
    for step, addition in enumerate(decode(target, drafter, accept, stop, processors, text)):
        record.add(addition)
        if step > 0:
            stats.num_drafted.append(addition.num_drafted)
            stats.num_accepted.append([len(tokens) - 1 for tokens in addition.tokens])
            stats.draft_depths.append(addition.draft_depths)
        if streamer is not None:
            for token in addition.tokens[0]:
                streamer.put(torch.tensor([token]))
    if streamer is not None:
        streamer.end()
    stats.prefill_seconds = watches["prefill"].seconds()
    stats.drafter_seconds = watches["draft"].seconds()
    stats.target_seconds = watches["verify"].seconds()
    stats.total_seconds = time.perf_counter() - start
    return SpecDiffGenerateOutput(
        sequences=record.sequences(config.pad_token_id),
        scores=None if stop.scores is None else stack_steps(stop.scores),
        logits=None if record.logits is None else stack_steps(record.logits),
        hidden_states=record.steps_of_states() if target.keeps_states else None,
        past_key_values=target.cache if text.num_rows == 1 else None,
        speculation=stats,
    )


class Record:
    """All that was written, row by row, until it can be put into the host's shapes.

    Args:
        text (`Text`): the prompt.
        keep_logits (`bool`): whether to keep the raw logits behind every token.
    """

    def __init__(self, text: Text, *, keep_logits: bool) -> None:
        self.prompt = text.tokens
        self.tokens: list[list[int]] = [[] for _ in range(text.num_rows)]
        self.logits: list[list[torch.Tensor]] | None = [[] for _ in range(text.num_rows)] if keep_logits else None
        self.prompt_states: tuple[torch.Tensor, ...] | None = None
        self.states: list[list[torch.Tensor]] = [[] for _ in range(text.num_rows)]

    def add(self, addition: Round) -> None:
        """Take in what a round added."""
        for index, row in enumerate(addition.rows):
            self.tokens[row] += addition.tokens[index]
            if self.logits is not None:
                self.logits[row] += addition.scores.logits[index, addition.nodes[index]].float().unbind()
        if addition.hidden_states is None:
            return
        if self.prompt_states is None:
            self.prompt_states = addition.hidden_states
            return
        for index, row in enumerate(addition.rows):
            # (layers, tokens, D), by token
            # A sharded target's layers are on several devices.
            states = torch.stack(
                [layer[index, addition.nodes[index]].to(self.prompt.device) for layer in addition.hidden_states]
            )
            self.states[row] += states.unbind(dim=1)

    def steps_of_states(self) -> tuple[tuple[torch.Tensor, ...], ...]:
        """Return hidden states as the host does: for each step and layer `(B, tokens of the step, D)`, the prompt's first."""
        assert self.prompt_states is not None
        steps = stack_steps(self.states) if any(self.states) else ()  # each (B, layers, D)
        return (self.prompt_states, *(step[:, :, None].unbind(dim=1) for step in steps))

    def sequences(self, pad_token_id: int | None) -> torch.Tensor:
        """Return prompts and new tokens, `(B, longest)`; rows that ended earlier are padded on the right."""
        longest = max(map(len, self.tokens))
        padding = 0 if pad_token_id is None else pad_token_id
        rows = [tokens + [padding] * (longest - len(tokens)) for tokens in self.tokens]
        return torch.cat([self.prompt, torch.tensor(rows, device=self.prompt.device)], dim=1)


def stack_steps(rows: list[list[torch.Tensor]]) -> tuple[torch.Tensor, ...]:
    """Turn scores by row into the host's scores by step: a tensor `(B, V)` for each step, 0 where a row had ended."""
    longest = max(map(len, rows))
    nothing = torch.zeros_like(next(row[0] for row in rows if row))
    return tuple(torch.stack([row[step] if step < len(row) else nothing for row in rows]) for step in range(longest))

"""The loop: draft, verify, settle.

Letters: B batch, V vocabulary. Knows drafters through the `Drafter` protocol only.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from dataclasses import replace
from typing import Any

import torch
from transformers import LogitsProcessorList
from transformers.generation import GenerateDecoderOnlyOutput

from .draft import Draft
from .draft import DraftTree
from .draft import Outcome
from .drafters import Drafter
from .features import Features
from .record import Record
from .record import Round
from .record import stack_steps
from .rules import AcceptanceRule
from .rules import make_rule
from .sampling import Scores
from .speculation import SpeculationConfig
from .stats import SpeculationStats
from .stats import Stopwatch
from .stopping import StopCheck
from .target import Target
from .text import Text


@dataclass
class SpecDiffGenerateOutput(GenerateDecoderOnlyOutput):
    """The host's output of a decoder-only model, and what speculation did.

    Attributes:
        speculation (`SpeculationStats`): rounds, accepted tokens, seconds.
    """

    speculation: SpeculationStats | None = None


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

    def settle(draft: Draft | DraftTree, logits: torch.Tensor) -> tuple[Round, Features | None]:
        # Accept: as much of the draft as the rule lets stand, then one token of the target's own, cut where the text ends.
        scores = Scores(processors, text, draft.tokens, logits)
        acceptance = accept(draft, scores)
        counts, is_done = stop.cut(text, acceptance.tokens, acceptance.nodes, scores)
        tokens = [row[:count] for row, count in zip(acceptance.tokens, counts, strict=True)]
        nodes = [row[:count] for row, count in zip(acceptance.nodes, counts, strict=True)]
        outcome = Outcome(draft, tokens, nodes, is_done, acceptance.target_laws)
        # Commit: keep the accepted keys and values in place, forget the rest.
        features = target.commit(nodes, draft.num_tokens)
        return Round(text.rows, outcome, scores, target.hidden_states), features

    # A drafter may do without these two; see `Drafter`.
    observe, select_rows = (getattr(drafter, name, lambda _: None) for name in ("observe", "select_rows"))
    added, features = settle(Draft.nothing(text.tokens), target.prefill(text))
    yield added
    while not all(added.outcome.is_done):
        text = text.extended(added.outcome.tokens)
        if any(added.outcome.is_done):
            going = [index for index, done in enumerate(added.outcome.is_done) if not done]
            text = text.select(going)
            features = None if features is None else features.select(going)
            target.select_rows(going)
            select_rows(going)
        # Draft: what may follow, in parallel; nothing where only the target's own token still fits.
        draft = drafter.draft(text, features) if target.has_room(text) else Draft.nothing(text.tokens)
        draft = target.cut(draft.to(text.tokens.device))
        # Verify: the target's logits after the anchor and after each drafted token, in one pass.
        added, features = settle(draft, target.verify(text, draft))
        observe(added.outcome)
        yield added


def run(
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
    """Run the loop to its end: stream, count and time what it yields.

    Args:
        target (`Target`): before its prefill.
        drafter (`Drafter`): fresh.
        speculation (`SpeculationConfig`): the rule, and what the statistics say was used.
        stop (`StopCheck`): what ends the text.
        processors (`LogitsProcessorList`): of the target's logits.
        text (`Text`): the prompt.
        streamer (`BaseStreamer`, *optional*): gets every token once, on the CPU, in order; for a single row.
        is_kept (`bool`): whether the caller gets the cache, or more of the passes than their tokens: then the target ends where
            plain decoding would have left it.

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
    accept = make_rule(speculation.acceptance, do_sample=config.do_sample, end_token_ids=stop.eos_token_ids)
    for step, addition in enumerate(decode(target, drafter, accept, stop, processors, text)):
        record.add(addition)
        outcome = addition.outcome
        if step > 0:
            stats.num_drafted.append(outcome.draft.num_drafted())
            stats.num_accepted.append([len(tokens) - 1 for tokens in outcome.tokens])
            stats.draft_depths.append(outcome.draft.deepest())
            stats.num_copied.append(outcome.num_copied())
        if streamer is not None:
            for token in outcome.tokens[0]:
                streamer.put(torch.tensor([token]))
    if streamer is not None:
        streamer.end()
    sequences = record.sequences(config.pad_token_id)
    if is_kept and (logits := target.finish(sequences)) is not None:
        _add_padding(record, stop, processors, text, sequences, logits, target.hidden_states)
    stats.prefill_seconds = watches["prefill"].seconds()
    stats.drafter_seconds = watches["draft"].seconds()
    stats.target_seconds = watches["verify"].seconds()
    stats.total_seconds = time.perf_counter() - start
    return SpecDiffGenerateOutput(
        sequences=sequences,
        scores=None if stop.scores is None else stack_steps(stop.scores),
        logits=None if record.logits is None else stack_steps(record.logits),
        hidden_states=record.steps_of_states() if target.keeps_states else None,
        past_key_values=target.cache if text.num_rows == 1 else None,
        speculation=stats,
    )


def _add_padding(
    record: Record,
    stop: StopCheck,
    processors: LogitsProcessorList,
    text: Text,
    sequences: torch.Tensor,
    logits: torch.Tensor,
    hidden_states: tuple[torch.Tensor, ...] | None,
) -> None:
    """Take in what plain decoding computes in rows that have ended, while the last one goes on.

    Args:
        record (`Record`): of all that was written; changed in place.
        stop (`StopCheck`): with the scores so far; changed in place.
        processors (`LogitsProcessorList`): of the target's logits.
        text (`Text`): the prompts.
        sequences (`torch.Tensor` of shape `(B, L)`, int64): the finished text.
        logits (`torch.Tensor` of shape `(B, n, V)`): raw logits after the last token of each row and the padding behind it.
        hidden_states (`tuple[torch.Tensor, ...]`, *optional*): of that pass.
    """
    written = text.extended(record.tokens)
    missing = [sequences.shape[1] - length for length in written.lengths]
    written = replace(written, tokens=sequences)
    padding = written.gather(written.lengths, logits.shape[1] - 1)
    scores = Scores(processors, written, padding, logits)
    nodes = [list(range(count)) for count in missing]
    stop.add(scores, nodes)
    tokens = [row[length:].tolist() for row, length in zip(sequences, written.lengths, strict=True)]
    outcome = Outcome(Draft(padding, None, has_prefix_law=True), tokens, nodes, [True] * len(nodes))
    record.add(Round(text.rows, outcome, scores, hidden_states))

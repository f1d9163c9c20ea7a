"""The loop: draft, verify, accept, commit.

Letters: B batch, L committed length, G drafted tokens, V vocabulary. Knows drafters through the `Drafter` protocol only.
Imported by the entry.
"""

import time
from collections.abc import Callable
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from transformers import LogitsProcessorList
from transformers.generation import GenerateDecoderOnlyOutput

from .acceptance import accept_by_block
from .acceptance import accept_by_match
from .acceptance import accept_by_ratio
from .draft import Acceptance
from .draft import Draft
from .draft import SpeculationStats
from .drafters import Drafter
from .sampling import draw
from .sampling import process_rows
from .sampling import to_probs
from .speculation import SpeculationConfig
from .stopping import StopCheck
from .stopwatch import Stopwatch
from .target import Target

# From a draft and the target's processed logits `(B, G + 1, V)` to what stands of the draft.
AcceptanceRule = Callable[[Draft, torch.Tensor], Acceptance]


@dataclass
class SpecDiffGenerateOutput(GenerateDecoderOnlyOutput):
    """The host's output of a decoder-only model, and what speculation did.

    Attributes:
        speculation (`SpeculationStats`): rounds, accepted tokens, seconds.
    """

    speculation: SpeculationStats | None = None


@dataclass(frozen=True, slots=True)
class Round:
    """What one round adds to the text.

    Attributes:
        tokens (`torch.Tensor` of shape `(1, n)`, int64): accepted tokens and the bonus token, cut where the text ends.
        logits (`torch.Tensor` of shape `(1, n, V)`): the target's raw logits behind each of them.
        num_drafted (`int`): tokens that were drafted; 0 for the prefill.
    """

    tokens: torch.Tensor
    logits: torch.Tensor
    num_drafted: int


def decode(
    target: Target,
    drafter: Drafter,
    accept: AcceptanceRule,
    stop: StopCheck,
    processors: LogitsProcessorList,
    input_ids: torch.Tensor,
) -> Iterator[Round]:
    """Yield the text in rounds, until a stopping criterion ends it.

    Args:
        target (`Target`): before its prefill.
        drafter (`Drafter`): fresh.
        accept (`AcceptanceRule`): the rule.
        stop (`StopCheck`): what ends the text.
        processors (`LogitsProcessorList`): of the target's logits.
        input_ids (`torch.Tensor` of shape `(1, L)`, int64): the prompt.

    Yields:
        `Round`: the prompt's own next token first, then one round per draft.

    Lossless when: `accept` is lossless for the drafter's drafts. Every token is what `accept` makes of the target's processed
    logits given the text before it; nothing else reaches the text.
    """
    nothing = Draft(input_ids[:, :0], None, has_prefix_law=True)
    logits = target.prefill(input_ids)
    scores = process_rows(processors, input_ids, nothing.tokens, logits)
    new_tokens = accept(nothing, scores).new_tokens(nothing.tokens)
    _, is_done = stop.cut(input_ids, new_tokens, scores)
    features = target.commit_prefill()
    yield Round(new_tokens, logits, num_drafted=0)
    input_ids = torch.cat([input_ids, new_tokens], dim=1)
    while not is_done:
        # Draft: a window of tokens in parallel; none where only the target's own token still fits.
        draft = drafter.draft(input_ids, target.attention_mask, features) if target.has_room(input_ids) else nothing
        draft = draft.to(input_ids.device)
        # Verify: the target's logits after the anchor and after each drafted token, in one pass.
        logits = target.verify(input_ids, draft.tokens)
        scores = process_rows(processors, input_ids, draft.tokens, logits)
        # Accept: as much of the draft as the rule lets stand, then one token of the target's own.
        new_tokens = accept(draft, scores).new_tokens(draft.tokens)
        num_tokens, is_done = stop.cut(input_ids, new_tokens, scores)
        # Commit: keep the accepted keys and values where they are, forget the rest.
        features = target.commit(num_tokens, draft.num_tokens)
        yield Round(new_tokens[:, :num_tokens], logits[:, :num_tokens], draft.num_tokens)
        input_ids = torch.cat([input_ids, new_tokens[:, :num_tokens]], dim=1)


def make_rule(acceptance: str, *, do_sample: bool) -> AcceptanceRule:
    """Return the acceptance rule as a function of a draft and the target's processed logits.

    Args:
        acceptance (`str`): `"match"`, `"ratio"` or `"block"`.
        do_sample (`bool`): false: the target's law is a point mass on its most probable token, and all rules are the match.

    Returns:
        `AcceptanceRule`: the rule.
    """
    if not do_sample:
        return lambda draft, scores: accept_by_match(draft.tokens, scores.argmax(dim=-1))
    if acceptance == "match":
        return lambda draft, scores: accept_by_match(draft.tokens, draw(to_probs(scores)))
    rule = {"ratio": accept_by_ratio, "block": accept_by_block}[acceptance]

    def accept(draft: Draft, scores: torch.Tensor) -> Acceptance:
        if not draft.has_prefix_law:
            raise ValueError(
                f"`acceptance` must be 'match' for drafts without a prefix law, got {acceptance!r}. The drafter says that its "
                "tokens do not have, given the accepted prefix, the probabilities they were drawn with."
            )
        return rule(draft, to_probs(scores))

    return accept


def run(
    target: Target,
    drafter: Drafter,
    speculation: SpeculationConfig,
    stop: StopCheck,
    processors: LogitsProcessorList,
    input_ids: torch.Tensor,
    streamer: Any | None = None,
) -> SpecDiffGenerateOutput:
    """Run the loop to its end: stream, count and time what it yields.

    Args:
        target (`Target`): before its prefill.
        drafter (`Drafter`): fresh.
        speculation (`SpeculationConfig`): the rule, and what the statistics say was used.
        stop (`StopCheck`): what ends the text.
        processors (`LogitsProcessorList`): of the target's logits.
        input_ids (`torch.Tensor` of shape `(1, L)`, int64): the prompt.
        streamer (`BaseStreamer`, *optional*): gets every token once, on the CPU, in order.

    Returns:
        `SpecDiffGenerateOutput`: sequences, scores, logits, cache and statistics.
    """
    config = target.generation_config
    watches = {
        "prefill": Stopwatch(input_ids.device),
        "draft": Stopwatch(input_ids.device),
        "verify": Stopwatch(input_ids.device),
    }
    watches["prefill"].attach(target, "prefill")
    watches["draft"].attach(drafter, "draft")
    watches["verify"].attach(target, "verify")
    stats = SpeculationStats(speculation.draft_shape, speculation.acceptance, [], [])
    raw_logits: list[torch.Tensor] | None = [] if config.return_dict_in_generate and config.output_logits else None
    tokens = [input_ids]
    start = time.perf_counter()
    accept = make_rule(speculation.acceptance, do_sample=config.do_sample)
    for step, addition in enumerate(decode(target, drafter, accept, stop, processors, input_ids)):
        tokens.append(addition.tokens)
        if step > 0:
            stats.num_drafted.append([addition.num_drafted])
            stats.num_accepted.append([addition.tokens.shape[1] - 1])
        if raw_logits is not None:
            raw_logits.extend(addition.logits.float().unbind(dim=1))
        if streamer is not None:
            for token in addition.tokens.cpu().unbind(dim=1):
                streamer.put(token)
    if streamer is not None:
        streamer.end()
    stats.prefill_seconds = watches["prefill"].seconds()
    stats.drafter_seconds = watches["draft"].seconds()
    stats.target_seconds = watches["verify"].seconds()
    stats.total_seconds = time.perf_counter() - start
    return SpecDiffGenerateOutput(
        sequences=torch.cat(tokens, dim=1),
        scores=stop.scores,
        logits=None if raw_logits is None else tuple(raw_logits),
        past_key_values=target.cache,
        speculation=stats,
    )

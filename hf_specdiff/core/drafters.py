"""The drafter as a decoding loop knows it, and how a masked-diffusion network fills a window.

Letters: B batch, G drafted tokens, T denoising steps, V vocabulary, D hidden size, K target layers read. Knows the network by
duck typing only (a class loaded from the Hub is another class object than the installed one).
"""

from collections.abc import Set
from typing import Any
from typing import Protocol

import torch
from transformers import LogitsProcessorList

from .cache import RaggedCache
from .cache import context_cache
from .cache import grouped_heads
from .draft import Conditionals
from .draft import Draft
from .draft import DraftTree
from .draft import Outcome
from .features import Features
from .sampling import ID_BLIND
from .sampling import draw
from .sampling import draw_from_scores
from .sampling import is_prefix_free
from .sampling import prefix_free_part
from .sampling import process_if_taken
from .sampling import process_without_prefix
from .sampling import processors_of_row
from .sampling import to_float
from .sampling import to_probs
from .speculation import SpeculationConfig
from .text import Text
from .text import at_places
from .text import to_device

# Positions that are embedded ahead.
TABLE_ROOM = 256


class Drafter(Protocol):
    """Proposes tokens that follow a committed text. Nothing it does can change what is generated, only how fast.

    These two names are all that an object needs to be given to `generate` as `assistant_model`. Where it has them too, the loop
    calls `observe(outcome)` with what became of each draft (an `Outcome`), once a round; and, in batches, `select_rows(rows)`
    before the next draft when rows have ended: with the places, counted from 0, of those that go on.

    Attributes:
        target_layer_ids (`list[int]`, *optional*): target layers whose hidden states `draft` wants; `None` for none.
    """

    target_layer_ids: list[int] | None

    def draft(self, text: Text, features: Features | None) -> Draft | DraftTree:
        """Draft the tokens that follow a text.

        Args:
            text (`Text`): the committed text; calls of one generation only extend it.
            features (`Features`, *optional*): hidden states of the tokens that the target has processed since the last call;
                the anchor, the last token, is never among them.

        Returns:
            `Draft` or `DraftTree`: a draft of nothing (`Draft.nothing(text.tokens)`) where nothing is worth verifying.

        Lossless when: any draft is lossless under the match rule; `Draft.has_prefix_law` says whether the other rules may
        be used.
        """
        ...


class Shaper(Protocol):
    """Decides how much of a pass is drafted and in which shape; see `DraftShaper`."""

    def without_pass(self, text: Text, max_length: int | None) -> Draft | DraftTree | None:
        """Begin a round, and return its draft where that needs no pass."""
        ...

    def chain_plan(
        self, scores: torch.Tensor, laws: Conditionals | None = None
    ) -> tuple[int, list[list[float]] | None, list[list[int]] | None]:
        """Return how many tokens of a chain to verify, what the budget goes by, and the copied tokens it begins with."""
        ...

    def draft(self, scores: torch.Tensor) -> Draft | DraftTree:
        """Return many drafts from the marginals of one pass."""
        ...

    def draft_in_order(self, laws: Conditionals) -> Draft | DraftTree:
        """Return many drafts from laws that are given the token before."""
        ...

    def observe(self, outcome: Outcome) -> None:
        """Take in what became of the last draft."""
        ...


class DenoisingDrafter:
    """Draft with a masked-diffusion network: a window [anchor, mask x gamma], revealed in T passes.

    Subclasses say how the committed text conditions the window: `window_logits`; where `knows_token_before`, how the token
    before conditions the next: `step`; and, where `has_confidence`, how likely a token is accepted: `confidence`. A drafter
    serves one generation.

    Args:
        network (`SpecDiffDrafter`): the network.
        speculation (`SpeculationConfig`): gamma, denoising steps, reveal order, draft temperature.
        logits_processor (`LogitsProcessorList`): the target's; applied to the draft law as well, so that it stays close.
        max_length (`int`, *optional*): most tokens of the finished text; no draft reaches past it.
        shaper (`Shaper`, *optional*): how much to draft and in which shape; by default chains of the whole window.
        end_token_ids (`set[int]`): with one of them a text ends; processors are asked nothing about what follows one.

    Lossless when: see `Draft.has_prefix_law`; drawn tokens revealed by confidence in several steps have no prefix law.
    Source: arXiv:2408.05636, section 4.
    """

    def __init__(
        self,
        network: Any,
        speculation: SpeculationConfig,
        logits_processor: LogitsProcessorList,
        max_length: int | None = None,
        shaper: Shaper | None = None,
        end_token_ids: Set[int] = frozenset(),
    ) -> None:
        self.network = network
        self.end_token_ids = end_token_ids
        self.speculation = speculation
        self.max_length = max_length
        self.shaper = shaper
        self.target_layer_ids = network.config.target_layer_ids
        self.mask_token_id = network.config.mask_token_id
        self.cache = context_cache(network.config)
        self.rows: RaggedCache | None = None  # from the first draft on, which tells how many rows there are
        self.passes: Any = None  # `StaticPasses`, where they are compiled
        self._is_first = True
        self.knows_token_before = False
        self.has_memory = False  # whether a law hangs on more tokens than the one before
        self.has_confidence = False
        self._unseen: list[Features] = []
        self._masks: torch.Tensor | None = None  # of the last window
        self._tables: tuple[torch.Tensor, torch.Tensor] | None = None  # of the first positions; see `position_tables`
        self.device = network.device  # read once: the host goes through the weights for it
        self._home = network.device  # where the target's processors hold their tensors
        # A tree's positions have many prefixes, and out of order a prefix is not known yet: nothing for a processor to read.
        reads_prefixes = speculation.draft_shape == "chain" and speculation.reveals_in_order
        self.processors = logits_processor if reads_prefixes else prefix_free_part(logits_processor)
        # Whether each position has some token left to draw, whatever the logits.
        self._is_never_dead = not self.processors

    def compile(self, passes: Any) -> None:
        """Let a compiled pass of one width do the work; before the first draft.

        Args:
            passes (`StaticPasses`): of this drafter's network; its cache takes the place of the drafter's own.
        """
        self.passes, self.cache, self.rows = passes, passes.cache, passes.rows

    @torch.no_grad()
    def draft(self, text: Text, features: Features | None) -> Draft | DraftTree:
        """Draft one window; see `Drafter.draft`."""
        if features is not None:
            self._unseen.append(features)
        settled = None if self.shaper is None else self.shaper.without_pass(text, self.max_length)
        if settled is not None:
            return settled
        self._home = text.tokens.device
        text = text.to(self.device)
        if self.rows is None:
            self.rows = RaggedCache(self.cache, text.num_rows)
        gamma = self._window_gamma(min(text.lengths))
        # A compiled pass is as wide at the end of a text as elsewhere.
        width = gamma if self.passes is None else self.speculation.gamma
        if self._masks is None or self._masks.shape != (text.num_rows, width):
            self._masks = text.tokens.new_full((text.num_rows, width), self.mask_token_id)
        window = torch.cat([text.anchors(), self._masks], dim=1)
        unseen, self._unseen = self._unseen, []
        with grouped_heads(self.device.type == "cpu", width + 1):
            logits = self.window_logits(window, text, Features.join(unseen) if unseen else None)
        if width > gamma:
            window, logits = window[:, : gamma + 1], logits[:, :gamma]
        is_first, self._is_first = self._is_first, False
        if is_first and bool(logits.isnan().any()):
            raise ValueError(
                "`assistant_model` must give numbers as logits, got nan. Are its weights finite, and is its dtype wide enough?"
            )
        return self._shaped(text, window, logits)

    def observe(self, outcome: Outcome) -> None:
        """Hand on what became of the last draft; see `Drafter`."""
        if self.shaper is not None:
            self.shaper.observe(outcome)

    def _shaped(self, text: Text, window: torch.Tensor, logits: torch.Tensor) -> Draft | DraftTree:
        """Turn the first pass into a draft of the shape that was asked for."""
        shaper, speculation = self.shaper, self.speculation
        is_in_order = self.knows_token_before or self.has_confidence
        if speculation.draft_shape != "chain":
            assert shaper is not None
            if is_in_order:
                return shaper.draft_in_order(self._conditionals(text, logits))
            return shaper.draft(self._free_scores(logits))
        steps = reveal_counts(window.shape[1] - 1, speculation.num_denoising_steps)
        if len(steps) > 1:
            return self._denoise(text, window, logits, steps)
        if shaper is None:
            count, values, copied = logits.shape[1], None, None
        else:
            laws = self._conditionals(text, logits, is_processed=False) if is_in_order else None
            count, values, copied = shaper.chain_plan(self._without_mask(logits), laws)
        tokens, probs = self._draw_in_order(text, window[:, 1:1], logits, may_stop=True, copied=copied)
        nodes = None if copied is None else [list(range(1, len(row) + 1)) for row in copied]
        return Draft(tokens, probs, speculation.has_prefix_law, values, nodes).first(min(count, tokens.shape[1]))

    def select_rows(self, rows: list[int]) -> None:
        """Keep some rows; see `Drafter`."""
        self._unseen = [features.select(rows) for features in self._unseen]
        if self.rows is not None:
            self.rows.select(rows)

    def _window_gamma(self, length: int) -> int:
        """Return the tokens worth drafting: the target always adds one more after them."""
        gamma = self.speculation.gamma
        return gamma if self.max_length is None else max(1, min(gamma, self.max_length - length - 1))

    def _denoise(self, text: Text, window: torch.Tensor, logits: torch.Tensor, steps: list[int]) -> Draft:
        """Reveal the window step by step, one pass each; `window` `(B, G + 1)` is filled in place.

        Args:
            text (`Text`): committed.
            window (`torch.Tensor` of shape `(B, G + 1)`, int64): anchor and masks.
            logits (`torch.Tensor` of shape `(B, G, V)`): of the first pass.
            steps (`list[int]`): positions revealed at each step.

        Returns:
            `Draft`: the filled window; its probabilities are those of the step that revealed each token.
        """
        tokens = window[:, 1:]  # a view: what is revealed is in the next pass's input
        revealed = torch.zeros_like(tokens, dtype=torch.bool)
        laws = torch.zeros(*tokens.shape, logits.shape[-1], device=logits.device, dtype=torch.float32)
        is_drawn = self.speculation.draft_temperature > 0
        for step, count in enumerate(steps):
            if step > 0:
                logits = self.window_logits(window, text, None)
            proposed, probs, chosen = self._reveal(text, tokens, logits, revealed, count)
            tokens.masked_scatter_(chosen, proposed[chosen])
            if probs is not None:
                laws[chosen] = probs[chosen]
            revealed |= chosen
        return Draft(tokens.clone(), laws if is_drawn else None, self.speculation.has_prefix_law)

    def _reveal(
        self, text: Text, tokens: torch.Tensor, logits: torch.Tensor, revealed: torch.Tensor, count: int
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
        """Return proposed tokens `(B, G)`, their laws `(B, G, V)` or `None`, and the positions to reveal now `(B, G)`."""
        if self.speculation.reveal_order == "left_to_right":
            done = int(revealed[0].sum())
            chosen = reveal_left_to_right(revealed, count)
            drawn, probs = self._draw_in_order(text, tokens[:, :done], logits[:, done : done + count])
            proposed = tokens.masked_scatter(chosen, drawn)
            if probs is not None:
                probs = logits.new_zeros(logits.shape, dtype=probs.dtype).masked_scatter(chosen[:, :, None], probs)
            return proposed, probs, chosen
        scores = self._free_scores(logits)
        proposed, probs = draw_from_scores(scores, self.speculation.draft_temperature)
        confidence = (to_probs(scores) if probs is None else probs).gather(2, proposed[:, :, None]).squeeze(2)
        return proposed, probs, reveal_by_confidence(confidence, revealed, count)

    def _draw_in_order(
        self,
        text: Text,
        prefix: torch.Tensor,
        logits: torch.Tensor,
        *,
        may_stop: bool = False,
        copied: list[list[int]] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Draw the tokens of consecutive positions.

        Args:
            text (`Text`): committed.
            prefix (`torch.Tensor` of shape `(B, m)`, int64): window tokens already revealed, left of the positions.
            logits (`torch.Tensor` of shape `(B, n, V)`): raw logits of the positions.
            may_stop (`bool`): whether fewer tokens will do, where the draft has ended in every row: behind an end token, or
                where the processors do not take it. A row that has ended before others goes on without processors.
            copied (`list[list[int]]`, *optional*): for each row, tokens that its first positions have in any case.

        Returns:
            `tuple`: tokens `(B, n)` and probabilities `(B, n, V)`, or `None` for a point mass.
        """
        temperature = self.speculation.draft_temperature
        if not self.knows_token_before and is_prefix_free(self.processors):
            return _with_copied(*draw_from_scores(self._free_scores(logits), temperature), copied)
        if not self.has_memory and is_prefix_free(self.processors):
            return self._drawn_from_tables(text, logits, copied)
        tokens, probs, memory = prefix, [], None
        is_open = [not self.end_token_ids & set(row) for row in prefix.tolist()]
        for i in range(logits.shape[1]):
            raw = logits[:, i]
            if self.knows_token_before:
                previous = tokens[:, -1] if tokens.shape[1] else text.anchors()[:, 0]
                raw, memory = self.step(raw, i, list(range(len(raw))), previous, memory)
            scores, is_open = self._scores_after(text, tokens, raw, is_open)
            if may_stop and i > 0 and not any(is_open):
                break
            token, law = draw_from_scores(scores[:, None], temperature)
            token, law = _with_copied(token, law, None if copied is None else [row[i : i + 1] for row in copied])
            is_open = [
                going and drawn not in self.end_token_ids for going, (drawn,) in zip(is_open, token.tolist(), strict=True)
            ]
            tokens = torch.cat([tokens, token], dim=1)
            probs.append(law)
            if may_stop and not any(is_open):
                break
        return tokens[:, prefix.shape[1] :], None if probs[0] is None else torch.cat(probs, dim=1)

    def _drawn_from_tables(
        self, text: Text, logits: torch.Tensor, copied: list[list[int]] | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Draw, from left to right, the tokens of a drafter that knows the token before and no others.

        The laws behind each likely token are computed at once, and one by one only those behind others.

        Args:
            text (`Text`): committed.
            logits (`torch.Tensor` of shape `(B, n, V)`): raw logits of the positions.
            copied (`list[list[int]]`, *optional*): as `_draw_in_order`.

        Returns:
            as `_draw_in_order`; fewer tokens where an end token stands in every row.
        """
        laws, temperature = self._conditionals(text, logits), self.speculation.draft_temperature
        known: dict[tuple[int, ...], Any] = {}  # by row, position and token before: a law `(V,)`, or its likeliest token

        def ask(positions: torch.Tensor, rows: torch.Tensor, tokens: torch.Tensor) -> None:
            found: list[Any]
            if temperature == 0:
                scores, ids = laws.drafted_scores(positions, rows, tokens)
                best = scores.argmax(dim=-1)
                found = (best if ids is None else ids[best]).tolist()
            else:
                scores, _ = laws.step(positions, rows, tokens, None)
                found = list(to_probs(scores, temperature).unbind())
            keys = torch.stack([rows, positions, tokens], dim=1).tolist()
            known.update((tuple(key), value) for key, value in zip(keys, found, strict=True))

        ask(*laws.likely(copied))
        chains = [[anchor] for anchor in laws.anchors.tolist()]
        drawn_from: list[torch.Tensor] = []
        for position in range(laws.gamma):
            keys = [(row, position, chain[-1]) for row, chain in enumerate(chains)]
            if missing := [key for key in keys if key not in known]:
                rows, _, tokens = to_device(list(zip(*missing, strict=True)), logits.device)
                ask(torch.full_like(rows, position), rows, tokens)
            drawn = [known[key] for key in keys]
            if temperature > 0:
                drawn_from.append(torch.stack(drawn))
                drawn = draw(drawn_from[-1]).tolist()
            for row, (chain, token) in enumerate(zip(chains, drawn, strict=True)):
                own = [] if copied is None else copied[row]
                chain.append(own[position] if position < len(own) else token)
            if all(self.end_token_ids & set(chain[1:]) for chain in chains):
                break
        written = to_device([chain[1:] for chain in chains], logits.device)
        known_copies = None if copied is None else [row[: written.shape[1]] for row in copied]
        return _with_copied(written, torch.stack(drawn_from, dim=1) if drawn_from else None, known_copies)

    def _scores_after(
        self, text: Text, drafted: torch.Tensor, logits: torch.Tensor, is_open: list[bool]
    ) -> tuple[torch.Tensor, list[bool]]:
        """Return one position's logits `(B, V)` after the processors, and which rows go on.

        Processors may read the text and what was drafted `(B, m)`. A row that has ended, or whose draft they do not take, goes
        on without them.
        """
        if is_prefix_free(self.processors):
            return self._free_scores(logits[:, None])[:, 0], is_open
        logits = self._without_mask(logits)
        rows, goes_on = [], list(is_open)
        for row, place in enumerate(text.rows):
            own, scores = logits[row : row + 1].to(self._home), None
            if is_open[row]:
                ids = torch.cat([text.row(row), drafted[row : row + 1]], dim=1)
                scores = process_if_taken(processors_of_row(self.processors, place), ids.to(self._home), own.clone())
                goes_on[row] = scores is not None
            rows.append(own if scores is None else scores)
        return _alive(torch.cat(rows).to(logits.device)), goes_on

    def _conditionals(self, text: Text, logits: torch.Tensor, *, is_processed: bool = True) -> Conditionals:
        """Return the laws of a pass with the raw logits `(B, G, V)`, given the token before each; or laws before processors."""

        def step(
            index: Any, rows: Any, previous: torch.Tensor, memory: torch.Tensor | None
        ) -> tuple[torch.Tensor, torch.Tensor | None]:
            own = at_places(logits, rows, index)
            raw, memory = self.step(own, index, rows, previous, memory) if self.knows_token_before else (own, memory)
            return self._free_scores(raw[:, None])[:, 0] if is_processed else self._without_mask(raw), memory

        marginals, confidence = None if self.has_memory else logits, self.confidence if self.has_confidence else None
        ids = self.network.drafted_ids if is_processed and self.has_columns else None
        if ids is None:
            return Conditionals(step, text.anchors()[:, 0], logits.shape[1], marginals, confidence)
        columns = to_float(logits[..., ids]).masked_fill(ids == self.mask_token_id, -torch.inf)

        def drafted_step(positions: torch.Tensor, rows: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
            raw, _ = self.step(at_places(columns, rows, positions), positions, rows, tokens, None)
            return self._processed(raw)

        return Conditionals(step, text.anchors()[:, 0], logits.shape[1], marginals, confidence, ids, drafted_step)

    @property
    def has_columns(self) -> bool:
        """Whether the laws of a reduced vocabulary may be had without its others: no processor tells tokens apart."""
        return self.knows_token_before and not self.has_memory and all(type(one) in ID_BLIND for one in self.processors)

    def step(
        self, logits: torch.Tensor, index: Any, rows: Any, previous: torch.Tensor, memory: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the raw logits of positions given the token before each.

        Args:
            logits (`torch.Tensor` of shape `(n, V)`): of the positions by themselves.
            index (`int` or `torch.Tensor` of shape `(n,)`): the position, 0 to G - 1; one of each, unless `has_memory`.
            rows (`list[int]` or `torch.Tensor` of shape `(n,)`): which rows of the batch these are; several may be the same.
            previous (`torch.Tensor` of shape `(n,)`, int64): the token before it; at position 0 the anchor.
            memory (`torch.Tensor`, *optional*): what this returned for the position before.

        Returns:
            `tuple`: logits `(n, V)`, and the memory for the next position.
        """
        raise NotImplementedError

    def confidence(self, index: Any, rows: Any, previous: torch.Tensor) -> torch.Tensor:
        """Return how likely the target is to accept a token that is drawn from a position's law.

        Args:
            index (`int` or `torch.Tensor` of shape `(n,)`): the position, 0 to G - 1.
            rows (`list[int]` or `torch.Tensor` of shape `(n,)`): which rows of the batch these are; several may be the same.
            previous (`torch.Tensor` of shape `(n,)`, int64): the token before it; at position 0 the anchor.

        Returns:
            `torch.Tensor` of shape `(n,)`, float32: from 0 to 1.
        """
        raise NotImplementedError

    def _free_scores(self, logits: torch.Tensor) -> torch.Tensor:
        """Return logits after the processors, none of which reads a prefix, `(B, n, V)` float32."""
        return self._processed(self._without_mask(logits))

    def _processed(self, scores: torch.Tensor) -> torch.Tensor:
        """Return float32 logits after the processors, as `_free_scores`."""
        if self._is_never_dead:
            return scores
        return _alive(process_without_prefix(self.processors, scores.to(self._home)).to(scores.device))

    def _without_mask(self, logits: torch.Tensor) -> torch.Tensor:
        """Return float32 logits in which the mask id cannot be drafted."""
        logits = to_float(logits)
        if self.mask_token_id < logits.shape[-1]:
            logits[..., self.mask_token_id] = -torch.inf  # in place: they are the drafter's own, fresh from a pass
        return logits

    def window_logits(self, window: torch.Tensor, text: Text, features: Features | None) -> torch.Tensor:
        """Take new context into the cache, run one pass over the window and forget the window again.

        Args:
            window (`torch.Tensor` of shape `(B, G + 1)`, int64): anchor, revealed tokens and masks.
            text (`Text`): committed; its last token is the anchor.
            features (`Features`, *optional*): of the new context.

        Returns:
            `torch.Tensor` of shape `(B, G, V)`: row `i` predicts window slot `i + 1`.
        """
        raise NotImplementedError

    def num_columns(self, counts: list[int]) -> int:
        """Return how many context tokens a pass reads, filler included, that adds some of them to each row."""
        return max(counts) if self.passes is None else self.passes.num_columns(counts)

    def layout(self, text: Text, counts: list[int], window_size: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return where a pass stands in the text: positions of its tokens and the mask of its keys.

        The keys of a pass are the cached context, the new context, and the window, whose slot 0 is the anchor, the text's last
        token. Rows with less new context than others have filler behind it. The context may begin after the text does, where
        the target started from a filled cache.

        Args:
            text (`Text`): committed.
            counts (`list[int]`): for each row the context tokens that this pass adds.
            window_size (`int`): G + 1.

        Returns:
            `tuple`: positions `(1 or B, new + G + 1)` int64, not counting padding; mask `(B, keys)` bool, or `None`: all seen.
        """
        assert self.rows is not None
        device, num_new = text.tokens.device, self.num_columns(counts)
        if text.num_rows == 1 and text.prompt_mask is None and self.passes is None:
            anchor = text.lengths[0] - 1
            return torch.arange(anchor - num_new, anchor + window_size, device=device)[None], None
        anchors = to_device(text.lengths, device)[:, None] - 1
        added = to_device(counts, device)[:, None]
        slots = torch.arange(num_new, device=device)
        positions = torch.cat([anchors - added + slots, anchors + torch.arange(window_size, device=device)], dim=1)
        # Slot j of the context is token `start + j` of the text, in every row.
        start = text.lengths[0] - 1 - counts[0] - self.rows.ends[0]
        is_new, is_text = slots < added, text.is_text(start, self.rows.length + num_new)
        if is_text is not None:
            is_new = is_new & is_text.gather(1, to_device(self.rows.ends, device)[:, None] + slots)
        window = torch.ones(text.num_rows, window_size, dtype=torch.bool, device=device)
        key_mask = torch.cat([self.rows.seen(text, start), is_new, window], dim=1)
        return (positions - text.num_padding()).clamp(min=0), key_mask

    def position_tables(self, text: Text, num_new: int, window_size: int) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Return the network's `position_tables` of a pass, looked up: one row's positions go on from round to round.

        Args:
            text (`Text`): committed.
            num_new (`int`): context tokens that this pass adds.
            window_size (`int`): G + 1.

        Returns:
            `tuple`, *optional*: `None` where the pass computes them itself.
        """
        is_one = text.num_rows == 1 and text.prompt_mask is None and self.passes is None
        if not is_one or not self.network.has_fixed_rotations:
            return None
        start = text.lengths[0] - 1 - num_new
        end = start + num_new + window_size
        if self._tables is None or self._tables[0].shape[2] < end:
            positions = torch.arange(end + TABLE_ROOM, device=self.device)[None]
            self._tables = self.network.position_tables(self.network.norm.weight, positions)
        cos, sin = self._tables
        return cos.narrow(2, start, end - start), sin.narrow(2, start, end - start)

    def cached_positions(self, text: Text, counts: list[int]) -> torch.Tensor | None:
        """Return the positions of the cached context, `(B, cached)` int64; `None`: those right before the new ones."""
        assert self.rows is not None
        if text.num_rows == 1 and text.prompt_mask is None:
            return None
        start = text.lengths[0] - 1 - counts[0] - self.rows.ends[0]
        return start + torch.arange(self.rows.length, device=text.tokens.device) - text.num_padding()

    def keep_context(self, counts: list[int]) -> None:
        """Keep the new context of the last pass in the cache, forget its window."""
        assert self.rows is not None
        self.rows.keep([list(range(count)) for count in counts])


def _with_copied(
    tokens: torch.Tensor, probs: torch.Tensor | None, copied: list[list[int]] | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Put tokens in the place of the first that were drawn; each is a point mass then. What is given is changed in place."""
    for row, own in enumerate(copied or []):
        count = len(own)
        if count == 0:
            continue
        tokens[row, :count] = torch.tensor(own, device=tokens.device)
        if probs is not None:
            probs[row, :count] = 0.0
            probs[row, range(count), own] = 1.0
    return tokens, probs


def _alive(scores: torch.Tensor) -> torch.Tensor:
    """Return scores `(..., V)` that leave something to draw: any law will do where processors forbid all that is drafted."""
    is_dead = (scores == -torch.inf).all(dim=-1, keepdim=True)
    return scores.masked_fill(is_dead, 0.0)


def reveal_counts(gamma: int, num_denoising_steps: int) -> list[int]:
    """Split a window over the steps as evenly as possible, earlier steps first.

    Args:
        gamma (`int`): G, positions to reveal.
        num_denoising_steps (`int`): T; a window shorter than T takes G steps.

    Returns:
        `list[int]`: positions revealed at each step, all positive, summing to G.
    """
    num_steps = min(gamma, num_denoising_steps)
    return [(gamma + step) // num_steps for step in range(num_steps)][::-1]


def reveal_left_to_right(revealed: torch.Tensor, count: int) -> torch.Tensor:
    """Choose the next `count` hidden positions from the left.

    Args:
        revealed (`torch.Tensor` of shape `(B, G)`, bool): positions fixed so far.
        count (`int`): positions to choose in each row, at most the hidden ones.

    Returns:
        `torch.Tensor` of shape `(B, G)`, bool: the chosen positions, none of them revealed before.
    """
    rank = (~revealed).cumsum(dim=1)
    return ~revealed & (rank <= count)


def reveal_by_confidence(confidence: torch.Tensor, revealed: torch.Tensor, count: int) -> torch.Tensor:
    """Choose the `count` hidden positions that the drafter is surest of.

    Args:
        confidence (`torch.Tensor` of shape `(B, G)`, float32): probability of the token proposed at each position.
        revealed (`torch.Tensor` of shape `(B, G)`, bool): positions fixed so far.
        count (`int`): positions to choose in each row, at most the hidden ones.

    Returns:
        `torch.Tensor` of shape `(B, G)`, bool: the chosen positions, none of them revealed before.

    Source: arXiv:2408.05636 drafts with a masked diffusion model; the order by confidence is MaskGIT's, arXiv:2202.04200.
    """
    best = confidence.masked_fill(revealed, -1.0).topk(count, dim=1).indices
    return torch.zeros_like(revealed).scatter(1, best, True)

"""What a diffusion language model reads of the text in a round, and what it keeps of it for the next.

Letters: B batch, G drafted tokens, V vocabulary. Knows caches and a clock, no model.
"""

import time
from collections.abc import Set
from dataclasses import dataclass
from dataclasses import field
from typing import Any

import torch
from transformers import LogitsProcessorList

from hf_specdiff.core.cache import RaggedCache
from hf_specdiff.core.cache import context_cache
from hf_specdiff.core.draft import Draft
from hf_specdiff.core.draft import DraftTree
from hf_specdiff.core.draft import Outcome
from hf_specdiff.core.drafters import DenoisingDrafter
from hf_specdiff.core.drafters import Shaper
from hf_specdiff.core.features import Features
from hf_specdiff.core.speculation import SpeculationConfig
from hf_specdiff.core.text import Text

CONTEXT_CACHES = ("auto", "exact", "prefix")
# A kept text has not seen what came after it. After this many new tokens it is read anew.
REFRESH_EVERY = 256
# Rounds of each kind by which "auto" decides, for texts of one length up to twice that.
NUM_TRIALS = 4


@dataclass
class ContextChoice:
    """Which of two ways brings more tokens per second, by what rounds took so far.

    Reading everything anew becomes dearer as the text grows, so that each doubling of it is tried for itself.

    Attributes:
        tally (`dict`): by doubling and way: rounds, tokens, seconds.
    """

    tally: dict[tuple[int, str], list[float]] = field(default_factory=dict)

    def pick(self, length: int) -> str:
        """Return `"exact"` or `"prefix"` for a text of so many tokens."""
        tallies = {way: self.tally.get((length.bit_length(), way), [0, 0, 1]) for way in ("exact", "prefix")}
        untried = [way for way, (rounds, _, _) in tallies.items() if rounds < NUM_TRIALS]
        return untried[0] if untried else max(tallies, key=lambda way: tallies[way][1] / tallies[way][2])

    def add(self, length: int, way: str, num_tokens: int, seconds: float) -> None:
        """Take in a round."""
        rounds, tokens, before = self.tally.get((length.bit_length(), way), [0, 0, 0])
        self.tally[length.bit_length(), way] = [rounds + 1, tokens + num_tokens, before + seconds]


class LanguageModelDrafter(DenoisingDrafter):
    """Draft with a masked diffusion language model.

    Args:
        network (`DiffusionDrafter`): the network.
        speculation (`SpeculationConfig`): as `DenoisingDrafter`.
        logits_processor (`LogitsProcessorList`): as `DenoisingDrafter`.
        max_length (`int`, *optional*): as `DenoisingDrafter`.
        shaper (`Shaper`, *optional*): as `DenoisingDrafter`.
        end_token_ids (`set[int]`): as `DenoisingDrafter`.
        target_vocab_size (`int`, *optional*): V.

    Source: arXiv:2408.05636, arXiv:2511.00606.
    """

    def __init__(
        self,
        network: Any,
        speculation: SpeculationConfig,
        logits_processor: LogitsProcessorList,
        max_length: int | None = None,
        shaper: Shaper | None = None,
        end_token_ids: Set[int] = frozenset(),
        *,
        target_vocab_size: int | None = None,
    ) -> None:
        super().__init__(network, speculation, logits_processor, max_length, shaper, end_token_ids)
        self.vocab_size = target_vocab_size
        self.way = network.context_cache
        self._read_at = 0  # length of the text when all of it was last read
        # Length of the text and start of a round that counts, if it comes to a pass.
        self._begun: tuple[int, float] | None = None
        self._round: tuple[int, float] | None = None

    @torch.no_grad()
    def draft(self, text: Text, features: Features | None) -> Draft | DraftTree:
        """Draft one window; see `Drafter.draft`."""
        length, is_chosen = max(text.lengths), self.network.context_cache == "auto"
        way = self.network.choice.pick(length) if is_chosen else self.way
        if self.rows is None or way != self.way or length - self._read_at >= REFRESH_EVERY:
            self._forget(length)
        self.way = way
        # A round in which all of the text is read for keeping says nothing about those that follow.
        counts = is_chosen and (way == "exact" or (self.rows is not None and any(self.rows.ends)))
        self._begun, self._round = ((length, time.perf_counter()) if counts else None), None
        return super().draft(text, features)

    def observe(self, outcome: Outcome) -> None:
        """Note what the round brought; see `Drafter`."""
        super().observe(outcome)
        if self._round is not None:
            length, start = self._round
            self.network.choice.add(length, self.way, sum(map(len, outcome.tokens)), time.perf_counter() - start)

    def _forget(self, length: int) -> None:
        """Begin the context anew, with the text at a length."""
        self._read_at = length
        if self.rows is not None:
            self.cache = context_cache(self.network.config)
            self.rows = RaggedCache(self.cache, len(self.rows.ends))

    def window_logits(self, window: torch.Tensor, text: Text, features: Features | None) -> torch.Tensor:
        """Run the body over what it has not kept of the text, and the window; see `DenoisingDrafter.window_logits`."""
        assert self.rows is not None
        self._round = self._begun
        counts = [length - 1 - end for length, end in zip(text.lengths, self.rows.ends, strict=True)]
        position_ids, key_mask = self.layout(text, counts, window.shape[1])
        outputs = self.network(
            torch.cat([text.gather(self.rows.ends, max(counts)), window], dim=1),
            attention_mask=key_mask,
            position_ids=position_ids,
            past_key_values=self.cache if self.keeps_text else None,
            window_size=window.shape[1],
            text_sees_window=self.way == "exact",
            vocab_size=self.vocab_size,
        )
        if self.keeps_text:
            self.keep_context(self._final(text, counts))
        return outputs.logits

    @property
    def keeps_text(self) -> bool:
        """Whether anything of the text is kept: where all see all, each new token changes what the others are."""
        return self.way == "prefix" or self.network.block_length is not None

    def select_rows(self, rows: list[int]) -> None:
        """Keep some rows; see `Drafter`."""
        super().select_rows(rows)
        if self.rows is not None and self.rows.length == 0:
            self._forget(self._read_at)  # the host selects no rows in a cache that has been emptied (transformers 5.23)

    def _final(self, text: Text, counts: list[int]) -> list[int]:
        """Return how much of each row's new context nothing that comes later will change."""
        if self.way == "prefix":
            return counts
        assert self.rows is not None
        length, padding = self.network.block_length, text.num_padding()
        pads = [0] * len(counts) if isinstance(padding, int) else padding[:, 0].tolist()
        # Up to the anchor all is text: a block that ends there or before has seen all that it ever will.
        ends = [pad + (total - pad) // length * length for pad, total in zip(pads, text.lengths, strict=True)]
        return [max(0, min(count, end - kept)) for count, end, kept in zip(counts, ends, self.rows.ends, strict=True)]

"""Drafts that are right most of the time: a drafter's network runs, then an oracle's logits take the place of its own."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from hf_specdiff import SpecDiffConfig
from hf_specdiff import SpecDiffDrafter
from hf_specdiff.core import conditioning

BLOCK_SIZE, MASK_TOKEN_ID = 7, 127


def drafter_for(model: Any, layer_ids: list[int] | None = None) -> SpecDiffDrafter:
    """Return a random drafter for a tiny model, whose own drafts are nearly always wrong."""
    config = model.config.get_text_config()
    ids = {name: getattr(config, name, None) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    torch.manual_seed(3)
    drafter = SpecDiffDrafter(
        SpecDiffConfig(
            vocab_size=config.vocab_size,
            hidden_size=32 if layer_ids is None else config.hidden_size,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            block_size=BLOCK_SIZE,
            mask_token_id=MASK_TOKEN_ID,
            initializer_range=0.3,
            target_layer_ids=layer_ids,
            **ids,
        )
    ).eval()
    drafter.generation_config.gamma = drafter.config.max_gamma  # whole windows, whatever the machine makes of them
    return drafter


@contextmanager
def oracle(texts: torch.Tensor, wrong_share: float = 0.25) -> Iterator[None]:
    """Let drafters inside `with` draft what stands in `texts` `(B, L)`, padding included, but for a share of their tokens.

    Half of the wrong ones are right in second place, for trees. Which ones are wrong hangs on the place in the text alone.
    """
    originals = {kind: kind.window_logits for kind in (conditioning.TokenDrafter, conditioning.FeatureDrafter)}

    def replaced(original: Any) -> Any:
        def told_logits(self: Any, window: torch.Tensor, text: Any, features: Any) -> torch.Tensor:
            return _told(original(self, window, text, features), text, texts, wrong_share)

        return told_logits

    try:
        for kind, original in originals.items():
            kind.window_logits = replaced(original)
        yield
    finally:
        for kind, original in originals.items():
            kind.window_logits = original


def _told(logits: torch.Tensor, text: Any, texts: torch.Tensor, wrong_share: float) -> torch.Tensor:
    num_rows, gamma, vocab_size = logits.shape
    generator = torch.Generator().manual_seed(text.lengths[0])
    told = torch.randn(num_rows, gamma, vocab_size, generator=generator) * 0.5
    for index, (row, length) in enumerate(zip(text.rows, text.lengths, strict=True)):
        for place in range(length, length + gamma):
            dice = random.Random(1000 * place + row)
            anything, other = dice.randrange(vocab_size - 1), dice.randrange(vocab_size - 1)
            right = int(texts[row, place]) if place < texts.shape[1] else anything
            luck = dice.random()
            first, second = (right, other) if luck >= wrong_share else (other, right if luck < wrong_share / 2 else anything)
            told[index, place - length, first] += 6
            told[index, place - length, second] += 4
    return told.to(logits)

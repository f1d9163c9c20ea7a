"""The windows cut from training sequences, and who sees whom when many of them share a pass.

Letters: B batch, S sequence length, A windows per sequence, W block size, G drafted tokens.
"""

from dataclasses import dataclass

import torch

from hf_specdiff.training.losses import IGNORED


@dataclass(frozen=True, slots=True)
class Windows:
    """Many windows of each sequence of a batch.

    Attributes:
        input_ids (`torch.Tensor` of shape `(B, A * W)`, int64): for each window its anchor, then masks.
        position_ids (`torch.Tensor` of shape `(B, A * W)`, int64): 0-based, as in the sequence.
        labels (`torch.Tensor` of shape `(B * A, G)`, int64): the tokens behind the anchor; -100 from the end of its answer on.
        anchors (`torch.Tensor` of shape `(B, A)`, int64): index of each anchor in its sequence.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    labels: torch.Tensor
    anchors: torch.Tensor

    @property
    def previous(self) -> torch.Tensor:
        """The text's token before each label, `(B * A, G)` int64: the anchor, then labels; any id where there is none."""
        anchors = self.input_ids.view(len(self.labels), -1)[:, :1]
        return torch.cat([anchors, self.labels[:, :-1].clamp(min=0)], dim=1)


def sample_windows(
    batch: dict[str, torch.Tensor],
    num_anchors: int,
    block_size: int,
    mask_token_id: int,
    generator: torch.Generator,
    gamma: int | None = None,
) -> Windows:
    """Cut windows at random anchors among the tokens of the answers.

    Args:
        batch (`dict`): what `collate` returns.
        num_anchors (`int`): A, drawn with replacement.
        block_size (`int`): W.
        mask_token_id (`int`): what stands behind the anchor.
        generator (`torch.Generator`): a CPU generator; the only source of randomness.
        gamma (`int`, *optional*): G; by default W - 1, and W where the anchor's slot predicts too.

    Returns:
        `Windows`: on the batch's device.
    """
    ids, is_answer = batch["input_ids"], batch["is_answer"]
    # An anchor needs a token of the same answer behind it.
    may_stand = is_answer & torch.nn.functional.pad(is_answer[:, 1:], (0, 1))
    rank = may_stand.long().cumsum(1)  # (B, S)
    draws = torch.rand(len(ids), num_anchors, generator=generator).to(ids.device)
    wanted = (draws * rank[:, -1:].clamp(min=1)).long() + 1
    anchors = torch.searchsorted(rank, wanted).clamp(max=ids.shape[1] - 1)  # (B, A)
    positions = anchors[:, :, None] + torch.arange((gamma or block_size - 1) + 1, device=ids.device)  # (B, A, G + 1)
    places = positions.clamp(max=ids.shape[1] - 1).flatten(1)
    tokens = ids.gather(1, places).view_as(positions)
    inside = is_answer.gather(1, places).view_as(positions) & (positions < ids.shape[1])
    # The target stops where its answer ends; what comes behind, another answer too, is not of its round.
    labels = tokens.masked_fill(~inside.cumprod(2).bool(), IGNORED)[:, :, 1:]
    window_ids = torch.full_like(tokens[:, :, :block_size], mask_token_id)
    window_ids[:, :, 0] = tokens[:, :, 0]
    return Windows(window_ids.flatten(1), positions[:, :, :block_size].flatten(1), labels.flatten(0, 1), anchors)


def window_attention_mask(
    anchors: torch.Tensor, context_length: int, block_size: int, *, context_queries: bool
) -> torch.Tensor:
    """Return who sees whom when many windows share one pass.

    Keys: the sequence, then all windows. Queries: all windows; with `context_queries` the sequence in front of them. A window
    slot sees the sequence before its anchor and all slots of its own window; a sequence token sees itself and those before it.

    Args:
        anchors (`torch.Tensor` of shape `(B, A)`, int64): index of each anchor.
        context_length (`int`): S.
        block_size (`int`): W.
        context_queries (`bool`): true for a token-conditioned drafter.

    Returns:
        `torch.Tensor` of shape `(B, 1, queries, S + A * W)`, bool.
    """
    batch_size, num_anchors = anchors.shape
    device = anchors.device
    context = torch.arange(context_length, device=device)
    owner = torch.arange(num_anchors, device=device).repeat_interleave(block_size)  # (A * W,)
    sees_context = context[None, None] < anchors[:, owner, None]  # (B, A * W, S)
    sees_window = (owner[:, None] == owner[None]).expand(batch_size, -1, -1)
    mask = torch.cat([sees_context, sees_window], dim=2)
    if context_queries:
        causal = (context[None] <= context[:, None]).expand(batch_size, -1, -1)
        above = torch.cat([causal, causal.new_zeros(batch_size, context_length, len(owner))], dim=2)
        mask = torch.cat([above, mask], dim=1)
    return mask[:, None]

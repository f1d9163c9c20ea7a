"""What a drafter may have beside its body: heads that know the token before, and convolutions along the window.

Letters: n rows (sequences, or nodes of a tree), Q window slots, D hidden size, V vocabulary, R rank. A head turns logits
into the law of a token given the one before it.

Source: the Markov heads of DSpark (DeepSpec), the candidate selector and the convolutions of DFlash 2 (z-lab).
"""

import torch
from torch import nn

MARKOV_KINDS = ("vanilla", "gated", "rnn")


class MarkovHead(nn.Module):
    """A bias on the logits from the token before: of low rank, gated by the slot's state, or with a memory of earlier tokens.

    Args:
        vocab_size (`int`): tokens that may stand before.
        draft_vocab_size (`int`): tokens that are drafted.
        rank (`int`): R.
        hidden_size (`int`): D.
        kind (`str`): `"vanilla"`, `"gated"` or `"rnn"`.
    """

    def __init__(self, vocab_size: int, draft_vocab_size: int, rank: int, hidden_size: int, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.markov_w1 = nn.Embedding(vocab_size, rank)
        self.markov_w2 = nn.Linear(rank, draft_vocab_size, bias=False)
        if kind == "gated":
            self.gate_proj = nn.Linear(hidden_size + rank, rank)
        elif kind == "rnn":
            self.joint_proj = nn.Linear(2 * rank + hidden_size, 3 * rank)

    def forward(
        self, states: torch.Tensor, previous: torch.Tensor, memory: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the bias of one slot.

        Args:
            states (`torch.Tensor` of shape `(n, D)`): the body's.
            previous (`torch.Tensor` of shape `(n,)`, int64): the tokens before.
            memory (`torch.Tensor` of shape `(n, R)`, *optional*): what the last call returned; `None` at the first slot.

        Returns:
            `tuple`: the bias `(n, draft vocabulary)` and the memory, which only the kind `"rnn"` has.
        """
        before = self.markov_w1(previous)
        if self.kind == "vanilla":
            return self.markov_w2(before), None
        if self.kind == "gated":
            return self.markov_w2(torch.sigmoid(self.gate_proj(torch.cat([states, before], dim=-1))) * before), None
        memory = torch.zeros_like(before) if memory is None else memory
        joint = self.joint_proj(torch.cat([memory, before, states], dim=-1))
        gate, candidate, output = joint.chunk(3, dim=-1)
        gate = torch.sigmoid(gate)
        return self.markov_w2(torch.tanh(output)), gate * memory + (1 - gate) * torch.tanh(candidate)


class ConfidenceHead(nn.Module):
    """How likely the target is to accept a slot's token, in log-odds.

    Args:
        num_features (`int`): D, and R if it reads the Markov head's embedding of the token before.
    """

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.proj = nn.Linear(num_features, 1)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Return log-odds `(...)` of features `(..., D or D + R)`."""
        return self.proj(features).squeeze(-1)


class CandidateSelector(nn.Module):
    """Choose among a slot's best tokens by how they follow the one before.

    Args:
        vocab_size (`int`): V.
        hidden_size (`int`): D.
        rank (`int`): R.
        top_k (`int`): candidates of a slot; the other tokens are not drafted.
    """

    def __init__(self, vocab_size: int, hidden_size: int, rank: int, top_k: int) -> None:
        super().__init__()
        self.top_k = top_k
        self.predecessor_codebook = nn.Parameter(torch.zeros(vocab_size, rank))
        self.successor_codebook = nn.Parameter(torch.zeros(vocab_size, rank))
        self.hidden_projection = nn.Linear(hidden_size, rank, bias=False)

    def forward(self, logits: torch.Tensor, states: torch.Tensor, previous: torch.Tensor) -> torch.Tensor:
        """Return the logits of one slot given the token before, `(n, V)`; minus infinity for all but the candidates.

        Args:
            logits (`torch.Tensor` of shape `(n, V)`): of the slot by itself.
            states (`torch.Tensor` of shape `(n, D)`): the body's.
            previous (`torch.Tensor` of shape `(n,)`, int64): the tokens before.
        """
        best, candidates = logits.topk(self.top_k, dim=-1)
        context = self.predecessor_codebook[previous] * self.hidden_projection(states)
        scores = best + torch.einsum("nr,nkr->nk", context, self.successor_codebook[candidates]).to(best.dtype)
        return torch.full_like(logits, -torch.inf).scatter(-1, candidates, scores)


class WindowConvolution(nn.Module):
    """A causal convolution along the window around a sublayer, its taps partly made from the states.

    Args:
        hidden_size (`int`): D.
        kernel_size (`int`): taps, the slot itself included.
        group_size (`int`): channels that share the part of a tap that is made from the states.
    """

    def __init__(self, hidden_size: int, kernel_size: int, group_size: int) -> None:
        super().__init__()
        self.group_size = group_size
        self.kernel_size = kernel_size
        self.base_kernel = nn.Parameter(torch.zeros(2, kernel_size, hidden_size))
        self.kernel_projection = nn.Linear(hidden_size, 2 * kernel_size * (hidden_size // group_size), bias=False)

    def before(self, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return what the sublayer reads, `(B, Q, D)`, and the taps for `after`."""
        taps = self.kernel_projection(states).unflatten(-1, (2, self.kernel_size, -1))
        return self._convolve(states, taps[..., 0, :, :], self.base_kernel[0]), taps[..., 1, :, :]

    def after(self, states: torch.Tensor, taps: torch.Tensor) -> torch.Tensor:
        """Return what the sublayer adds, `(B, Q, D)`, from its output and the taps of `before`."""
        return self._convolve(states, taps, self.base_kernel[1])

    def _convolve(self, states: torch.Tensor, taps: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
        mixed = torch.zeros_like(states)
        for lag in range(self.kernel_size):
            earlier = states if lag == 0 else nn.functional.pad(states[:, :-lag], (0, 0, lag, 0))
            kernel = base[lag].to(states.dtype) + taps[..., lag, :].repeat_interleave(self.group_size, dim=-1)
            mixed = mixed + kernel * earlier
        return mixed

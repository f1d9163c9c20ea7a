"""The target's hidden states that condition a drafter: which ones to ask the host for, and how they are joined.

Letters: B batch, n tokens, D hidden size, K target layers read. Knows how the host returns hidden states; knows no drafter.
"""

from dataclasses import dataclass

import torch
from transformers.utils import output_capturing

# A list given as `output_hidden_states` selects among all hidden states, the embedding's first, in transformers 5.23; in 5.17
# it selects among the layers' outputs. What comes back is indexed alike.
FIRST_LAYER_INDEX = 1 if hasattr(output_capturing, "selected_hidden_states") else 0


@dataclass(frozen=True, slots=True)
class Features:
    """Hidden states of the tokens that the target has processed since the drafter last looked.

    Attributes:
        states (`torch.Tensor` of shape `(B, n, K * D)`): of K target layers, joined, in the order of the text.
        counts (`list[int]`): how many of each row are real; the rest is filler.
    """

    states: torch.Tensor
    counts: list[int]

    def select(self, rows: list[int]) -> "Features":
        """Return some of the rows."""
        counts = [self.counts[row] for row in rows]
        return Features(self.states[rows, : max(counts)], counts)

    @classmethod
    def join(cls, parts: list["Features"]) -> "Features":
        """Return the features of consecutive rounds as those of one."""
        if len(parts) == 1:
            return parts[0]
        num_rows = len(parts[0].counts)
        counts = [sum(part.counts[row] for part in parts) for row in range(num_rows)]
        states = parts[0].states.new_zeros(num_rows, max(counts), parts[0].states.shape[-1])
        for row in range(num_rows):
            own = torch.cat([part.states[row, : part.counts[row]] for part in parts])
            states[row, : len(own)] = own
        return cls(states, counts)


def layer_output_indices(layer_ids: list[int]) -> list[int]:
    """Return what to pass as `output_hidden_states` so that the host keeps just these layers' outputs.

    Args:
        layer_ids (`list[int]`): layers, counted from 0.

    Returns:
        `list[int]`: their indices in the hidden states that come back.
    """
    return [layer_id + FIRST_LAYER_INDEX for layer_id in layer_ids]


def target_features(hidden_states: tuple[torch.Tensor, ...], layer_ids: list[int], num_tokens: int) -> torch.Tensor:
    """Join the hidden states that condition a drafter.

    Args:
        hidden_states (`tuple[torch.Tensor, ...]`): of the target's last pass, asked for with `layer_output_indices`; each
            `(B, at least num_tokens, D)`. Entries that are not read may be `None`.
        layer_ids (`list[int]`): K layers, counted from 0.
        num_tokens (`int`): tokens of the pass that were committed; the rest were rejected.

    Returns:
        `torch.Tensor` of shape `(B, num_tokens, K * D)`, on the device of the last layer read.
    """
    states = [hidden_states[index][:, :num_tokens] for index in layer_output_indices(layer_ids)]
    # A sharded target leaves its layers' outputs on several devices.
    return torch.cat([state.to(states[-1].device) for state in states], dim=-1)


def check_states(hidden_states: tuple[torch.Tensor, ...] | None, layer_ids: list[int], width: int, name: str) -> None:
    """Refuse a target that does not hand back one state per layer and token.

    Args:
        hidden_states (`tuple[torch.Tensor, ...]`, *optional*): of a pass, asked for with `layer_output_indices`.
        layer_ids (`list[int]`): K layers, counted from 0.
        width (`int`): D.
        name (`str`): of the target.

    Raises:
        ValueError: if some layer read has none, or several streams of them (Gemma 3n, HY v4, DeepSeek v4).
    """
    states = hidden_states or ()
    for layer_id, index in zip(layer_ids, layer_output_indices(layer_ids), strict=True):
        state = states[index] if index < len(states) else None
        if state is None or state.dim() != 3 or state.shape[-1] != width:
            found = "none" if state is None else f"one of shape {tuple(state.shape)}"
            raise ValueError(
                f"`assistant_model` must read layers whose hidden states are (rows, tokens, {width}), got {found} from layer "
                f"{layer_id} of {name}. Use a drafter that reads tokens (`target_layer_ids` None) or other layers."
            )

"""What conditions a drafter: the committed tokens, or hidden states of the target.

Letters: B batch, L committed length, G drafted tokens, V vocabulary, D hidden size, K target layers read. Knows the network's
two ways to be called and what the target lends.
"""

from collections.abc import Callable
from collections.abc import Set
from typing import Any

import torch
from transformers import LogitsProcessorList

from .drafters import DenoisingDrafter
from .drafters import Shaper
from .features import Features
from .speculation import SpeculationConfig
from .text import Text
from .text import at_places


class TokenDrafter(DenoisingDrafter):
    """Draft from the committed tokens alone: they attend causally and are cached, the window attends to everything.

    Args:
        network (`SpecDiffDrafter`): the network.
        speculation (`SpeculationConfig`): as `DenoisingDrafter`.
        logits_processor (`LogitsProcessorList`): as `DenoisingDrafter`.
        max_length (`int`, *optional*): as `DenoisingDrafter`.
        shaper (`Shaper`, *optional*): as `DenoisingDrafter`.
        end_token_ids (`set[int]`): as `DenoisingDrafter`.
        target_vocab_size (`int`, *optional*): tokens of the target, which may have more than the network knows: they are read
            as "not known", and have probability 0 in every draft.

    Source: arXiv:2408.05636.
    """

    takes_static_cache = True

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
        self.vocab_size = network.config.vocab_size
        self.num_unknown = max(0, (target_vocab_size or 0) - self.vocab_size)

    def window_logits(self, window: torch.Tensor, text: Text, features: Features | None) -> torch.Tensor:
        """Run the network over the uncached context and the window; see `DenoisingDrafter.window_logits`."""
        assert self.rows is not None
        counts = [length - 1 - end for length, end in zip(text.lengths, self.rows.ends, strict=True)]
        num_new = self.num_columns(counts)
        new_context = _filled(text.gather(self.rows.ends, num_new), num_new)
        window_size = window.shape[1]
        position_ids, key_mask = self.layout(text, counts, window_size)
        ids = torch.cat([new_context, window], dim=1)
        if self.num_unknown:
            ids = ids.masked_fill(ids >= self.vocab_size, self.mask_token_id)
        inputs = {"input_ids": ids, "position_ids": position_ids, "window_size": window_size, "logits_to_keep": window_size - 1}
        if self.passes is None:
            inputs["position_embeddings"] = self.position_tables(text, num_new, window_size)
            outputs = self.network(**inputs, attention_mask=key_mask, past_key_values=self.cache)
        else:
            outputs = self.passes.run(inputs, key_mask, ids.shape[1], window_size)
        self.keep_context(counts)
        logits = outputs.logits
        # As wide as the target's, which its processors count on.
        return torch.nn.functional.pad(logits, (0, self.num_unknown), value=-torch.inf) if self.num_unknown else logits


class FeatureDrafter(DenoisingDrafter):
    """Draft from the target's hidden states: extra keys and values in every layer; the target's embedding and head.

    Args:
        network (`SpecDiffDrafter`): the network.
        speculation (`SpeculationConfig`): as `DenoisingDrafter`.
        logits_processor (`LogitsProcessorList`): as `DenoisingDrafter`.
        max_length (`int`, *optional*): as `DenoisingDrafter`.
        shaper (`Shaper`, *optional*): as `DenoisingDrafter`.
        end_token_ids (`set[int]`): as `DenoisingDrafter`.
        embed (`Callable`): the target's input embedding, ids to vectors.
        head (`Callable`): the target's output embedding, hidden states to logits of the tokens that are drafted.

    Source: arXiv:2602.06036, section 3.
    """

    takes_static_cache = True

    def __init__(
        self,
        network: Any,
        speculation: SpeculationConfig,
        logits_processor: LogitsProcessorList,
        max_length: int | None = None,
        shaper: Shaper | None = None,
        end_token_ids: Set[int] = frozenset(),
        *,
        embed: Callable[[torch.Tensor], torch.Tensor],
        head: Callable[[torch.Tensor], torch.Tensor],
    ) -> None:
        super().__init__(network, speculation, logits_processor, max_length, shaper, end_token_ids)
        self.embed = embed
        self.head = head
        self.dtype = network.dtype
        self.knows_token_before = network.config.knows_token_before
        self.has_memory = network.config.markov_head_type == "rnn" and network.config.markov_rank > 0
        self.has_confidence = network.config.enable_confidence_head
        # A selector's candidates, or a reduced vocabulary, may hold the mask alone.
        self._is_never_dead &= not (network.config.selector_rank or network.config.draft_vocab_size)
        self.states: torch.Tensor | None = None  # of the last pass, which heads read again

    def window_logits(self, window: torch.Tensor, text: Text, features: Features | None) -> torch.Tensor:
        """Run the network over the new features and the window; see `DenoisingDrafter.window_logits`."""
        device, dtype = self.device, self.dtype
        counts = [0] * text.num_rows if features is None else features.counts
        # Where slot `i` predicts token `i + 1`, the last token has no slot of its own.
        is_shifted = self.network.config.predicts_from_anchor
        slots = window[:, :-1] if is_shifted else window
        position_ids, key_mask = self.layout(text, counts, slots.shape[1])
        num_new, states = self.num_columns(counts), None
        if features is not None:
            states = _filled(features.states.to(device=device, dtype=dtype), num_new)
        elif num_new > 0:
            states = torch.zeros(text.num_rows, num_new, self.network.fc.in_features, device=device, dtype=dtype)
        inputs = {"noise_embeds": self.network.window_embeddings(slots, self.embed), "context_hidden_states": states}
        inputs["position_ids"] = position_ids
        if self.passes is None:
            more = {"attention_mask": key_mask, "cached_position_ids": self.cached_positions(text, counts)}
            more["position_embeddings"] = self.position_tables(text, num_new, slots.shape[1])
            outputs = self.network(**inputs, **more, past_key_values=self.cache)
        else:
            outputs = self.passes.run(inputs, key_mask, slots.shape[1], slots.shape[1])
        self.keep_context(counts)
        self.states = outputs.last_hidden_state if is_shifted else outputs.last_hidden_state[:, 1:]
        return self.network.window_logits(self.states, self.head).to(device)

    def step(
        self, logits: torch.Tensor, index: Any, rows: Any, previous: torch.Tensor, memory: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the laws of positions given the token before each; see `DenoisingDrafter.step`."""
        assert self.states is not None
        return self.network.step_logits(logits, at_places(self.states, rows, index), previous, memory)

    def confidence(self, index: Any, rows: Any, previous: torch.Tensor) -> torch.Tensor:
        """Return how likely a token of one position's law is accepted; see `DenoisingDrafter.confidence`."""
        assert self.states is not None
        return self.network.confidence(at_places(self.states, rows, index), previous)


def make_drafter(
    network: Any,
    target: Any,
    speculation: SpeculationConfig,
    logits_processor: LogitsProcessorList,
    max_length: int | None = None,
    shaper: Shaper | None = None,
    end_token_ids: Set[int] = frozenset(),
) -> DenoisingDrafter:
    """Put the drafter that fits a network's conditioning around it, or the one that the network brings as `drafter_class`.

    Args:
        network (`SpecDiffDrafter`): the network.
        target (`transformers.PreTrainedModel`, *optional*): lends a feature-conditioned drafter its embedding and head; may be
            sharded or offloaded by accelerate. A token-conditioned one does not need it.
        speculation (`SpeculationConfig`): how to draft.
        logits_processor (`LogitsProcessorList`): the target's.
        max_length (`int`, *optional*): most tokens of the finished text.
        shaper (`Shaper`, *optional*): how much to draft and in which shape; by default chains of the whole window.
        end_token_ids (`set[int]`): with one of them a text ends.

    Returns:
        `DenoisingDrafter`: fresh, with an empty context cache.
    """
    if network.config.target_layer_ids is None:
        theirs = None if target is None else target.config.get_text_config().vocab_size
        around = getattr(network, "drafter_class", TokenDrafter)
        return around(network, speculation, logits_processor, max_length, shaper, end_token_ids, target_vocab_size=theirs)
    return FeatureDrafter(
        network,
        speculation,
        logits_processor,
        max_length,
        shaper,
        end_token_ids,
        embed=lent_embedding(target),
        head=lent_head(target, network.drafted_ids),
    )


def lent_head(target: Any, token_ids: torch.Tensor | None) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return a target's head, or the part of it that belongs to some tokens: the other rows are then never read.

    Args:
        target (`transformers.PreTrainedModel`): the target.
        token_ids (`torch.Tensor` of shape `(n,)`, int64, *optional*): the tokens; `None`: all.

    Returns:
        `Callable`: from hidden states `(..., D)` to logits `(..., n or V)`. It holds a copy of these rows.
    """
    head = target.get_output_embeddings()

    def whole(states: torch.Tensor) -> torch.Tensor:
        return head(_beside(states, head.weight).to(head.weight.dtype))

    if token_ids is None:
        return whole
    # Quantized and offloaded heads have no rows to take: theirs are computed whole.
    if type(head) is not torch.nn.Linear or head.weight.is_meta or hasattr(head, "_hf_hook"):
        return lambda states: _columns(whole(states), token_ids)
    ids = token_ids.to(head.weight.device)
    weight, bias = head.weight.detach()[ids], None if head.bias is None else head.bias.detach()[ids]
    return lambda states: torch.nn.functional.linear(_beside(states, weight).to(weight.dtype), weight, bias)


def _filled(tensor: torch.Tensor, count: int) -> torch.Tensor:
    """Return `(B, n, ...)` with filler behind it, so that there are `count` columns."""
    missing = count - tensor.shape[1]
    return tensor if missing == 0 else torch.nn.functional.pad(tensor, (0, 0) * (tensor.dim() - 2) + (0, missing))


def _columns(logits: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
    return logits.index_select(-1, token_ids.to(logits.device))


def lent_embedding(target: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return a target's embedding, from ids to rows as they are stored: some families scale or norm them on the way in.

    Args:
        target (`transformers.PreTrainedModel`): the target.

    Returns:
        `Callable`: from token ids, int64, to `torch.Tensor` of shape `(*ids.shape, D)`.
    """
    embedding = target.get_input_embeddings()
    if any(hasattr(embedding, name) for name in ("embed_norm", "embed_scale")):
        return lambda ids: _stored_rows(embedding, ids)
    return lambda ids: embedding(_beside(ids, embedding.weight))


def raw_embeddings(target: Any, ids: torch.Tensor) -> torch.Tensor:
    """Return the rows `(*ids.shape, D)` of a target's embedding that belong to ids; see `lent_embedding`."""
    return lent_embedding(target)(ids)


def _stored_rows(embedding: Any, ids: torch.Tensor) -> torch.Tensor:
    ids = _beside(ids, embedding.weight)
    hook = getattr(embedding, "_hf_hook", None)  # of accelerate, which brings offloaded weights
    if hook is None:
        return torch.nn.functional.embedding(ids, embedding.weight)
    (ids,), _ = hook.pre_forward(embedding, ids)
    return hook.post_forward(embedding, torch.nn.functional.embedding(ids, embedding.weight))


def _beside(tensor: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Move a tensor to a weight's device. Offloaded weights are on "meta": accelerate's hook moves the inputs itself."""
    device = weight.device
    return tensor if tensor.device == device or device.type == "meta" else tensor.to(device)

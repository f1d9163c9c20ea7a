"""A drafter's passes over a static cache: all of the same width, so that they can be compiled and are compiled once.

Letters: B batch, C new context tokens, Q window slots, S slots of the cache. Knows how the network is called; knows no law.
"""

from typing import Any

import torch
from transformers import GenerationConfig

from .drafters import DenoisingDrafter
from .speculation import SpeculationConfig
from .static_target import StaticRows
from .static_target import StaticTarget
from .static_target import compilation_explained
from .static_target import fix_shapes
from .static_target import give_back
from .static_target import longest_text
from .static_target import states_of
from .static_target import take_cache
from .text import to_device


class StaticPasses:
    """The passes of a drafter's network in one generation, over a static cache.

    A round adds at most as many tokens as were drafted and one more, so a pass of that many context tokens, the last ones
    filler that nobody sees, takes every round in. The first one, over the prompt, is as long as that and not compiled, and so
    are those after rounds that drafted elsewhere.

    Args:
        network (`SpecDiffDrafter`): the network, of full attention only.
        generation_config (`GenerationConfig`): the call's.
        num_rows (`int`): B.
        num_new (`int`): C, context tokens of a pass.
        window_size (`int`): Q.
    """

    def __init__(
        self, network: Any, generation_config: GenerationConfig, num_rows: int, num_new: int, window_size: int
    ) -> None:
        self.network = network
        self.config = generation_config
        self.num_rows = num_rows
        self.num_new = num_new
        self.window_size = window_size
        self.cache = take_cache(network, num_rows, longest_text(generation_config) + num_new + window_size)
        self.num_slots = self.cache.layers[0].max_cache_len
        self.rows = StaticRows(self.cache, num_rows, 0)
        self.is_compiled = network._valid_auto_compile_criteria({"past_key_values": self.cache}, generation_config)
        self._is_first, self._is_fixed = True, False

    def num_columns(self, counts: list[int]) -> int:
        """Return how many context tokens a pass reads, filler included, that adds some of them to each row."""
        return max(self.num_new, *counts)

    def run(self, inputs: dict[str, Any], key_mask: torch.Tensor, num_queries: int, window_size: int) -> Any:
        """Run the network over new context and a window.

        Args:
            inputs (`dict[str, Any]`): of the network, mask and cache left out, for the rows that go on.
            key_mask (`torch.Tensor` of shape `(rows, cached + C + Q)`, bool): keys that are text.
            num_queries (`int`): Q; or C + Q, where the context asks too.
            window_size (`int`): Q.

        Returns:
            `SpecDiffDrafterOutput`: of the rows that go on; its tensors stay as they are.

        Raises:
            ValueError: if the compiler fails.
        """
        num_new = key_mask.shape[1] - self.rows.length - window_size
        is_usual = not self._is_first and (num_new, window_size) == (self.num_new, self.window_size)
        self._is_first = False
        inputs = inputs | {"attention_mask": self._mask(key_mask, num_queries, window_size)}
        places = self.rows.places
        if len(places) < self.num_rows:
            inputs = {name: self._spread(value) for name, value in inputs.items()}
        # Where the cached keys stand matters to windowed and causal layers only.
        inputs["cached_position_ids"] = inputs["position_ids"][:, :0]
        if not (self.is_compiled and is_usual):
            return self._own_rows(self.network(**inputs, past_key_values=self.cache))
        if not self._is_fixed:
            fix_shapes(states_of(self.cache), self.config.compile_config)
            self._is_fixed = True
        fix_shapes(inputs.values(), self.config.compile_config)
        with compilation_explained():
            outputs = self.network.get_compiled_call(self.config.compile_config)(**inputs, past_key_values=self.cache)
        return self._own_rows(outputs)

    def _mask(self, key_mask: torch.Tensor, num_queries: int, window_size: int) -> torch.Tensor:
        """Return who sees whom, `(rows, 1, queries, S)` bool: context what is before it, the window all; everyone itself."""
        num_keys, device = key_mask.shape[1], key_mask.device
        own = torch.arange(num_keys - num_queries, num_keys, device=device)[:, None]
        keys = torch.arange(num_keys, device=device)[None]
        seen = (((keys <= own) | (own >= num_keys - window_size)) & key_mask[:, None]) | (keys == own)
        return torch.nn.functional.pad(seen, (0, self.num_slots - num_keys))[:, None]

    def _spread(self, value: Any) -> Any:
        """Put the rows that go on at their places among all rows of the cache; the others read filler and see all of it."""
        if not isinstance(value, torch.Tensor):
            return value
        fill = torch.ones if value.dtype == torch.bool else torch.zeros
        everything = fill(self.num_rows, *value.shape[1:], dtype=value.dtype, device=value.device)
        return everything.index_copy_(0, to_device(self.rows.places, value.device), value)

    def _own_rows(self, outputs: Any) -> Any:
        """Take the rows that go on out of the outputs. The next pass of a captured graph writes its own to the same place."""
        places = self.rows.places
        for name, states in list(outputs.items()):
            if isinstance(states, torch.Tensor):
                outputs[name] = states.clone() if len(places) == self.num_rows else states[places]
        return outputs

    def release(self) -> None:
        """Give the cache to the next call with this network."""
        give_back(self.network, self.cache)


def compile_drafter(
    drafter: Any, target: Any, speculation: SpeculationConfig, generation_config: GenerationConfig, num_rows: int
) -> StaticPasses | None:
    """Let a drafter's passes be compiled where its target's are; what cannot be stays as it is.

    Args:
        drafter (`Drafter`): fresh.
        target (`Target`): of the same call.
        speculation (`SpeculationConfig`): how it drafts.
        generation_config (`GenerationConfig`): the call's.
        num_rows (`int`): B.

    Returns:
        `StaticPasses`, *optional*: what runs them now. `None` also for drafters of other kinds, for networks with windowed or
            causal layers or an attention that reads no masks, and for several denoising steps.
    """
    if not (isinstance(target, StaticTarget) and target.is_compiled and getattr(drafter, "takes_static_cache", False)):
        return None
    assert isinstance(drafter, DenoisingDrafter)
    config, network = drafter.network.config, drafter.network
    layers = range(config.num_hidden_layers)
    has_limits = any(config.layer_window(layer) is not None or config.is_causal_layer(layer) for layer in layers)
    if has_limits or "flash" in (config._attn_implementation or "") or speculation.num_denoising_steps > 1:
        return None
    # A copied branch may be longer than a window.
    num_new = max(speculation.gamma, speculation.prompt_lookup_num_tokens or 0) + 1
    window_size = speculation.gamma + (not config.predicts_from_anchor)
    passes = StaticPasses(network, generation_config, num_rows, num_new, window_size)
    if not passes.is_compiled:
        return None
    drafter.compile(passes)
    return passes

"""Everything that touches transformers' key/value caches.

Knows which caches can be rolled back and how. Knows no model. Imported by the drafters, the target and the loop.
"""

from transformers import Cache


def check_can_roll_back(cache: Cache) -> None:
    """Refuse a cache from which rejected tokens cannot be taken back.

    Args:
        cache (`transformers.Cache`): the target's cache, as `generate` prepared it.

    Raises:
        ValueError: if the cache is compiled or quantized. (A recurrent state is the model's to tell; see the entry's checks.)
    """
    name = type(cache).__name__
    if getattr(cache, "is_compileable", False) or "Static" in name:
        raise ValueError(
            f"`cache_implementation` must be a dynamic cache, got {name}. Leave the argument out: rejected tokens are rolled "
            "back, and a static cache has no length to roll back."
        )
    layers = {type(layer).__name__ for layer in getattr(cache, "layers", [])}
    refused = sorted(layer for layer in layers if "Quantized" in layer)
    if refused or "Quantized" in name:
        raise ValueError(
            f"`past_key_values` must be a cache whose tokens can be taken back, got {name} with layers "
            f"{refused or sorted(layers)}. Leave the argument out, or pass a DynamicCache."
        )


def start_recording(cache: Cache) -> None:
    """Let sliding-window layers keep what a rollback needs; to be called once, after the prefill."""
    cache.activate_past_recording()


def roll_back(cache: Cache, num_tokens: int) -> None:
    """Remove the last tokens of every layer.

    Args:
        cache (`transformers.Cache`): changed in place.
        num_tokens (`int`): tokens to remove, not negative. With 0 a sliding layer still shrinks to its window.
    """
    # `crop` takes a non-positive count of tokens to remove (transformers 5.17 and later); a positive one raises.
    cache.crop(-num_tokens)

"""The drafter's configuration: what its fields mean, and what they may hold.

Every field is looked at before a tensor is made from it: files of strangers hold anything, strings for numbers, a million
layers. Of a drafter on the Hub this file is loaded first, so it also says whether the host is one that the rest was written
for.
"""

import math
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassFieldValidationError
from transformers import Qwen3Config
from transformers.activations import ACT2FN
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.utils.versions import require_version

# Of the files a drafter is saved in. A drafter of a later format is refused instead of being misread.
FORMAT_VERSION = 1

# From and to, both allowed. The upper ends are far above any drafter: past them a file is broken, and a network of it would
# fill the memory or be built for hours.
SIZES = {
    "vocab_size": (1, 2**24),
    "hidden_size": (1, 2**17),
    "intermediate_size": (1, 2**19),
    "num_hidden_layers": (1, 2**10),
    "num_attention_heads": (1, 2**12),
    "num_key_value_heads": (1, 2**12),
    "head_dim": (2, 2**14),
    "block_size": (2, 2**24),
    "max_position_embeddings": (1, 2**40),
    "format_version": (1, 2**31),
    "markov_rank": (0, 2**14),
    "selector_rank": (0, 2**14),
    "selector_top_k": (1, 2**24),
    "conv_kernel_size": (0, 2**10),
    "conv_group_size": (1, 2**17),
}
OPTIONAL_SIZES = {
    "mask_token_id": (0, 2**24),
    "num_target_layers": (1, 2**12),
    "sliding_window": (2, 2**40),
    "draft_vocab_size": (1, 2**24),
    "target_hidden_size": (1, 2**17),
}
REALS = {
    "rms_norm_eps": (0.0, 1.0),
    "initializer_range": (0.0, 1e3),
    "attention_dropout": (0.0, 1.0),
    "input_embedding_scale": (-1e6, 1e6),
    "output_multiplier": (-1e6, 1e6),
}
KINDS = {"target_model": str, "target_revision": str, "training": dict, "dflash_config": dict}
MAX_TARGET_LAYERS = 2**12
LAYER_TYPES = {"full_attention", "sliding_attention"}

require_version("transformers>=5.17,<6", "hf_specdiff was written for these versions: pip install 'transformers>=5.17,<6'")


class SpecDiffConfig(Qwen3Config):
    """Describe a discrete-diffusion drafter; the network's fields carry the names of Llama and Qwen configs.

    The body is Qwen3's (RMSNorm on queries and keys, gated MLP, rotary positions), so `hidden_size`, `num_hidden_layers`,
    `num_attention_heads`, `num_key_value_heads`, `head_dim`, `rms_norm_eps`, `rope_parameters` and the rest mean what they
    mean there. `vocab_size` and the bos, eos and pad ids are the target's: pipelines refuse an assistant whose ids differ.

    Args:
        block_size (`int`): slots of one drafter pass: the anchor and `block_size - 1` masks. At least 2.
        mask_token_id (`int`): the id that stands for "not yet known". Feature-conditioned: a row of the target's embedding.
            Token-conditioned: a row of the drafter's own embedding, inside `vocab_size` or beyond it. Never drafted.
        target_layer_ids (`list[int]`, *optional*): 0-based target layers whose outputs condition the drafter; the entry `i`
            reads `hidden_states[i + 1]`, and -1 the embedding's output. `None`: a token-conditioned drafter with an embedding
            and a head of its own.
        num_target_layers (`int`, *optional*): layers of the target that the drafter was made for.
        target_model (`str`, *optional*): Hub repository or folder of that target.
        target_revision (`str`, *optional*): its commit, where it came from the Hub.
        predicts_from_anchor (`bool`): whether the anchor's slot predicts too, so that slot `i` stands for token `i + 1` and
            `block_size` tokens are drafted; else slot `i` stands for token `i`, and there are `block_size - 1`.
        layer_types (`list[str]`, *optional*): `"full_attention"` or `"sliding_attention"` for each layer. A sliding layer sees
            the last `sliding_window` tokens, itself included; it needs `use_sliding_window`.
        window_from_anchor (`bool`): whether all slots of a sliding layer see what the anchor sees, instead of each its own
            last tokens.
        causal_layers (`list[bool]`, *optional*): for each layer, whether a slot sees only the slots up to itself. `None`: in no
            layer.
        input_embedding_scale (`float`): what the window's embeddings are multiplied with.
        output_multiplier (`float`): what the logits are multiplied with.
        final_logit_softcapping (`float`, *optional*): the logits then end as `c * tanh(logits / c)`.
        has_own_embedding (`bool`): feature-conditioned: whether it has an embedding of its own instead of the target's.
        has_own_head (`bool`): feature-conditioned: whether it has a head of its own instead of the target's.
        has_mask_embedding (`bool`): feature-conditioned: whether the mask is a vector of its own and no row of an embedding.
        draft_vocab_size (`int`, *optional*): feature-conditioned: how many of the target's tokens are drafted, if not all; the
            others have probability 0 in every draft. The buffer `d2t` holds, for each of them, its id less its place. They are
            the rows of its own head, or these tokens' rows of the target's.
        target_hidden_size (`int`, *optional*): width of the target, if it differs from `hidden_size`.
        markov_rank (`int`): rank of a head that adds a bias from the token before to each slot's logits; 0: none.
        markov_head_type (`str`): `"vanilla"`, `"gated"` (by the slot's state) or `"rnn"` (with a memory).
        markov_reads_drafted (`bool`): whether that head tells only the tokens of a reduced vocabulary apart, all others being
            one: it has as many rows less.
        enable_confidence_head (`bool`): whether a head says how likely each slot's token is to be accepted.
        confidence_head_with_markov (`bool`): whether that head reads the token before too.
        selector_rank (`int`): rank of a selector that chooses among each slot's best tokens by the token before; 0: none.
        selector_top_k (`int`): tokens of a slot that it chooses among.
        conv_kernel_size (`int`): taps of the convolutions around attention and MLP, along the window; 0: none.
        conv_group_size (`int`): channels that share a tap.
        rope_interleaved (`bool`): whether rotary pairs are neighbours, instead of the two halves of a head.
        training (`dict`, *optional*): how the drafter was made, for its card: "data" (what it learnt from), "objective",
            "steps" and whatever else the trainer writes down.
        format_version (`int`): of the saved files.

    Raises:
        ValueError: if a field is out of range.

    Source: arXiv:2408.05636 (token-conditioned), arXiv:2602.06036 (feature-conditioned).
    """

    model_type = "specdiff"

    block_size: int = 16
    mask_token_id: int | None = None
    target_layer_ids: list[int] | None = None
    num_target_layers: int | None = None
    target_model: str | None = None
    target_revision: str | None = None
    predicts_from_anchor: bool = False
    window_from_anchor: bool = False
    causal_layers: list[bool] | None = None
    input_embedding_scale: float = 1.0
    output_multiplier: float = 1.0
    final_logit_softcapping: float | None = None
    has_own_embedding: bool = False
    has_own_head: bool = False
    has_mask_embedding: bool = False
    draft_vocab_size: int | None = None
    target_hidden_size: int | None = None
    rope_interleaved: bool = False
    markov_rank: int = 0
    markov_head_type: str = "vanilla"
    markov_reads_drafted: bool = False
    enable_confidence_head: bool = False
    confidence_head_with_markov: bool = False
    selector_rank: int = 0
    selector_top_k: int = 16
    conv_kernel_size: int = 0
    conv_group_size: int = 16
    training: dict | None = None
    format_version: int = FORMAT_VERSION

    def __post_init__(self, **kwargs: Any) -> None:
        """Fill the host's defaults, then check the drafter's own fields."""
        check_before_the_host(self)
        super().__post_init__(**kwargs)
        check_fields(self)
        if self.format_version > FORMAT_VERSION:
            raise ValueError(
                f"`format_version` must be at most {FORMAT_VERSION} for this version of hf_specdiff, got "
                f"{self.format_version}: the drafter was saved by a later one. Run `pip install -U hf_specdiff`, or load "
                "with trust_remote_code=True."
            )
        self._check_block()
        self._check_target_layers()
        self._check_attention()
        self._check_switches()

    def __setattr__(self, name: str, value: Any) -> None:
        """Set a field; what the host says of a wrong type, on two lines and as an error of its own, becomes a `ValueError`."""
        try:
            super().__setattr__(name, value)
        except StrictDataclassFieldValidationError as error:
            reason = " ".join(str(error.__cause__).split())[:200]
            raise ValueError(f"`{name}` must be of the type that `SpecDiffConfig` gives it: {reason}") from error

    @property
    def is_feature_conditioned(self) -> bool:
        """Whether the drafter reads the target's hidden states."""
        return self.target_layer_ids is not None

    @property
    def max_gamma(self) -> int:
        """The most tokens that one pass drafts."""
        return self.block_size if self.predicts_from_anchor else self.block_size - 1

    @property
    def knows_token_before(self) -> bool:
        """Whether a head makes each slot's law one that is given the token before it."""
        return self.markov_rank > 0 or self.selector_rank > 0

    def layer_window(self, layer_idx: int) -> int | None:
        """Return how many tokens a layer sees, itself included; `None`: all."""
        return self.sliding_window if (self.layer_types or [])[layer_idx : layer_idx + 1] == ["sliding_attention"] else None

    def is_causal_layer(self, layer_idx: int) -> bool:
        """Return whether a slot of this layer sees only the slots up to itself."""
        return self.causal_layers is not None and self.causal_layers[layer_idx]

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Make a configuration of a dictionary; as `transformers.PreTrainedConfig.from_dict`.

        Raises:
            ValueError: if it is another model's: read as ours, its fields would mean something else and missing ones be filled.
        """
        theirs = config_dict.get("speculators_model_type") or config_dict.get("model_type", cls.model_type)
        if theirs != cls.model_type:
            raise ValueError(
                f"`model_type` in config.json must be {cls.model_type!r}, got {theirs!r}: the drafter is stored in another "
                "format. Load it with hf_specdiff.load_drafter(source, target=target)."
            )
        return super().from_dict(config_dict, **kwargs)

    def _check_block(self) -> None:
        theirs = (getattr(self, "dflash_config", None) or {}).get("block_size", self.block_size)
        if theirs != self.block_size:
            raise ValueError(
                f"`block_size` must be the same wherever the configuration names it, got {self.block_size} and "
                f"{theirs} in `dflash_config`. Which of them was the drafter trained with?"
            )
        if self.mask_token_id is None:
            return
        if self.is_feature_conditioned and self.mask_token_id >= self.vocab_size:
            raise ValueError(
                f"`mask_token_id` must be a row of the target's embedding for a feature-conditioned drafter, got "
                f"{self.mask_token_id} with `vocab_size` {self.vocab_size}. Choose an id that the target never writes."
            )

    def _check_target_layers(self) -> None:
        layer_ids, num_layers = self.target_layer_ids, self.num_target_layers
        if layer_ids is None:
            return
        if num_layers is not None and max(layer_ids) >= num_layers:
            raise ValueError(
                f"`target_layer_ids` must be below `num_target_layers` = {num_layers}, got {layer_ids}. Was the drafter made "
                "for another target?"
            )

    def _check_attention(self) -> None:
        is_sliding = "sliding_attention" in (self.layer_types or [])
        if is_sliding and self.sliding_window is None:
            raise ValueError(
                "`sliding_window` and `use_sliding_window` must be set where `layer_types` has sliding layers, got None and "
                f"{self.use_sliding_window}."
            )
        if self.causal_layers is not None and len(self.causal_layers) != self.num_hidden_layers:
            raise ValueError(
                f"`causal_layers` must have an entry for each of {self.num_hidden_layers} layers, got {self.causal_layers}."
            )
        if not self.is_feature_conditioned and (is_sliding or any(self.causal_layers or [])):
            raise ValueError(
                "`layer_types` and `causal_layers` must be left out for a token-conditioned drafter, got sliding or causal "
                "layers: its context is not windowed."
            )

    def _check_switches(self) -> None:
        if self.is_feature_conditioned:
            names = []
        else:
            names = ["predicts_from_anchor", "has_own_embedding", "has_own_head", "has_mask_embedding", "target_hidden_size"]
            names += ["markov_rank", "selector_rank", "conv_kernel_size", "enable_confidence_head", "draft_vocab_size"]
        for name in [name for name in names if getattr(self, name)]:
            raise ValueError(
                f"`{name}` must be left out for a token-conditioned drafter, got {getattr(self, name)}. It is a switch of "
                "feature-conditioned ones."
            )
        if self.draft_vocab_size is not None and self.draft_vocab_size > self.vocab_size:
            raise ValueError(
                f"`draft_vocab_size` must be at most `vocab_size` {self.vocab_size}, got {self.draft_vocab_size}. Leave it out "
                "to draft every token."
            )
        borrows = not (self.has_own_embedding and self.has_own_head)
        if self.target_hidden_size not in (None, self.hidden_size) and borrows:
            raise ValueError(
                f"`target_hidden_size` must be `hidden_size` {self.hidden_size} for a drafter that borrows the target's "
                f"embedding or head, got {self.target_hidden_size}."
            )
        self._check_heads()

    def _check_heads(self) -> None:
        if self.markov_head_type not in ("vanilla", "gated", "rnn"):
            raise ValueError(f"`markov_head_type` must be vanilla, gated or rnn, got {self.markov_head_type!r}.")
        if self.confidence_head_with_markov and not (self.enable_confidence_head and self.markov_rank):
            raise ValueError(
                "`confidence_head_with_markov` must be False without `enable_confidence_head` and a `markov_rank`, got True."
            )
        if self.markov_reads_drafted and (
            self.draft_vocab_size is None or not self.markov_rank or self.confidence_head_with_markov
        ):
            raise ValueError(
                "`markov_reads_drafted` must be False without a `markov_rank` and a `draft_vocab_size`, or beside "
                "`confidence_head_with_markov`, got True."
            )
        if self.selector_rank and (self.selector_top_k > self.vocab_size or self.draft_vocab_size is not None):
            raise ValueError(
                f"`selector_top_k` must be at most `vocab_size` {self.vocab_size}, and the vocabulary whole, got "
                f"{self.selector_top_k} and `draft_vocab_size` {self.draft_vocab_size}."
            )
        if self.markov_rank and self.selector_rank:
            raise ValueError("`selector_rank` must be 0 beside a `markov_rank`, got both.")
        if self.conv_kernel_size and self.hidden_size % self.conv_group_size:
            raise ValueError(f"`conv_group_size` must divide `hidden_size` {self.hidden_size}, got {self.conv_group_size}.")


def check_before_the_host(config: Any) -> None:
    """Refuse what the host would stumble over while it fills in its defaults.

    Args:
        config (`SpecDiffConfig`): as it was read.

    Raises:
        ValueError: for a number of layers or a dtype that cannot be.
    """
    _check_size("num_hidden_layers", config.num_hidden_layers, *SIZES["num_hidden_layers"])
    dtype = config.dtype
    if isinstance(dtype, str) and not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise ValueError(f"`dtype` must be one of torch's, got {_shown(dtype)}.")


def check_fields(config: Any) -> None:
    """Refuse fields of a wrong type or out of range, and sizes that do not go together.

    Args:
        config (`SpecDiffConfig`): as it was read, the host's defaults filled in.

    Raises:
        ValueError: for the first that is wrong.
    """
    for name, (low, high) in SIZES.items():
        _check_size(name, getattr(config, name), low, high)
    for name, (low, high) in OPTIONAL_SIZES.items():
        if getattr(config, name) is not None:
            _check_size(name, getattr(config, name), low, high)
    for name, (least, most) in REALS.items():
        value = getattr(config, name)
        if not _is_real(value) or not least <= value <= most:
            raise ValueError(f"`{name}` must be a number from {least:g} to {most:g}, got {_shown(value)}.")
    for name, kind in KINDS.items():
        value = getattr(config, name, None)
        if value is not None and not isinstance(value, kind):
            raise ValueError(f"`{name}` must be a {kind.__name__} or None, got {_shown(value)}.")
    if config.num_attention_heads % config.num_key_value_heads:
        raise ValueError(
            f"`num_key_value_heads` must divide `num_attention_heads` {config.num_attention_heads}, got "
            f"{config.num_key_value_heads}."
        )
    if config.head_dim % 2:
        raise ValueError(f"`head_dim` must be even for rotary positions, got {config.head_dim}.")
    if config.hidden_act not in ACT2FN:
        raise ValueError(f"`hidden_act` must be an activation that transformers knows, got {_shown(config.hidden_act)}.")
    kinds = config.layer_types
    if kinds is not None and (len(kinds) != config.num_hidden_layers or not set(kinds) <= LAYER_TYPES):
        raise ValueError(
            f"`layer_types` must name one of {', '.join(sorted(LAYER_TYPES))} for each of {config.num_hidden_layers} layers, "
            f"got {_shown(kinds)}."
        )
    weights = getattr(config, "transformers_weights", None)
    if weights is not None and not str(weights).endswith(".safetensors"):
        raise ValueError(f"`transformers_weights` must be a safetensors file or None, got {_shown(weights)}.")
    _check_rotary_fields(config.rope_parameters)
    _check_layer_ids(config.target_layer_ids)


def _check_size(name: str, value: Any, low: int, high: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise ValueError(f"`{name}` must be an integer from {low} to {high}, got {_shown(value)}.")


def _check_layer_ids(layer_ids: Any) -> None:
    if layer_ids is None:
        return
    is_list = isinstance(layer_ids, list | tuple) and 0 < len(layer_ids) <= MAX_TARGET_LAYERS
    if not is_list or not all(type(layer) is int and -1 <= layer < MAX_TARGET_LAYERS for layer in layer_ids):
        raise ValueError(
            "`target_layer_ids` must be a list of layers, counted from 0 (-1: the embedding's output), got "
            f"{_shown(layer_ids)}."
        )
    if len(set(layer_ids)) != len(layer_ids):
        raise ValueError(f"`target_layer_ids` must name different layers, counted from 0, got {_shown(layer_ids)}.")


def _check_rotary_fields(parameters: Any) -> None:
    """Refuse rotary parameters that the host would fail on while it computes frequencies."""
    if parameters is None:
        return
    kind = parameters.get("rope_type", "default")
    if kind != "default" and kind not in ROPE_INIT_FUNCTIONS:
        raise ValueError(f"`rope_parameters` must have a `rope_type` that transformers knows, got {_shown(kind)}.")
    theta = parameters.get("rope_theta")
    if theta is not None and not (_is_real(theta) and theta > 0):
        raise ValueError(f"`rope_parameters` must have a positive number as `rope_theta`, got {_shown(theta)}.")


def _is_real(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _shown(value: Any) -> str:
    """Return a value as a short piece of one line."""
    text = " ".join(repr(value)[:200].split())
    return text if len(text) <= 60 else f"{text[:60]}..."

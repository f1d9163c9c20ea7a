"""The drafter's configuration.

Knows the names and the legal values of a drafter's fields, nothing about tensors. Of a drafter on the
Hub this file is loaded first, so it also says whether the host is one that the rest was written for.
"""

from typing import Any

from huggingface_hub.errors import StrictDataclassFieldValidationError
from transformers import Qwen3Config
from transformers.utils.versions import require_version

from .config_checks import check_before_the_host
from .config_checks import check_fields

# Of the files a drafter is saved in. A drafter of a later format is refused instead of being misread.
FORMAT_VERSION = 1

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
        draft_vocab_size (`int`, *optional*): rows of its own head, if that knows only some of the target's tokens; the buffer
            `d2t` holds, for each row, the token's id less the row.
        target_hidden_size (`int`, *optional*): width of the target, if it differs from `hidden_size`.
        markov_rank (`int`): rank of a head that adds a bias from the token before to each slot's logits; 0: none.
        markov_head_type (`str`): `"vanilla"`, `"gated"` (by the slot's state) or `"rnn"` (with a memory).
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
            names += ["markov_rank", "selector_rank", "conv_kernel_size", "enable_confidence_head"]
        for name in [name for name in names if getattr(self, name)]:
            raise ValueError(
                f"`{name}` must be left out for a token-conditioned drafter, got {getattr(self, name)}. It is a switch of "
                "feature-conditioned ones."
            )
        if self.draft_vocab_size is not None and not (self.has_own_head and 0 < self.draft_vocab_size <= self.vocab_size):
            raise ValueError(
                f"`draft_vocab_size` must be at most `vocab_size` {self.vocab_size} and belong to a head of its own "
                f"(`has_own_head`), got {self.draft_vocab_size} and {self.has_own_head}."
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
        if self.selector_rank and (self.selector_top_k > self.vocab_size or self.draft_vocab_size is not None):
            raise ValueError(
                f"`selector_top_k` must be at most `vocab_size` {self.vocab_size}, and the vocabulary whole, got "
                f"{self.selector_top_k} and `draft_vocab_size` {self.draft_vocab_size}."
            )
        if self.markov_rank and self.selector_rank:
            raise ValueError("`selector_rank` must be 0 beside a `markov_rank`, got both.")
        if self.conv_kernel_size and self.hidden_size % self.conv_group_size:
            raise ValueError(f"`conv_group_size` must divide `hidden_size` {self.hidden_size}, got {self.conv_group_size}.")

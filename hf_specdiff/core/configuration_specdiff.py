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
        block_size (`int`): slots of one drafter pass: the anchor and `block_size - 1` drafted tokens. At least 2.
        mask_token_id (`int`): the id that stands for "not yet known". Feature-conditioned: a row of the target's embedding.
            Token-conditioned: a row of the drafter's own embedding, inside `vocab_size` or beyond it. Never drafted.
        target_layer_ids (`list[int]`, *optional*): 0-based target layers whose outputs condition the drafter; the entry `i`
            reads `hidden_states[i + 1]`. `None`: a token-conditioned drafter with an embedding and a head of its own.
        num_target_layers (`int`, *optional*): layers of the target that the drafter was made for.
        target_model (`str`, *optional*): Hub repository or folder of that target.
        target_revision (`str`, *optional*): its commit, where it came from the Hub.
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
        return self.block_size - 1

    def _check_block(self) -> None:
        if self.use_sliding_window:
            raise ValueError("`use_sliding_window` must be False, got True: the drafter's context is not windowed.")
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

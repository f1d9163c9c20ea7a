"""From words to a `TrainingPlan`: what `--init` or the target says where no option does."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hf_specdiff.core.configuration_specdiff import SpecDiffConfig
from hf_specdiff.formats.loading import is_language_model
from hf_specdiff.formats.loading import load_drafter
from hf_specdiff.training.drafter_config import spread_layers
from hf_specdiff.training.plan import FIELDS
from hf_specdiff.training.plan import TrainingPlan
from hf_specdiff.training.settings import default_of


@dataclass(frozen=True, slots=True)
class Start:
    """What a run goes on from.

    Attributes:
        init (`pathlib.Path`, *optional*): `--init`.
        own (`SpecDiffConfig`, *optional*): its configuration, if it is a drafter of ours.
        is_language_model (`bool`): whether it is a diffusion language model, a folder or a Hub repository.
    """

    init: Path | None
    own: SpecDiffConfig | None
    is_language_model: bool

    @classmethod
    def of(cls, init: Path | None) -> "Start":
        """Look at what `--init` names."""
        is_aligned = init is not None and is_language_model(init)
        own = None if init is None or is_aligned else SpecDiffConfig.from_pretrained(init)
        return cls(init, own, is_aligned)

    @property
    def drafter(self) -> Path | None:
        """The drafter of ours to go on from."""
        return None if self.is_language_model else self.init

    def mask_token_id(self, named: int | None) -> int | None:
        """Return `--mask-token-id`, or the one of the drafter to go on from."""
        return self.own.mask_token_id if self.own is not None and named is None else named


def plan_of(
    named: dict[str, Any], start: Start, target: Any, conditioning: str | None, num_target_layers: int | None
) -> TrainingPlan:
    """Return the plan that the words make: what options name, else what the drafter to go on from has, else the defaults.

    Args:
        named (`dict`): fields that options name, see `read_settings`.
        start (`Start`): what the run goes on from.
        target (`transformers.PreTrainedModel`): the target.
        conditioning (`str`, *optional*): `--conditioning`.
        num_target_layers (`int`, *optional*): `--num-target-layers`.

    Raises:
        ValueError: if the target has fewer layers, or an option shapes what has a shape of its own.
    """
    if start.is_language_model:
        return TrainingPlan(**{"target_layer_ids": None, **named})
    own = start.own
    inherited: dict[str, Any] = {}
    if own is not None:
        inherited = {"num_layers": own.num_hidden_layers, "block_size": own.block_size}
        inherited |= {"predicts_from_anchor": own.predicts_from_anchor}
    return TrainingPlan(**{**inherited, **drafter_shape(target, own, conditioning, num_target_layers), **named})


def drafter_shape(
    target: Any,
    own: SpecDiffConfig | None,
    conditioning: str | None,
    num_target_layers: int | None,
) -> dict[str, Any]:
    """Return what a drafter reads: what the options say, else what the one to go on from does, else what fits the target.

    Args:
        target (`transformers.PreTrainedModel`): the target.
        own (`SpecDiffConfig`, *optional*): of the drafter to go on from.
        conditioning (`str`, *optional*): `--conditioning`.
        num_target_layers (`int`, *optional*): `--num-target-layers`.

    Returns:
        `dict`: `target_layer_ids` and `has_mask_embedding` of a `TrainingPlan`.
    """
    if conditioning is None:
        conditioning = "features" if own is None or own.is_feature_conditioned else "tokens"
    if conditioning == "tokens":
        return {"target_layer_ids": None, "has_mask_embedding": False}
    layer_ids = own.target_layer_ids if own is not None and num_target_layers is None else None
    if layer_ids is None:
        layer_ids = spread_layers(target.config.get_text_config().num_hidden_layers, num_target_layers or 5)
    has_mask_embedding = has_tied_head(target) if own is None else own.has_mask_embedding
    return {"target_layer_ids": layer_ids, "has_mask_embedding": has_mask_embedding}


def has_tied_head(target: Any) -> bool:
    """Return whether a target's embedding is its head."""
    head = target.get_output_embeddings()
    return head is not None and head.weight is target.get_input_embeddings().weight


def check_fits_language_model(
    named: dict[str, Any], conditioning: str | None, num_target_layers: int | None, cache_features: Path | None
) -> None:
    """Refuse options that shape a drafter of ours.

    Args:
        named (`dict`): fields that options name.
        conditioning (`str`, *optional*): `--conditioning`.
        num_target_layers (`int`, *optional*): `--num-target-layers`.
        cache_features (`pathlib.Path`, *optional*): `--cache-features`.

    Raises:
        ValueError: if one is named.
    """
    options = {"--conditioning features": conditioning == "features", "--num-layers": "num_layers" in named}
    options |= {"--num-target-layers": num_target_layers is not None}
    options |= {"--mask-embedding": named.get("has_mask_embedding", False), "--cache-features": cache_features is not None}
    for name, is_named in options.items():
        if is_named:
            raise ValueError(
                f"`{name}` must be left out where `--init` is a diffusion language model, got it: that has a shape of its own "
                "and reads the text alone."
            )


def load_language_model(start: Start, target: Any, named: dict[str, Any], mask_token_id: int | None) -> Any:
    """Return the diffusion language model to align.

    Args:
        start (`Start`): names its folder or Hub repository.
        target (`transformers.PreTrainedModel`): the model it is to draft for.
        named (`dict`): fields that options name; under an adapter frozen weights take the target's precision, others float32.
        mask_token_id (`int`, *optional*): where its files name none.

    Returns:
        `DiffusionDrafter`: on the target's device.
    """
    assert start.init is not None
    settings: dict[str, Any] = {} if mask_token_id is None else {"mask_token_id": mask_token_id}
    settings["block_size"] = named.get("block_size", default_of(FIELDS["block_size"]))
    # What "auto" picks hangs on the machine, and checkpoints are compared by what is accepted.
    settings |= {"context_cache": "exact", "dtype": torch.float32 if named.get("lora_rank") is None else target.dtype}
    return load_drafter(start.init, target=target, **settings).to(target.device)

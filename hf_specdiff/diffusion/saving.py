"""Writing a diffusion language model down as a drafter: its body as the host saves it, and how it is to be read beside it.

Knows files; `hf_specdiff.formats` reads them.
"""

import os
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

# The part of config.json that says how the body is read.
SECTION = "diffusion_drafter"
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
# Which of its own ids stands for each of the target's tokens, where words are shared and ids are not.
OWN_IDS = "own_ids.safetensors"
# Of the drafter's configuration, what is no setting of `DiffusionDrafter`.
NOTES = ("target_model", "target_revision", "training")


def is_adapted(body: Any) -> bool:
    """Return whether a body is one of peft's, with an adapter around frozen weights."""
    return hasattr(body, "peft_config") and hasattr(body, "merge_and_unload")


def save_drafter(drafter: Any, folder: str | os.PathLike) -> None:
    """Save a diffusion language model so that `load_drafter` reads it as it is; of one with an adapter, the adapter alone.

    Args:
        drafter (`DiffusionDrafter`): the drafter.
        folder (`str` or path): gets config.json, generation_config.json and the weights; made if it is not there.

    Raises:
        ValueError: if it has an adapter, and the weights that are under it came from nowhere.
    """
    folder, body = Path(folder), drafter.body
    native = body.get_base_model() if is_adapted(body) else body
    if is_adapted(body) and not native.name_or_path:
        raise ValueError(
            "`drafter` must have a body that was loaded from a folder or a repository for its adapter to be saved alone, got "
            "one that was not. Merge it: drafter.body = drafter.body.merge_and_unload()."
        )
    own_defaults = getattr(native, "generation_config", None)  # of what does not generate there are none
    setattr(native.config, SECTION, _section(drafter))
    if own_defaults is not None:
        native.generation_config = drafter.generation_config
    try:
        if is_adapted(body):
            body.save_pretrained(folder, save_embedding_layers=False)
            (folder / "README.md").unlink(missing_ok=True)  # peft's empty form of a card
            native.config.save_pretrained(folder)
        else:
            body.save_pretrained(folder)
    finally:
        delattr(native.config, SECTION)
        if own_defaults is not None:
            native.generation_config = own_defaults
    drafter.generation_config.save_pretrained(folder)
    if drafter.is_translated:
        save_file({"own_ids": drafter.own_ids.cpu()}, folder / OWN_IDS)


def _section(drafter: Any) -> dict[str, Any]:
    """Return what a folder must say beside the body's own configuration."""
    config, mask = drafter.config, drafter.own_mask_token_id
    foreign = [] if drafter.is_translated else (drafter.own_ids < 0).nonzero()[:, 0].tolist()
    return {
        "mask_token_id": mask,
        "block_size": config.block_size,
        "logit_offset": drafter.logit_offset,
        "attention": "full" if drafter.block_length is None else "block_causal",
        "block_length": drafter.block_length,
        "foreign_ids": [token_id for token_id in foreign if token_id != mask],
        "is_translated": drafter.is_translated,
        **{name: getattr(config, name) for name in NOTES},
    }

"""transformers' own assistant of Muse Glimmer: DFlash with two other names, all layers sliding by default.

Source: transformers 5.23, `MuseGlimmerAssistantModel`.
"""

from collections.abc import Iterable
from typing import Any

from transformers import MuseGlimmerAssistantConfig

from hf_specdiff.formats.record import Fields
from hf_specdiff.formats.record import Record

ARCHITECTURES = {"MuseGlimmerAssistantModel": "transformers' Muse assistant"}
RENAMES = {r"^encoder\.fc\.": "fc.", r"^encoder\.output_norm_enc\.": "hidden_norm."}


def read(config: dict[str, Any], shapes: dict[str, tuple[int, ...]], ignored: Iterable[str]) -> Record:
    """Read a configuration in this layout; arguments, result and errors as `dflash.read`.

    The file names no vocabulary: the target's is filled in later.
    """
    name = "transformers' Muse assistant"
    defaults = MuseGlimmerAssistantConfig().to_dict()
    top = Fields({**{key: value for key, value in defaults.items() if key != "layer_types"}, **config}, name)
    body = top.body()
    layer_types = top.take("layer_types", ["sliding_attention"] * body["num_hidden_layers"])
    fields = {
        **body,
        "layer_types": layer_types,
        "use_sliding_window": True,
        # Its queries see keys at a distance of the window's size too.
        "sliding_window": body["sliding_window"] + 1,
        "block_size": top.need("block_size"),
        "mask_token_id": top.need("mask_token_id"),
        "target_layer_ids": top.need("target_layer_ids"),
    }
    top.finish(ignored)
    return Record(name, fields, renames=dict(RENAMES))

"""Training a diffusion language model as a drafter: its windows, an adapter around its weights, and what does not apply to it.

Letters: B batch, S sequence length, A windows per sequence, W block size, G = W - 1, N = B * A, V vocabulary.
"""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_specdiff.formats.loading_language_models import import_peft
from hf_specdiff.training.plan import FIELDS
from hf_specdiff.training.plan import TrainingPlan
from hf_specdiff.training.settings import default_of
from hf_specdiff.training.windows import Windows

DROPOUT = 0.05
# Settings that say nothing about a language model.
OF_OUR_DRAFTERS = ["target_layer_ids", "draft_vocab_size", "head", "trained", "context_weight", "from_target"]
OF_OUR_DRAFTERS += ["predicts_from_anchor", "has_mask_embedding"]


def window_logits(drafter: Any, body: Any, input_ids: torch.Tensor, windows: Windows) -> torch.Tensor:
    """Return the logits of many windows: for each a pass over the text before it and itself, as in decoding.

    Where text sees the window, or later text, what is made of it is another thing for each window, so that windows cannot share
    a pass as those of other drafters do.

    Args:
        drafter (`DiffusionDrafter`): the drafter.
        body (`torch.nn.Module`): its body, as the trainer has wrapped it.
        input_ids (`torch.Tensor` of shape `(B, S)`, int64): the sequences.
        windows (`Windows`): cut from them.

    Returns:
        `torch.Tensor` of shape `(N, G, V)`: of the tokens in `drafter.drafted_ids`, in their order, where they are not all.
    """
    anchors = windows.anchors.flatten()
    rows = torch.arange(len(input_ids), device=input_ids.device).repeat_interleave(windows.anchors.shape[1])
    longest = int(anchors.max())
    # Padding stands on the left, so that all windows stand at the end.
    places = torch.arange(longest, device=input_ids.device) - (longest - anchors)[:, None]
    window = windows.input_ids.view(len(anchors), -1)
    is_text = torch.cat([places >= 0, torch.ones_like(window, dtype=torch.bool)], dim=1)
    places = places.clamp(min=0)
    logits = drafter(
        torch.cat([input_ids[rows[:, None], places], window], dim=1),
        attention_mask=is_text,
        position_ids=torch.cat([places, windows.position_ids.view(len(anchors), -1)], dim=1),
        window_size=window.shape[1],
        text_sees_window=drafter.context_cache != "prefix",
        body=body,
    ).logits
    drafted = drafter.drafted_ids
    return logits if drafted is None else logits[..., drafted]


def add_adapter(drafter: Any, rank: int, layers: Sequence[str] | None, seed: int) -> None:
    """Hold a language model's weights, and put a trainable product of low rank beside those of its linear layers.

    Args:
        drafter (`DiffusionDrafter`): its body is replaced by peft's.
        rank (`int`): of the products.
        layers (`Sequence[str]`, *optional*): names of the layers, or their ends (`q_proj`); by default all but the head.
        seed (`int`): of the fresh weights.

    Raises:
        ValueError: if a layer is none of the body's, or peft is not installed.

    Source: LoRA, arXiv:2106.09685; for drafters of this kind arXiv:2511.00606.
    """
    peft = import_peft(f"train an adapter of rank {rank}")
    named = linear_layers(drafter.body)
    missing = [name for name in layers or [] if not any(_ends_with(full, name) for full in named)]
    if missing:
        kinds = sorted({full.rsplit(".", 1)[-1] for full in named})
        raise ValueError(
            f"`lora_layers` must be linear layers of the language model ({', '.join(kinds)}), got {', '.join(missing)}. Leave "
            "it out to take all of them."
        )
    chosen = [full for full in named if layers is None or any(_ends_with(full, name) for name in layers)]
    name, revision = drafter.body.name_or_path, getattr(drafter.body.config, "_commit_hash", None)
    config = peft.LoraConfig(r=rank, lora_alpha=rank, lora_dropout=DROPOUT, target_modules=chosen, revision=revision)
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="fan_in_fan_out")  # what it is set to for GPT-2's layers
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`")  # peft's business with transformers
        drafter.body = peft.get_peft_model(drafter.body, config)
    # What the adapter will be loaded on: a folder is the same one from wherever it is looked for.
    config.base_model_name_or_path = str(Path(name).resolve()) if name and Path(name).is_dir() else name


def linear_layers(body: Any) -> list[str]:
    """Return the names of a body's linear layers but for its head."""
    head = body.get_output_embeddings()
    return [name for name, layer in body.named_modules() if isinstance(layer, nn.Linear | Conv1D) and layer is not head]


def _ends_with(full: str, name: str) -> bool:
    return full == name or full.endswith(f".{name}")


def check_plan(plan: TrainingPlan) -> None:
    """Refuse settings that say nothing about a language model, which comes with a shape of its own.

    Args:
        plan (`TrainingPlan`): of a run that goes on from a diffusion language model.

    Raises:
        ValueError: if so.
    """
    for name in OF_OUR_DRAFTERS:
        if getattr(plan, name) != default_of(FIELDS[name]):
            raise ValueError(
                f"`{name}` must be left out for a diffusion language model, got {getattr(plan, name)!r}: its shape is its own, "
                "and it reads the text alone."
            )
    if plan.lora_layers is not None and plan.lora_rank is None:
        raise ValueError(f"`lora_rank` must be given with `lora_layers`, got None with {list(plan.lora_layers)}.")

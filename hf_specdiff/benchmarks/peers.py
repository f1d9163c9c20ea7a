"""Other people's loops over the same weights: z-lab's own DFlash loop, where its package `dflash` is installed.

Knows how that loop is called and how to see from outside what it does.
"""

import tempfile
from collections.abc import Iterable
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any
from weakref import WeakKeyDictionary

import torch

from hf_specdiff.benchmarks.methods import Method
from hf_specdiff.benchmarks.methods import Models
from hf_specdiff.core.own_drafter import is_own_drafter
from hf_specdiff.formats.exporting import export_drafter

PACKAGE = "dflash"
# Drafters as z-lab's class holds them, by ours.
_NETWORKS: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()


@dataclass(frozen=True, slots=True)
class DFlashMethod(Method):
    """z-lab's own DFlash loop, `dflash.model.dflash_generate`: chains of a whole window, one prompt at a time."""

    @property
    def loop(self) -> str:
        """Whose loop runs."""
        return PACKAGE

    def assistant_of(self, models: Models) -> Any:
        """Return the drafter as z-lab's class, its weights written in z-lab's layout and read back, without a Markov head.

        Args:
            models (`Models`): who decodes.

        Returns:
            `dflash.model.DFlashDraftModel`: the same one each time.

        Raises:
            ValueError: for a drafter that the layout cannot hold.
        """
        drafter = models.drafters[str(self.assistant)]
        if drafter not in _NETWORKS:
            with tempfile.TemporaryDirectory() as folder:
                has_head = bool(drafter.config.markov_rank or drafter.config.enable_confidence_head)
                export_drafter(drafter, folder, to=PACKAGE, target=models.target, without_head=has_head)
                network = import_module(f"{PACKAGE}.model").DFlashDraftModel.from_pretrained(folder, dtype=drafter.dtype)
            _NETWORKS[drafter] = network.to(drafter.device).eval()
        return _NETWORKS[drafter]

    def decode(self, models: Models, inputs: Mapping[str, Any], **settings: Any) -> Any:
        """Decode one prompt; see `Method.decode`.

        Raises:
            ValueError: for several prompts, which the loop does not take, and for a drafter that the layout cannot hold.
        """
        prompt = inputs["input_ids"]
        if len(prompt) > 1:
            raise ValueError(f"`batch_size` must be 1 in z-lab's loop, got {len(prompt)}.")
        ends = models.target.generation_config.eos_token_id
        run = import_module(f"{PACKAGE}.model").dflash_generate
        with _Told(models.target, prompt, settings.get("streamer")) as told:
            sequences = run(
                self.assistant_of(models),
                models.target,
                prompt,
                settings["max_new_tokens"],
                [ends] if isinstance(ends, int) else ends,
                temperature=settings["temperature"] if settings.get("do_sample") else 0.0,
                top_p=settings.get("top_p", 1.0),
                top_k=settings.get("top_k", 0),
            )
            told.up_to(sequences.shape[1])
        return SimpleNamespace(sequences=sequences)


class _Told:
    """Tell a streamer, inside `with`, how many tokens each pass of the target found written: the loop itself tells nobody.

    Args:
        target (`transformers.PreTrainedModel`): called by the loop with `position_ids`, the first of which says how far the
            text had come.
        prompt (`torch.Tensor` of shape `(1, L)`, int64): told first.
        streamer (*optional*): gets as many zeros as there are new tokens.
    """

    def __init__(self, target: Any, prompt: torch.Tensor, streamer: Any | None) -> None:
        self.target = target
        self.prompt = prompt
        self.streamer = streamer
        self._told = prompt.shape[1]
        self._hook: Any = None

    def __enter__(self) -> "_Told":
        if self.streamer is not None:
            self.streamer.put(self.prompt)
            self._hook = self.target.register_forward_pre_hook(self._see, with_kwargs=True)
        return self

    def __exit__(self, *error: object) -> None:
        if self._hook is not None:
            self._hook.remove()

    def up_to(self, length: int) -> None:
        """Tell the tokens up to a length of the text."""
        if self.streamer is not None and length > self._told:
            self.streamer.put(torch.zeros(length - self._told, dtype=torch.long))
            self._told = length

    def _see(self, module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        # The pass reads the text's last token first.
        self.up_to(int(kwargs["position_ids"][0, 0]) + 1)


def peer_methods(models: Models, drafters: Iterable[str]) -> list[Method]:
    """Return other people's loops with some of the drafters, as far as they are installed.

    Args:
        models (`Models`): who decodes.
        drafters (`Iterable[str]`): names of drafters; those that read tokens alone, and those of the user's own, are nothing
            for these loops.

    Returns:
        `list[Method]`: none where `dflash` is not installed. A drafter that its layout cannot hold, or a batch, is for whoever
            runs the method to find out: it raises, and says why.
    """
    if find_spec(PACKAGE) is None:
        return []
    names = [name for name in drafters if _reads_features(models.drafters[name])]
    return [DFlashMethod(f"z-lab's loop, {name}", {}, name) for name in names]


def _reads_features(drafter: Any) -> bool:
    """Return whether a drafter is a network of ours that reads hidden states of the target."""
    return not is_own_drafter(drafter) and drafter.config.target_layer_ids is not None

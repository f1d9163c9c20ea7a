"""A folder or Hub repository with somebody's drafter: its configuration and what its weights file says about its tensors.

Reads config.json and the headers of safetensors files, never the weights: whatever is wrong is found before memory is taken.
"""

import json
from dataclasses import dataclass
from dataclasses import field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors import safe_open
from transformers.utils.hub import cached_file

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
# Written by torch.save: reading them can run code.
PICKLED = ("pytorch_model.bin", "pytorch_model.bin.index.json", "mask_embedding.pt")
HUB_ARGUMENTS = ("revision", "cache_dir", "force_download", "local_files_only", "token", "subfolder", "proxies")


@dataclass
class Source:
    """Where a drafter lies.

    Attributes:
        name (`str`): a folder or a Hub repository.
        arguments (`dict`): of `from_pretrained`; those about the Hub are used here.
        config (`dict`): config.json.
    """

    name: str
    arguments: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def open(cls, source: Any, arguments: dict[str, Any]) -> "Source":
        """Read the configuration.

        Args:
            source (`str` or path): a folder or a Hub repository.
            arguments (`dict`): of `from_pretrained`.

        Returns:
            `Source`: with its `config`.

        Raises:
            ValueError: if there is none, or it is no JSON object.
        """
        opened = cls(str(source), arguments)
        path = opened.file(CONFIG)
        if path is None:
            raise ValueError(
                f"`source` must be a drafter's folder or Hub repository with a {CONFIG}, got {opened.name!r} without one. Look "
                "at the name, the revision and the connection."
            )
        try:
            opened.config = json.loads(path.read_text(encoding="utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{CONFIG} of {opened.name!r} must be JSON, got: {error}. Download it again.") from error
        if not isinstance(opened.config, dict):
            raise ValueError(f"{CONFIG} of {opened.name!r} must be a JSON object, got {type(opened.config).__name__}.")
        return opened

    def file(self, name: str) -> Path | None:
        """Return where a file lies on this machine, downloaded if need be; `None`: there is no such file."""
        hub = {key: value for key, value in self.arguments.items() if key in HUB_ARGUMENTS and value is not None}
        missing = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_gated_repo": True}
        try:
            path = cached_file(self.name, name, **missing, **hub)
        except OSError as error:
            raise ValueError(
                f"`source` must be a drafter's folder or Hub repository, got {self.name!r}: "
                f"{' '.join(str(error).split())[:300]}"
            ) from error
        return None if path is None else Path(path)

    def weight_files(self) -> list[Path]:
        """Return the safetensors files.

        Raises:
            ValueError: if there are none, some are missing, or there are two sets of them.
        """
        whole, index = self.file(WEIGHTS), self.file(INDEX)
        if whole is not None and index is not None:
            raise ValueError(f"{self.name!r} must hold one set of weights, got {WEIGHTS} and {INDEX}. Remove the wrong one.")
        if whole is not None:
            return [whole]
        if index is None:
            pickled = [name for name in PICKLED if self.file(name) is not None]
            raise ValueError(
                f"{self.name!r} must hold its weights in {WEIGHTS}, got {' and '.join(pickled) or 'none'}. "
                + ("Pickled weights can run code while they are read: convert them to safetensors first." if pickled else "")
            )
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (json.JSONDecodeError, KeyError, AttributeError) as error:
            raise ValueError(
                f"{INDEX} of {self.name!r} must map tensors to files, got {error!r}. Download it again."
            ) from error
        files = [(name, self.file(name)) for name in names]
        for name, path in files:
            if path is None:
                raise ValueError(f"{self.name!r} must hold {name}, which {INDEX} names, got none. Download it again.")
        return [path for _, path in files if path is not None]

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the tensors' names and shapes, from the headers alone.

        Raises:
            ValueError: if a file is broken, or a side file holds a part of the weights that is not read.
        """
        found: dict[str, tuple[int, ...]] = {}
        for path in self.weight_files():
            try:
                with safe_open(path, framework="pt") as file:
                    found |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
            except SafetensorError as error:
                raise ValueError(
                    f"{path.name} of {self.name!r} must be a whole safetensors file, got one that is broken or cut short: "
                    f"{error}. Download it again."
                ) from error
        side = [name for name in PICKLED if self.file(name) is not None and not name.startswith("pytorch_model")]
        if side:
            raise ValueError(
                f"{self.name!r} must hold all of its weights in safetensors, got {side[0]} beside them. Pickled weights can "
                "run code while they are read: add it to the safetensors file as the tensor `mask_embedding`."
            )
        return found

    def tensor(self, name: str) -> Any:
        """Return one small tensor, read into memory."""
        for path in self.weight_files():
            with safe_open(path, framework="pt") as file:
                if name in file.keys():  # noqa: SIM118
                    return file.get_tensor(name)
        raise KeyError(name)

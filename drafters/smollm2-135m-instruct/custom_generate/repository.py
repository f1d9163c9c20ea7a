"""Saving a drafter as a whole Hub repository: the code of both roles is copied byte for byte beside the weights.

Both roles, the network and the decoding strategy, share files, and the host lets a strategy lie nowhere but in
`custom_generate/`: so all code lies there once, and `auto_map` names it there. An installed package has the files beside this
one; a drafter that was loaded without it takes them, and its card, from where it came from. Knows no network and no loop.
"""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from typing import ClassVar

from huggingface_hub import try_to_load_from_cache
from transformers.dynamic_module_utils import get_relative_imports
from transformers.utils import cached_file

from .files import write_whole

# The versions that the code runs with; the host checks them, a bound a line, before it runs any of it.
REQUIREMENTS = "torch>=2.6\ntransformers>=5.17\ntransformers<6\n"
CARD = "README.md"
PLACE = "custom_generate"
# The files that the host loads by name; whatever they import comes along.
ROLES = ("generate", "configuration_specdiff", "modeling_specdiff")


def is_repository(name: str | None) -> bool:
    """Return whether a model's name is a repository on the Hub (`org/name`) and no path."""
    return name is not None and re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", name) is not None


def is_on_hub(name: str | None) -> bool:
    """Return whether a model's name is a repository's and not a folder's: a path of this machine tells strangers nothing."""
    return name is not None and is_repository(name) and not Path(name).exists()


def cached_revision(name: str | None) -> str | None:
    """Return the commit that a model was loaded from just now.

    Args:
        name (`str`, *optional*): as it was given to `from_pretrained`.

    Returns:
        `str`, *optional*: `None` for a folder, and for what did not come from the Hub.
    """
    if not is_on_hub(name):
        return None
    found = try_to_load_from_cache(str(name), "config.json")
    return Path(found).parent.name if isinstance(found, str) else None


def code_files(config: Any = None) -> list[Path]:
    """Return all files of code that a repository carries.

    Args:
        config (`SpecDiffConfig`, *optional*): tells where the drafter came from, for files that do not lie beside this one.

    Returns:
        `list[pathlib.Path]`: found by the host's own search; empty if one of them is nowhere.
    """
    found: dict[str, Path] = {}
    queue = list(ROLES)
    while queue:
        name = queue.pop()
        if name in found:
            continue
        path: Path | None = Path(__file__).with_name(f"{name}.py")
        if path is None or not path.is_file():
            path = _origin(config, f"{PLACE}/{name}.py")
        if path is None:
            return []
        found[name] = path
        queue += get_relative_imports(str(path))
    return list(found.values())


def write_code(folder: Path, config: Any) -> None:
    """Write the code into a repository; other files of its `custom_generate` stay.

    Args:
        folder (`pathlib.Path`): the repository.
        config (`SpecDiffConfig`): tells where the drafter came from.
    """
    contents = {path.name: path.read_bytes() for path in code_files(config)}
    if not contents:
        return
    (folder / PLACE).mkdir(parents=True, exist_ok=True)
    for name, content in (contents | {"requirements.txt": REQUIREMENTS.encode()}).items():
        write_whole(folder / PLACE / name, partial(Path.write_bytes, data=content))


def _reference(kind: type) -> str:
    """Return how `auto_map` names a class."""
    return f"{PLACE}/{kind.__module__.rsplit('.', 1)[-1]}.{kind.__name__}"


@contextmanager
def _without_code(*kinds: Any) -> Iterator[None]:
    """Keep the host from copying code itself: it would put a registered class's files into the root, all a second time."""
    registered = [(kind, kind._auto_class) for kind in kinds]
    try:
        for kind in kinds:
            kind._auto_class = None
        yield
    finally:
        for kind, name in registered:
            kind._auto_class = name


def _origin(config: Any, name: str) -> Path | None:
    """Return a file of the repository or folder that a drafter was loaded from, if it has one of that name."""
    source = getattr(config, "_name_or_path", "")
    if not source:
        return None
    revision = getattr(config, "_commit_hash", None)
    options: dict[str, Any] = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    path = cached_file(source, name, revision=revision, _raise_exceptions_for_gated_repo=False, **options)
    return None if path is None else Path(path)


class RepositoryMixin:
    """Saving and uploading a drafter as a whole repository: in front of `transformers.PreTrainedModel` among its bases.

    Attributes:
        hub (module, *optional*): how the installed package writes cards and uploads (`write_card`, `push`); its front puts it
            here. `None`: the card is the one that the drafter came with, and the host uploads.
    """

    config: Any
    hub: ClassVar[Any] = None

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        is_main_process: bool = True,
        *args: Any,
        push_to_hub: bool = False,
        **kwargs: Any,
    ) -> None:
        """Save the whole Hub repository: weights, configuration, the code in `custom_generate/`, and a card.

        A card with its owner's own words stays as it is.

        Args:
            save_directory (`str` or path): the folder.
            is_main_process (`bool`): whether this process writes the files.
            *args: as `transformers.PreTrainedModel.save_pretrained`.
            push_to_hub (`bool`): whether to upload the drafter afterwards, as `push_to_hub` does; its arguments may be passed
                too, and `repo_id` is by default the folder's name. Nothing else in the folder is uploaded.
            **kwargs: as `transformers.PreTrainedModel.save_pretrained`.
        """
        names = ("repo_id", "private", "commit_message", "commit_description", "revision", "create_pr", "tags")
        hub_arguments = {name: kwargs.pop(name) for name in names if name in kwargs}
        model = _reference(type(self))  # a headless AutoModel is the same class
        self.config.auto_map = {"AutoConfig": _reference(type(self.config)), "AutoModel": model, "AutoModelForCausalLM": model}
        with _without_code(type(self), type(self.config)):
            # Of the class behind this one among the bases, which mypy cannot know.
            super().save_pretrained(save_directory, is_main_process, *args, **kwargs)  # type: ignore[misc]
        if not is_main_process:
            return
        folder = Path(save_directory)
        write_code(folder, self.config)
        if self.hub is not None:
            self.hub.write_card(folder, self, repo_id=hub_arguments.get("repo_id"))
        elif not (folder / CARD).exists() and (card := _origin(self.config, CARD)) is not None:
            write_whole(folder / CARD, partial(Path.write_bytes, data=card.read_bytes()))
        if push_to_hub:
            self.push_to_hub(**{"repo_id": folder.name, "token": kwargs.get("token"), **hub_arguments})

    def push_to_hub(self, repo_id: str, **settings: Any) -> Any:
        """Upload the whole repository in one commit; a card with its owner's own words stays as it is.

        `hf-specdiff publish` does the same with a tokenizer, measured figures and a self-check first.

        Args:
            repo_id (`str`): `name` or `org/name`.
            **settings: `commit_message`, `commit_description`, `private` (refused for a repository that is public already),
                `token`, `revision` (the branch), `create_pr`, `max_shard_size` and `tags` (more of them for the card), as for
                `transformers.PreTrainedModel.push_to_hub`.

        Returns:
            `huggingface_hub.CommitInfo`: the commit.

        Raises:
            ValueError: if the Hub refuses.
            ConnectionError: if the connection breaks; the same call goes on.
        """
        if self.hub is None:
            return super().push_to_hub(repo_id, **settings)  # type: ignore[misc]
        return self.hub.push(self, repo_id, **settings)

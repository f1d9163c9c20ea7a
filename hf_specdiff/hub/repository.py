"""A drafter's repository on the Hub beside its weights and code: the card, and how all of it gets there in one commit.

Knows the Hub's client, and which of a repository's files are ours.
"""

import json
import tempfile
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.errors import HTTPError
from huggingface_hub.errors import LocalTokenNotFoundError
from huggingface_hub.utils import validate_repo_id
from transformers.dynamic_module_utils import get_relative_imports

from hf_specdiff.core.files import write_text_whole
from hf_specdiff.core.repository import CARD
from hf_specdiff.core.repository import PLACE
from hf_specdiff.core.repository import ROLES
from hf_specdiff.core.repository import is_on_hub
from hf_specdiff.core.speculation import SPECULATION_ARGUMENTS
from hf_specdiff.formats.loading import SECTION
from hf_specdiff.hub.card import MARK
from hf_specdiff.hub.card import drafter_card

# Of a repository that is written over: weights in another number of files, modules that have another name by now.
STALE = (f"{PLACE}/*.py", "model.safetensors*", "model-*.safetensors")


def is_own_card(text: str) -> bool:
    """Return whether a card was written by us and not taken over by its owner, who would have removed the mark."""
    return MARK in text


def write_card(folder: Path, drafter: Any, **card_arguments: Any) -> None:
    """Write a drafter's card into a repository, unless its owner's own words are there.

    Args:
        folder (`pathlib.Path`): the repository.
        drafter (`SpecDiffDrafter`): the drafter.
        **card_arguments: of `drafter_card`.
    """
    place = folder / CARD
    if place.is_file() and not is_own_card(place.read_text(encoding="utf-8")):
        return
    card = drafter_card(drafter.config, drafter.num_parameters(), defaults=own_defaults(drafter), **card_arguments)
    write_text_whole(place, str(card))


def own_defaults(drafter: Any) -> dict[str, Any]:
    """Return the arguments of speculation that a drafter's own `generation_config` sets."""
    values = {name: getattr(drafter.generation_config, name, None) for name in SPECULATION_ARGUMENTS}
    return {name: value for name, value in values.items() if value is not None}


def full_name(repo_id: str, token: str | bool | None = None) -> str:
    """Return a repository's name with its namespace: by default the user's own.

    Args:
        repo_id (`str`): `name` or `org/name`.
        token (`str` or `bool`, *optional*): as for `huggingface_hub`.

    Returns:
        `str`: `org/name`.

    Raises:
        ValueError: if it can be no name on the Hub, or there is no token to ask whose it is.
        ConnectionError: if the Hub cannot be asked.
    """
    validate_repo_id(repo_id)
    if "/" in repo_id:
        return repo_id
    try:
        return f"{HfApi(token=token).whoami()['name']}/{repo_id}"
    except LocalTokenNotFoundError as error:
        raise ValueError(
            f"`repo_id` must be org/name where nobody is logged in, got {repo_id!r}. Run `hf auth login`, or pass token=..."
        ) from error
    except HTTPError as error:
        raise explain_hub_error(error, repo_id) from error


def upload_repository(
    folder: Path,
    repo_id: str,
    *,
    message: str,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    description: str | None = None,
) -> CommitInfo:
    """Make a repository on the Hub what a folder is, in one commit or none; what is there already is not sent again.

    A card with its owner's own words stays, and so does every file that is neither weights nor code of ours. What code earlier
    versions put into the root goes in the same commit.

    Args:
        folder (`pathlib.Path`): all files of the repository.
        repo_id (`str`): `org/name`; created if it is not there.
        message (`str`): of the commit.
        private (`bool`, *optional*): whether the repository is private.
        token (`str` or `bool`, *optional*): as for `huggingface_hub`; by default the stored one.
        revision (`str`, *optional*): the branch; created if it is not there.
        create_pr (`bool`): whether to open a pull request instead.
        description (`str`, *optional*): of the commit.

    Returns:
        `huggingface_hub.CommitInfo`: the commit; the newest one if nothing has changed.

    Raises:
        ValueError: if there is no token, it may not write there, the name is taken by something else, or the repository is
            public and shall be private.
        ConnectionError: if the Hub cannot be reached or the connection breaks; the next call goes on where this one stopped.
    """
    api = HfApi(token=token)
    try:
        api.create_repo(repo_id, private=private, exist_ok=True)
        if private and not api.repo_info(repo_id).private:
            raise ValueError(
                f"`private` must be False for {repo_id!r}, which is there already and public, got True. Make it private in "
                "its settings, or choose another name."
            )
        if revision is not None and not revision.startswith("refs/"):
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        files = api.list_repo_files(repo_id, revision=revision)
        check_is_drafters(api, repo_id, files, revision)
        return api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            commit_message=message,
            commit_description=description,
            revision=revision,
            create_pr=create_pr,
            ignore_patterns=[CARD] if CARD in files and not is_own_card(_read(api, repo_id, CARD, revision)) else None,
            delete_patterns=[*STALE, *code_in_root(api, repo_id, files, revision)],
        )
    except HTTPError as error:
        raise explain_hub_error(error, repo_id) from error
    except RuntimeError as error:  # so the client wraps what happens while it sends a large file
        if not isinstance(error.__cause__, HTTPError):
            raise
        raise explain_hub_error(error.__cause__, repo_id) from error


def check_is_drafters(api: HfApi, repo_id: str, files: list[str], revision: str | None = None) -> None:
    """Refuse to write over a repository that holds another model.

    Args:
        api (`huggingface_hub.HfApi`): the client.
        repo_id (`str`): an existing repository.
        files (`list[str]`): what is in it.
        revision (`str`, *optional*): of them.

    Raises:
        ValueError: if it has weights or a configuration that are no drafter's.
    """
    is_model = "config.json" in files or any(name.endswith((".safetensors", ".bin", ".gguf")) for name in files)
    if not is_model:
        return
    try:
        config = json.loads(_read(api, repo_id, "config.json", revision)) if "config.json" in files else {}
    except json.JSONDecodeError:
        config = {}
    if not isinstance(config, dict) or (config.get("model_type") != "specdiff" and SECTION not in config):
        raise ValueError(
            f"`repo_id` must be a new name or a drafter's repository, got {repo_id!r}, which holds something else "
            f"({', '.join(files[:3])}, ...). Choose another name."
        )


def code_in_root(api: HfApi, repo_id: str, files: list[str], revision: str | None = None) -> list[str]:
    """Return the code of ours in a repository's root, where the host puts the files of a registered class and what they import.

    Versions before `auto_map` named the files in `custom_generate/` left it there. Nothing reads it any more.

    Args:
        api (`huggingface_hub.HfApi`): the client.
        repo_id (`str`): an existing repository.
        files (`list[str]`): what is in it.
        revision (`str`, *optional*): of them.

    Returns:
        `list[str]`: names of files. Others in the root are their owner's.
    """
    found: list[str] = []
    queue = [role for role in ROLES if role != "generate"]
    while queue:
        name = f"{queue.pop()}.py"
        if name in files and name not in found:
            found.append(name)
            queue += get_relative_imports(api.hf_hub_download(repo_id, name, revision=revision))
    return found


def _read(api: HfApi, repo_id: str, path: str, revision: str | None) -> str:
    return Path(api.hf_hub_download(repo_id, path, revision=revision)).read_text(encoding="utf-8")


def explain_hub_error(error: Exception, repo_id: str) -> ValueError | ConnectionError:
    """Return what the user can do about an error of the Hub's client.

    Args:
        error (`Exception`): of `huggingface_hub`.
        repo_id (`str`): the repository that was asked for.

    Returns:
        `ValueError` where the call has to change, `ConnectionError` where trying again may help.
    """
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    said = " ".join(str(error).split())[:200]
    if status == 401:
        return ValueError(
            f"`token` must be one that the Hub knows, got none or another for {repo_id!r}. Run `hf auth login`, or pass "
            f"token=... with write access. The Hub said: {said}"
        )
    if status in (403, 404):
        return ValueError(
            f"`repo_id` must be a repository that the token may write to, got {repo_id!r}. Is the name taken, or the token "
            f"read-only? The Hub said: {said}"
        )
    if status is not None and status < 500 and status != 429:
        return ValueError(f"`repo_id` must be one that the Hub takes, got {repo_id!r}. The Hub said: {said}")
    return ConnectionError(
        f"the connection to the Hub broke off while {repo_id!r} was being written: {said}. No commit was made unless "
        "the Hub had all of it; the same call goes on where this one stopped."
    )


def push(
    drafter: Any,
    repo_id: str,
    *,
    commit_message: str | None = None,
    commit_description: str | None = None,
    private: bool | None = None,
    token: bool | str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    max_shard_size: int | str = "50GB",
    tags: list[str] | None = None,
) -> CommitInfo:
    """Upload a drafter's whole repository in one commit; arguments and result as `SpecDiffDrafter.push_to_hub`."""
    repo_id = full_name(repo_id, token)
    with tempfile.TemporaryDirectory() as name:
        folder, target = Path(name), drafter.config.target_model
        drafter.config.target_model = target if is_on_hub(target) else None
        try:
            drafter.save_pretrained(folder, max_shard_size=max_shard_size)
            write_card(folder, drafter, repo_id=repo_id, tags=tags)
        finally:
            drafter.config.target_model = target
        return upload_repository(
            folder,
            repo_id,
            message=commit_message or "Upload drafter",
            description=commit_description,
            private=private,
            token=token,
            revision=revision,
            create_pr=create_pr,
        )

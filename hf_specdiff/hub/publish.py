"""Publishing a drafter: the whole repository beside its place, a check as a stranger would use it, one commit, a tag.

Knows the order of these steps and what may go wrong in each. The files of a repository are `repository.py`'s business, the
card's text `card.py`'s.
"""

import json
import math
import re
import shutil
import time
from collections import defaultdict
from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from huggingface_hub import HfApi
from huggingface_hub.errors import HTTPError
from huggingface_hub.errors import LocalTokenNotFoundError
from transformers import AutoModelForCausalLM
from transformers import AutoTokenizer
from transformers import GenerationConfig

from hf_specdiff.core.configuration_specdiff import SpecDiffConfig
from hf_specdiff.core.generate import generate
from hf_specdiff.core.modeling_specdiff import SpecDiffDrafter
from hf_specdiff.core.repository import CARD
from hf_specdiff.core.repository import cached_revision
from hf_specdiff.core.repository import is_on_hub
from hf_specdiff.core.speculation import SPECULATION_ARGUMENTS
from hf_specdiff.formats.loading import SECTION
from hf_specdiff.formats.loading import load_drafter
from hf_specdiff.hub.card import check_results
from hf_specdiff.hub.repository import explain_hub_error
from hf_specdiff.hub.repository import own_defaults
from hf_specdiff.hub.repository import upload_repository
from hf_specdiff.hub.repository import write_card

RESULTS = "results.json"
# Of the record of training, what the card tells; and fields of a configuration that the host's own DFlash loop reads.
TRAINING_FIELDS = ("data", "objective", "steps")
OTHER_FIELDS = {"dflash_config"}
CHECK_TOKENS = 48
RETRIES = 4
FIRST_WAIT_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class Staged:
    """A repository that is ready to go out.

    Attributes:
        folder (`pathlib.Path`): where it lies.
        files (`list[tuple[str, int]]`): each file's path in the repository and its bytes.
        tokens_per_round (`float`): of the self-check.
    """

    folder: Path
    files: list[tuple[str, int]]
    tokens_per_round: float


@dataclass(frozen=True, slots=True)
class Published:
    """What is on the Hub now.

    Attributes:
        repo_id (`str`): the repository.
        commit (`str`): its newest commit.
        tag (`str`): the version's name.
    """

    repo_id: str
    commit: str
    tag: str


@contextmanager
def staged(
    path: Path,
    repo_id: str,
    *,
    target: str | None = None,
    results: Path | None = None,
    license_name: str | None = None,
    prompt: str = "Once upon a time",
    bundled: Mapping[str, Path] | None = None,
) -> Iterator[Staged]:
    """Write a drafter's whole repository into a temporary folder and check it; for `with`.

    Args:
        path (`pathlib.Path`): a folder with a trained drafter, as `save_pretrained` writes it, or with a diffusion language
            model that was aligned here.
        repo_id (`str`): where it will be found; the card names it.
        target (`str`, *optional*): the target's folder or Hub repository; by default the one that the drafter's configuration
            names. A Hub repository that is given here becomes the card's base model.
        results (`pathlib.Path`, *optional*): figures for the card, of `hf-specdiff doctor --output`; by default `results.json`
            in `path`, if there is one. The fastest method measured becomes the drafter's default, unless it has its own.
        license_name (`str`, *optional*): the Hub's name of a licence.
        prompt (`str`): of the self-check.
        bundled (`Mapping[str, pathlib.Path]`, *optional*): names of targets that come with a package, and where they lie.

    Yields:
        `Staged`: the folder and what is in it; gone afterwards.

    Raises:
        ValueError: if `path` holds no drafter, or a card or figures that are links to elsewhere; if its target is not known,
            `results` is no record of figures, or the drafter fails the self-check.
    """
    drafter = _load_drafter(path)
    card = _own_file(path, CARD)
    figures = _read_results(results or _own_file(path, RESULTS))
    name = target or drafter.config.target_model
    if name is None:
        raise ValueError(
            f"`target` must be given for a drafter whose configuration names none, got None for {str(path)!r}. The self-check "
            "runs the drafter with its target: pass --target FOLDER_OR_REPOSITORY."
        )
    recorded = drafter.config.target_revision if name == drafter.config.target_model else None
    bundled = bundled or {}
    model, tokenizer = _load_target(str(bundled.get(name, name)), recorded)
    _name_target(drafter.config, name, recorded or cached_revision(name), is_known=name in bundled)
    _set_defaults(drafter, figures)
    _keep_known_fields(drafter)
    with TemporaryDirectory() as parent:
        # The host names its copy of local code after the folder, so the folder has a name of its own.
        folder = Path(parent) / "specdiff_drafter"
        drafter.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        if figures is not None:
            (folder / RESULTS).write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
        if card is not None:
            shutil.copyfile(card, folder / CARD)  # its owner's own words stay
        write_card(folder, drafter, repo_id=repo_id, results=figures, license_name=license_name)
        rate = self_check(folder, model, tokenizer, prompt)
        files = [(str(file.relative_to(folder)), file.stat().st_size) for file in sorted(folder.rglob("*")) if file.is_file()]
        yield Staged(folder, files, rate)


def self_check(folder: Path, target: Any, tokenizer: Any, prompt: str) -> float:
    """Use a repository as somebody would who has only transformers: load its code, draft, compare with plain `generate`.

    Args:
        folder (`pathlib.Path`): the repository; its code is run.
        target (`transformers.PreTrainedModel`): in float32.
        tokenizer (`PreTrainedTokenizerBase`): the target's.
        prompt (`str`): a text to continue.

    Returns:
        `float`: tokens per round.

    Raises:
        ValueError: if the drafter cannot be loaded, does not fit, or other tokens come out.
    """
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False).to(target.device)
    settings: dict[str, Any] = {"do_sample": False, "max_new_tokens": CHECK_TOKENS, "return_dict_in_generate": True}
    try:
        plain = target.generate(**inputs, **settings)
        if _kind_of(folder) == SpecDiffConfig.model_type:
            network = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32)
            settings |= {"assistant_model": network.to(target.device).eval(), "custom_generate": str(folder)}
            ours = target.generate(**inputs, trust_remote_code=True, **settings)
        else:  # a language model has no code of its own
            drafter = load_drafter(folder, target=target, dtype=torch.float32).to(target.device)
            ours = generate(target, **inputs, assistant_model=drafter, **settings)
    except (ValueError, TypeError, RuntimeError, OSError) as error:
        raise ValueError(f"`path` must hold a drafter that works with its target, got one that does not: {error}") from error
    if not torch.equal(plain.sequences, ours.sequences):
        raise ValueError(
            "`path` must hold a drafter that leaves greedy tokens as they are, got others than plain generate's on the prompt "
            f"{prompt!r}. Please report this target; nothing is published."
        )
    return float(ours.speculation.tokens_per_round)


def publish(repository: Staged, repo_id: str, *, private: bool, token: str | None, report: Callable[[str], None]) -> Published:
    """Upload a staged repository in one commit and tag it; a broken connection is tried again.

    Args:
        repository (`Staged`): of `staged`.
        repo_id (`str`): `org/name`; created if it is not there.
        private (`bool`): whether the repository is private.
        token (`str`, *optional*): by default the stored one.
        report (`Callable`): is told what happens.

    Returns:
        `Published`: the commit and its tag: the next free of v1, v2, ...; the old one if nothing has changed.

    Raises:
        ValueError: if the Hub refuses.
        ConnectionError: if the connection stays broken; the next call goes on where this one stopped.
    """

    def upload() -> str:
        commit = upload_repository(repository.folder, repo_id, message="Publish drafter", private=private or None, token=token)
        return str(commit.oid)

    api = HfApi(token=token)
    commit = _try_again(upload, report)
    tag = _try_again(lambda: _tag(api, repo_id, commit), report)
    return Published(repo_id, commit, tag)


def check_token(token: str | None, repo_id: str) -> None:
    """Refuse a token that is missing or may only read, before any work.

    Args:
        token (`str`, *optional*): by default the stored one.
        repo_id (`str`): for the message.

    Raises:
        ValueError: if so.
        ConnectionError: if the Hub cannot be asked.
    """
    try:
        who = HfApi(token=token).whoami()
    except LocalTokenNotFoundError as error:
        raise ValueError("`token` must be given to publish, got none. Run `hf auth login`, or set HF_TOKEN.") from error
    except HTTPError as error:
        raise explain_hub_error(error, repo_id) from error
    if who.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise ValueError(
            f"`token` must have write access to publish, got a read-only one of {who.get('name')!r}. Make a token with write "
            "access in the Hub's settings."
        )


def tuned_defaults(results: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of the method that was fastest, greedy and one prompt at a time, over all tasks measured.

    Args:
        results (`dict`): rows with "arguments".

    Returns:
        `dict`: arguments of speculation; empty if no row tells its own.
    """
    tasks = {row["task"] for row in results["rows"]}
    ratios: dict[str, dict[str, float]] = defaultdict(dict)
    arguments = {}
    for row in results["rows"]:
        if row["temperature"] == 0 and row["batch_size"] == 1 and row.get("arguments"):
            ratios[row["method"]][row["task"]] = row["ratio_to_plain"]
            arguments[row["method"]] = row["arguments"]
    means = {name: math.prod(of_task.values()) for name, of_task in ratios.items() if set(of_task) == tasks}
    return arguments[max(means, key=means.__getitem__)] if means else {}


def _name_target(config: SpecDiffConfig, name: str, revision: str | None, *, is_known: bool) -> None:
    """Write into a configuration whom the drafter is for, and take a path of this machine out of it."""
    if is_known or is_on_hub(name):
        config.target_model, config.target_revision = name, revision
    elif not is_on_hub(config.target_model):
        config.target_model = config.target_revision = None


def _set_defaults(drafter: Any, figures: dict[str, Any] | None) -> None:
    """Give a drafter without speculation defaults those that were measured to be fastest."""
    own = drafter.generation_config
    if figures is None or own_defaults(drafter):
        return
    for name, value in tuned_defaults(figures).items():
        setattr(own, name, value)


def _own_file(path: Path, name: str) -> Path | None:
    """Return a file of the drafter's folder, `None` if it has none; a link may lead anywhere, and what is there is not ours."""
    file = path / name
    if not file.is_file():
        return None
    if not file.resolve().is_relative_to(path.resolve()):
        raise ValueError(
            f"`path` must hold its own {name}, got a link to {str(file.resolve())!r}, which would be uploaded. Put a copy in "
            "its place, or take it away."
        )
    return file


def _keep_known_fields(drafter: Any) -> None:
    """Take out of both configurations what is no field of theirs: notes of the owner's, which nobody asked to be published."""
    config, defaults = drafter.config, drafter.generation_config
    for holder, known in (
        (config, vars(SpecDiffConfig()).keys() | OTHER_FIELDS),
        (defaults, vars(GenerationConfig()).keys() | set(SPECULATION_ARGUMENTS)),
    ):
        for name in [name for name in vars(holder) if not name.startswith("_") and name not in known]:
            delattr(holder, name)
    if config.training is not None:
        config.training = {name: config.training[name] for name in TRAINING_FIELDS if name in config.training} or None


def _load_drafter(path: Path) -> Any:
    """Return the drafter to publish; an adapter becomes a part of the weights, which then need nothing beside them."""
    kind = _kind_of(path)
    if kind == SECTION:
        return load_drafter(path, dtype="auto")
    if kind != SpecDiffConfig.model_type:
        raise ValueError(f"`path` must hold a drafter, got {str(path)!r} with a model of type {kind!r}.")
    return SpecDiffDrafter.from_pretrained(path, dtype="auto")


def _kind_of(path: Path) -> str | None:
    """Return what kind of model a folder holds: `SECTION` for a diffusion language model that we saved, else its type."""
    config_file = path / "config.json"
    if not config_file.is_file():
        raise ValueError(f"`path` must be a folder with a trained drafter, got {str(path)!r} without a config.json.")
    try:
        config: dict[str, Any] = json.loads(config_file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"`path` must hold a drafter's config.json, got a broken one in {str(path)!r}: {error}.") from error
    return SECTION if SECTION in config else config.get("model_type")


def _load_target(name: str, revision: str | None) -> tuple[Any, Any]:
    """Return the model, in float32, and its tokenizer; at the commit that the drafter was made for, where it is known."""
    version = {} if revision is None else {"revision": revision}
    try:
        model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32, device_map="auto", **version).eval()
        return model, AutoTokenizer.from_pretrained(name, **version)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"`target` must be a model folder or a Hub repository with its tokenizer, got {name!r}: "
            f"{' '.join(str(error).split())[:200]}"
        ) from error


def _read_results(file: Path | None) -> dict[str, Any] | None:
    if file is None:
        return None
    try:
        return check_results(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"`results` must be a JSON file of figures, got {str(file)!r}: {error}.") from error


def _try_again(call: Callable[[], str], report: Callable[[str], None]) -> str:
    """Call; on a broken connection wait and call again, a few times."""
    for attempt in range(RETRIES):
        try:
            return call()
        except ConnectionError as error:
            wait = FIRST_WAIT_SECONDS * 2**attempt
            report(f"{error} Trying again in {wait:g} s.")
            time.sleep(wait)
    return call()


def _tag(api: HfApi, repo_id: str, commit: str) -> str:
    """Tag a commit with the next version, unless it has one; return its tag."""
    try:
        tags = {ref.name: ref.target_commit for ref in api.list_repo_refs(repo_id).tags}
        for name, tagged in tags.items():
            if tagged == commit:
                return str(name)
        numbers = [int(match[1]) for name in tags if (match := re.fullmatch(r"v(\d+)", name))]
        name = f"v{max(numbers, default=0) + 1}"
        api.create_tag(repo_id, tag=name, revision=commit)
        return name
    except HTTPError as error:
        raise explain_hub_error(error, repo_id) from error

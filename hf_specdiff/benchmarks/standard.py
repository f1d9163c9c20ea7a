"""The benchmark: which prompts go through which methods, and the files that come of it. What `hf-specdiff bench` runs.

Knows the bundled pair's standard set, and what to compare for models of others.
"""

import itertools
import json
import platform
import subprocess
from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import asdict
from dataclasses import dataclass
from dataclasses import field
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.progress import BarColumn
from rich.progress import MofNCompleteColumn
from rich.progress import Progress
from rich.progress import TextColumn
from rich.progress import TimeElapsedColumn
from rich.progress import TimeRemainingColumn

from hf_specdiff import __version__
from hf_specdiff.benchmarks.figures import FEWEST_BATCHES
from hf_specdiff.benchmarks.figures import rows_of
from hf_specdiff.benchmarks.journal import Journal
from hf_specdiff.benchmarks.journal import write_text
from hf_specdiff.benchmarks.methods import NUM_DRAFTS
from hf_specdiff.benchmarks.methods import PLAIN_COMPILED
from hf_specdiff.benchmarks.methods import Method
from hf_specdiff.benchmarks.methods import Models
from hf_specdiff.benchmarks.methods import host_methods
from hf_specdiff.benchmarks.methods import our_methods
from hf_specdiff.benchmarks.methods import ours
from hf_specdiff.benchmarks.methods import own_methods
from hf_specdiff.benchmarks.methods import with_compiled
from hf_specdiff.benchmarks.peers import peer_methods
from hf_specdiff.benchmarks.runner import Block
from hf_specdiff.benchmarks.runner import run_block
from hf_specdiff.benchmarks.tables import compiled_table
from hf_specdiff.benchmarks.tables import prefix_tables
from hf_specdiff.benchmarks.tables import speed_table
from hf_specdiff.benchmarks.tables import time_tables
from hf_specdiff.core.checks import check_pair
from hf_specdiff.core.measuring import measure_profile
from hf_specdiff.core.own_drafter import is_own_drafter
from hf_specdiff.core.profiling import isolated_profiles
from hf_specdiff.core.profiling import machine_of
from hf_specdiff.core.speculation import resolve_speculation
from hf_specdiff.demo.bundle import PROMPT_SETS
from hf_specdiff.demo.bundle import load_demo
from hf_specdiff.demo.bundle import load_prompts
from hf_specdiff.training.first_weights import new_drafter
from hf_specdiff.training.prompts import Prompt
from hf_specdiff.training.prompts import encode
from hf_specdiff.training.prompts import read_prompts

RESULTS, TABLE, PROFILES = "results.json", "table.md", "profiles"
PACKAGE = Path(__file__).parents[1]
BATCH_SIZE = 8
# Of the token-conditioned drafter's methods, the standard set has these.
TOKENS = ("chain", "chain by block", "tree of 15", "tree of 7 by ratio", "tree of 32 by ratio", "auto")


@dataclass(frozen=True, slots=True)
class Extent:
    """How much is measured.

    Attributes:
        texts (`Mapping[str, Sequence]`): prompts by task, texts or chats.
        max_new_tokens (`dict[str, int]`): the length limit by task.
        temperatures (`tuple[float, ...]`): 0 for greedy.
        batch_sizes (`tuple[int, ...]`): prompts decoded together.
        seed (`int`): of sampling.
        words (`tuple[str, ...]`): only methods whose name holds one of them, and plain `generate`; all if empty.
        answers (`dict[str, list[str]]`): by task, for each prompt what ends in the right number, where that is known.
        compiles (`bool`): whether plain `generate` and our chains and trees run compiled too.
    """

    texts: Mapping[str, Sequence[Prompt]]
    max_new_tokens: dict[str, int]
    temperatures: tuple[float, ...] = (0.0, 1.0)
    batch_sizes: tuple[int, ...] = (1,)
    seed: int = 0
    words: tuple[str, ...] = ()
    answers: dict[str, list[str]] = field(default_factory=dict)
    compiles: bool = False


def bundled_models() -> Models:
    """Return the bundled models, and an untrained drafter of the feature-conditioned one's shape."""
    target, features, tokenizer = load_demo("features")
    tokens, unaligned, assistant = (load_demo(name)[1] for name in ("tokens", "unaligned", "autoregressive"))
    untrained = new_drafter(features.config, seed=0).eval()
    drafters = {"features": features, "tokens": tokens, "unaligned": unaligned, "untrained": untrained}
    return Models(target, tokenizer, drafters, {"AR assistant": assistant})


def prompt_sets(prompts_file: Path | None, num_prompts: int) -> dict[str, list[Prompt]]:
    """Return prompts by the name of their set.

    Args:
        prompts_file (`pathlib.Path`, *optional*): a text file or JSON lines; by default the bundled sets.
        num_prompts (`int`): of each set, at most.

    Returns:
        `dict[str, list]`: texts and chats.

    Raises:
        ValueError: if the file cannot be read.
    """
    if prompts_file is not None:
        return {prompts_file.stem: read_prompts(prompts_file)[:num_prompts]}
    return {name: [str(record["prompt"]) for record in load_prompts(name)[:num_prompts]] for name in PROMPT_SETS}


def bundled_methods(models: Models, temperature: float, num_drafts: tuple[int, ...]) -> list[Method]:
    """Return what the standard set compares: everything of both drafters, and what the others are there to show.

    Args:
        models (`Models`): of `bundled_models`.
        temperature (`float`): 0 for greedy.
        num_drafts (`tuple[int, ...]`): the numbers K of joint samples.

    Returns:
        `list[Method]`: plain `generate` first.
    """
    methods = host_methods(models, ("features", "tokens")) + peer_methods(models, ("features",))
    methods += our_methods("features", temperature, num_drafts)
    methods += [method for method in our_methods("tokens", temperature, ()) if method.name.endswith(TOKENS)]
    if temperature:
        return methods
    shown = [ours("unaligned", "chain", draft_shape="chain"), ours("untrained", "auto", tree_budget="auto")]
    return [*methods, *(replace(method, is_contender=False) for method in shown)]


def methods_for(models: Models, temperature: float) -> list[Method]:
    """Return what to compare of any models: the host's methods and, of each drafter, ours; plain `generate` first."""
    methods = host_methods(models, models.drafters) + peer_methods(models, models.drafters)
    for name, drafter in models.drafters.items():
        methods += (own_methods if is_own_drafter(drafter) else our_methods)(name, temperature)
    return methods


def blocks_of(models: Models, extent: Extent, *, is_standard: bool = False) -> list[Block]:
    """Return what is compared with what.

    Args:
        models (`Models`): who decodes.
        extent (`Extent`): how much.
        is_standard (`bool`): whether it is the bundled pair's standard set: its first task has a curve over K, and is decoded
            in batches too.

    Returns:
        `list[Block]`: one for every task, temperature and batch size.
    """
    blocks: list[Block] = []
    for task, temperature in itertools.product(extent.texts, extent.temperatures):
        is_first = is_standard and task == next(iter(extent.texts))
        if is_standard:
            methods = bundled_methods(models, temperature, NUM_DRAFTS if is_first else (8,))
        else:
            methods = methods_for(models, temperature)
        methods = with_compiled(methods) if extent.compiles else methods
        settings: dict[str, Any] = {"temperature": temperature, "seed": extent.seed, "answers": extent.answers.get(task)}
        limit = extent.max_new_tokens[task]
        chosen = _chosen(methods, extent.words)
        blocks += [Block(task, extent.texts[task], chosen, limit, batch_size=size, **settings) for size in extent.batch_sizes]
        if is_first and not temperature and BATCH_SIZE not in extent.batch_sizes:
            batched = _chosen([*methods[:1], *our_methods("features", temperature, ())], extent.words)
            more: list[Prompt] = [str(record["prompt"]) for record in load_prompts(task)[: FEWEST_BATCHES * BATCH_SIZE]]
            blocks.append(Block(task, more, batched, limit, batch_size=BATCH_SIZE, num_detailed=1, **settings))
    return blocks


def _chosen(methods: list[Method], words: tuple[str, ...]) -> list[Method]:
    """Return the methods that are asked for; plain `generate`, the first, always, and compiled if anything is."""
    chosen = [method for method in methods[1:] if not words or any(word in method.name for word in words)]
    beside = [method for method in methods[1:2] if method.name == PLAIN_COMPILED and method not in chosen]
    return methods[:1] + beside + chosen


def check_extent(models: Models, extent: Extent) -> None:
    """Refuse what cannot be measured before any work.

    Args:
        models (`Models`): who decodes.
        extent (`Extent`): how much.

    Raises:
        ValueError: for an empty prompt, one that leaves no room in the target's context, a temperature or batch size out of
            range, or words that no method has.
    """
    if min(extent.temperatures) < 0:
        raise ValueError(f"`temperature` must be at least 0, got {min(extent.temperatures)}.")
    if min(extent.batch_sizes) < 1:
        raise ValueError(f"`batch_size` must be at least 1, got {min(extent.batch_sizes)}.")
    room = getattr(models.target.config.get_text_config(), "max_position_embeddings", None)
    for task, texts in extent.texts.items():
        for number, text in enumerate(texts, 1):
            is_blank = isinstance(text, str) and not text.strip()
            length = 0 if is_blank else len(encode(models.tokenizer, text))
            if not length:
                raise ValueError(f"`prompts` must have a text each, got an empty one, number {number} of {task!r}.")
            if room is not None and length + extent.max_new_tokens[task] > room:
                raise ValueError(
                    f"`prompts` must leave {extent.max_new_tokens[task]} of the target's {room} positions free, got {length} "
                    f"tokens in number {number} of {task!r}. Shorten it, or lower `max_new_tokens`."
                )


def benchmark(
    models: Models, extent: Extent, output: Path, names: dict[str, Any], command: str, *, is_standard: bool = False
) -> dict[str, Any]:
    """Lay methods side by side; what `hf-specdiff bench` does.

    Args:
        models (`Models`): who decodes.
        extent (`Extent`): how much.
        output (`pathlib.Path`): the folder; gets `results.json` and `table.md`. An interrupted run goes on.
        names (`dict`): where the models came from.
        command (`str`): what was typed.
        is_standard (`bool`): see `blocks_of`.

    Returns:
        `dict`: what is in `results.json`: `conditions`, `profile` (what passes cost), `rows`.

    Raises:
        ValueError: if `extent` cannot be measured, or the folder is of something else.
    """
    check_extent(models, extent)
    blocks = blocks_of(models, replace(extent, words=()), is_standard=is_standard)
    known = dict.fromkeys(method.name for block in blocks for method in block.methods)
    for word in extent.words:
        if not any(word in name for name in known):
            raise ValueError(f"`method` must be part of a method's name, got {word!r}. There are: {', '.join(known)}.")
    blocks = blocks_of(models, extent, is_standard=is_standard)
    methods = {block.name: {method.name: method.arguments for method in block.methods} for block in blocks}
    journal = Journal(output, {**claim_of(models, names), **asdict(extent), "methods": methods})
    transformers.logging.disable_progress_bar()
    with isolated_profiles(output / PROFILES), progress_bar() as progress:
        bar = progress.add_task("", total=sum(len(block.steps) for block in blocks))
        for block in blocks:
            progress.update(bar, description=block.name)
            run_block(models, block, journal, partial(progress.advance, bar))
    rows = [row for block in blocks for row in rows_of(block, models, journal)]
    record = {"conditions": conditions_of(models, command), "profile": _profile(models), "rows": rows}
    write_record(output / RESULTS, record)
    tables = [speed_table(rows), *([compiled_table(rows)] if extent.compiles else []), time_tables(rows), prefix_tables(rows)]
    write_text(output / TABLE, "\n\n".join(tables) + "\n")
    return record


def progress_bar() -> Progress:
    """Return a bar with what is done, how long it took and what is left."""
    return Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn()
    )


def conditions_of(models: Models, command: str) -> dict[str, Any]:
    """Return what figures depend on: versions, commit, machine, precision, the command."""
    return {
        "hf_specdiff": __version__,
        "commit": commit(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "machine": machine_of(models.device),
        "threads": torch.get_num_threads(),
        "dtype": str(models.target.dtype).removeprefix("torch."),
        "command": command,
    }


def commit() -> str | None:
    """Return the package's commit, with a plus sign if files differ from it; `None` outside a repository."""
    try:
        git = ["git", "-C", str(PACKAGE)]
        # Installed into a folder of somebody else's repository, the package is none of its files.
        subprocess.run([*git, "ls-files", "--error-unmatch", "__init__.py"], capture_output=True, check=True)
        head = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True)
        changes = subprocess.run([*git, "status", "--porcelain", "--", "."], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return head.stdout.strip() + ("+" if changes.stdout.strip() else "")


def write_record(path: Path, record: dict[str, Any]) -> None:
    """Write figures as JSON, whole or not at all."""
    write_text(path, json.dumps(record, indent=1) + "\n")


def _profile(models: Models) -> dict[str, list[float]] | None:
    """Return what target passes of different sizes cost, as a chain's round sees them; `None` without a drafter that fits."""
    for drafter in models.drafters.values():
        try:
            check_pair(models.target, drafter)
        except (TypeError, ValueError):
            continue
        chain = resolve_speculation({"draft_shape": "chain"}, drafter, do_sample=False)
        profile = measure_profile(models.target, drafter, chain, models.device)
        return {"sizes": [float(size) for size in profile.sizes], "target_seconds": profile.target_seconds}
    return None


def claim_of(models: Models, names: dict[str, Any]) -> dict[str, Any]:
    """Return what decides, beside the settings, what a run measures; a folder of a run with another claim is refused.

    Args:
        models (`Models`): who decodes.
        names (`dict`): where the models came from.

    Returns:
        `dict`: of values that JSON knows.
    """
    conditions = conditions_of(models, command="")
    return {**names, **{name: value for name, value in conditions.items() if name != "command"}}

"""Published sets of prompts that speed is measured on: where each lies on the Hub, and the same names in a folder.

Knows their columns. Knows no models.
"""

import json
from collections import Counter
from collections.abc import Iterable
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any
from urllib.request import urlopen

from datasets import load_dataset
from datasets.exceptions import DatasetsError
from huggingface_hub.constants import HF_HUB_OFFLINE

from hf_specdiff.benchmarks.answers import final_number
from hf_specdiff.training.prompts import Prompt
from hf_specdiff.training.prompts import encode
from hf_specdiff.training.prompts import read_records

Records = list[tuple[dict[str, Any], str]]


@dataclass(frozen=True, slots=True)
class DataSet:
    """Where a set lies and what its columns hold.

    Attributes:
        path (`str`): its name on the Hub, or the address of a file of JSON lines.
        split (`str`): the held-out part.
        prompt (`str`): the column of the prompt: a text, or a list of turns, of which the first is taken.
        config (`str`, *optional*): the set's configuration.
        answer (`str`, *optional*): the column of an answer that ends in the right number.
        category (`str`, *optional*): the column of the category; each category is measured for itself.
        form (`str`): what the prompt is put into.
    """

    path: str
    split: str
    prompt: str
    config: str | None = None
    answer: str | None = None
    category: str | None = None
    form: str = "{}"


SECONDS = 30.0  # to wait for a file that is not on the Hub
STEP_BY_STEP = "{}\nPlease reason step by step, and put your final answer within \\boxed{{}}."
SPEC_BENCH = "https://raw.githubusercontent.com/hemingkx/Spec-Bench/main/data/spec_bench/question.jsonl"
DATA_SETS = {
    "gsm8k": DataSet("openai/gsm8k", "test", "question", config="main", answer="answer"),
    "humaneval": DataSet("openai/openai_humaneval", "test", "prompt"),
    "mbpp": DataSet("google-research-datasets/mbpp", "test", "text", config="full"),
    "math500": DataSet("HuggingFaceH4/MATH-500", "test", "problem", form=STEP_BY_STEP),
    "spec-bench": DataSet(SPEC_BENCH, "train", "turns", category="category"),
}
# Eight kinds of MT-Bench's questions are one category of Spec-Bench's.
MULTI_TURN = "multi-turn"
MULTI_TURN_KINDS = ("writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities")


@dataclass(frozen=True, slots=True)
class Questions:
    """Prompts that are measured together.

    Attributes:
        prompts (`list`): texts or chats.
        answers (`list[str]`, *optional*): for each the text that ends in the right number.
    """

    prompts: list[Prompt]
    answers: list[str] | None = None


def read_questions(name: str, num_prompts: int, folder: Path | None = None) -> dict[str, Questions]:
    """Read the first prompts of a set.

    Args:
        name (`str`): one of `DATA_SETS`.
        num_prompts (`int`): at most; of a set with categories, of each category.
        folder (`pathlib.Path`, *optional*): where the set lies as `NAME*.jsonl`, with "prompt" or "turns", and "answer" or
            "category" where the set has them; by default the set is loaded from the Hub.

    Returns:
        `dict[str, Questions]`: under the set's name, or under "NAME: CATEGORY" for each category in the set's order.

    Raises:
        ValueError: if there is no such set, it cannot be read, or a row lacks what it should have.
    """
    if name not in DATA_SETS:
        raise ValueError(f"`--prompts` must be one of {', '.join(DATA_SETS)}, got {name!r}. Name files with --prompts-file.")
    records = _of_hub(name, DATA_SETS[name]) if folder is None else _of_folder(name, folder)
    has_answers, has_categories = (getattr(DATA_SETS[name], column) is not None for column in ("answer", "category"))
    if not has_categories:
        return {name: _questions(list(islice(records, num_prompts)), has_answers=has_answers)}
    groups: dict[str, Records] = {}
    for record, place in records:
        category = _field(record, "category", place)
        key = MULTI_TURN if category in MULTI_TURN_KINDS else category
        groups.setdefault(f"{name}: {key}", []).append((record, place))
    return {key: _questions(_mixed(group)[:num_prompts], has_answers=has_answers) for key, group in groups.items()}


def leave_out_long(questions: Questions, tokenizer: Any, most: int) -> tuple[Questions, int]:
    """Leave out prompts that a target has no room for.

    Args:
        questions (`Questions`): the prompts.
        tokenizer (`PreTrainedTokenizerBase`): the target's.
        most (`int`): tokens of a prompt.

    Returns:
        `tuple`: the others, and how many were left out.
    """
    fits = [len(encode(tokenizer, prompt)) <= most for prompt in questions.prompts]
    prompts = [prompt for prompt, is_short in zip(questions.prompts, fits, strict=True) if is_short]
    answers = questions.answers
    if answers is not None:
        answers = [answer for answer, is_short in zip(answers, fits, strict=True) if is_short]
    return Questions(prompts, answers), fits.count(False)


def _questions(records: Records, *, has_answers: bool) -> Questions:
    prompts: list[Prompt] = [_field(record, "prompt", place) for record, place in records]
    if not has_answers:
        return Questions(prompts)
    answers = [_field(record, "answer", place) for record, place in records]
    for answer, (_, place) in zip(answers, records, strict=True):
        if final_number(answer) is None:
            raise ValueError(f"`answer` must hold a number, got {answer[:60]!r} in {place}.")
    return Questions(prompts, answers)


def _mixed(records: Records) -> Records:
    """Return a category's rows so that its kinds take turns: the first few are then not all of one kind."""
    seen: Counter[str] = Counter()
    turns = []
    for record, _ in records:
        turns.append(seen[record["category"]])
        seen[record["category"]] += 1
    return [records[i] for i in sorted(range(len(records)), key=turns.__getitem__)]


def _field(record: dict[str, Any], name: str, place: str) -> str:
    """Return a text of a row; of several turns the first."""
    value = record.get(name)
    if name == "prompt" and value is None:
        turns = record.get("turns")
        value = turns[0] if isinstance(turns, list) and turns else None
    if not isinstance(value, str) or not value.strip():
        wanted = "'prompt', a text, or 'turns', a list of texts" if name == "prompt" else f"{name!r}, a text"
        raise ValueError(f"`--prompts` must find {wanted} in each row, got {', '.join(record)} in {place}.")
    return value


def _of_folder(name: str, folder: Path) -> Iterator[tuple[dict[str, Any], str]]:
    """Yield rows with their places from the one file of a set."""
    if not folder.is_dir():
        raise ValueError(f"`--data` must be a folder of {name}*.jsonl, got {str(folder)!r}, which is none.")
    files = sorted(
        path for path in folder.glob("*.jsonl") if _plain(path.stem).startswith(_plain(name)) and "train" not in path.stem
    )
    if len(files) != 1:
        found = ", ".join(path.name for path in files) or "none"
        raise ValueError(f"`--data` must hold one file {name}*.jsonl, training files aside, got {found} in {str(folder)!r}.")
    for record, number in read_records(files[0]):
        yield record, f"line {number} of {str(files[0])!r}"


def _plain(name: str) -> str:
    return name.replace("-", "_").lower()


def _of_hub(name: str, source: DataSet) -> Iterator[tuple[dict[str, Any], str]]:
    """Yield rows of a set on the Hub with their places, under the names that folders use."""
    try:
        rows, names = _rows_of(source)
    except (OSError, DatasetsError, ValueError) as error:
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        raise ValueError(
            f"`--prompts {name}` must reach {source.path} or have --data with a folder that holds "
            f"{name}*.jsonl, got neither: {reason}"
        ) from error
    columns = {"prompt": source.prompt, "answer": source.answer, "category": source.category}
    missing = [column for column in columns.values() if column is not None and column not in names]
    if missing:
        raise ValueError(
            f"`--prompts {name}` must have the column {' and '.join(missing)}, got {', '.join(names)} in "
            f"{source.path!r}. Pass --data with a folder that holds {name}*.jsonl."
        )
    for number, row in enumerate(rows, 1):
        record = {key: row[column] for key, column in columns.items() if column is not None}
        if isinstance(record["prompt"], list):
            record["turns"] = record.pop("prompt")
        else:
            record["prompt"] = source.form.format(record["prompt"])
        yield record, f"row {number} of {source.path!r}"


def _rows_of(source: DataSet) -> tuple[Iterable[dict[str, Any]], list[str]]:
    """Return a set's rows and the names of its columns."""
    if not source.path.startswith("https://"):
        rows = load_dataset(source.path, source.config, split=source.split)
        return rows, rows.column_names
    if HF_HUB_OFFLINE:
        raise ConnectionError("HF_HUB_OFFLINE is set")
    with urlopen(source.path, timeout=SECONDS) as answer:
        lines = [json.loads(line) for line in answer.read().decode("utf-8").split("\n") if line.strip()]
    return lines, list(lines[0])

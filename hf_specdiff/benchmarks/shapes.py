"""Every draft shape and rule on the bundled pair: `python -m hf_specdiff.benchmarks.shapes OUTPUT.json`.

All methods run in one process, interleaved prompt by prompt, so that a drifting machine hits all alike. Greedy outputs are
compared with plain `generate`'s.
"""

import json
import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from dataclasses import field
from pathlib import Path
from typing import Annotated
from typing import Any

import torch
import transformers
import typer
from rich.progress import track

from hf_specdiff import __version__
from hf_specdiff.demo.bundle import load_demo
from hf_specdiff.demo.bundle import load_prompts
from hf_specdiff.demo.comparison import MAX_NEW_TOKENS
from hf_specdiff.draft import SpeculationStats
from hf_specdiff.generate import generate
from hf_specdiff.modeling_specdiff import SpecDiffDrafter
from hf_specdiff.training.trainer import new_drafter

PLAIN = "plain generate"
NUM_DRAFTS = (1, 2, 4, 8, 16)
HOT = 1.5  # the temperature that SpecDiff-2 draws joint samples at

# From a method's name to the drafter and the arguments of speculation.
Methods = dict[str, tuple[str, dict[str, Any]]]

GREEDY: Methods = {
    "features, chain": ("features", {"draft_shape": "chain"}),
    "features, tree of 16": ("features", {"draft_shape": "tree", "tree_budget": 16}),
    "features, tree of 32": ("features", {"draft_shape": "tree", "tree_budget": 32}),
    "features, tree of 64": ("features", {"draft_shape": "tree", "tree_budget": 64}),
    "features, auto": ("features", {"tree_budget": "auto"}),
    "tokens, chain": ("tokens", {"draft_shape": "chain"}),
    "tokens, tree of 16": ("tokens", {"draft_shape": "tree", "tree_budget": 16}),
    "tokens, tree of 32": ("tokens", {"draft_shape": "tree", "tree_budget": 32}),
    "tokens, tree of 64": ("tokens", {"draft_shape": "tree", "tree_budget": 64}),
    "tokens, auto": ("tokens", {"tree_budget": "auto"}),
    "untrained, auto": ("untrained", {"tree_budget": "auto"}),
}
BATCHED: Methods = {
    "features, chain": ("features", {"draft_shape": "chain"}),
    "features, tree of 16": ("features", {"draft_shape": "tree", "tree_budget": 16}),
    "features, auto": ("features", {"tree_budget": "auto"}),
}
SAMPLED: Methods = {
    "features, chain by ratio": ("features", {"draft_shape": "chain", "acceptance": "ratio"}),
    "features, chain by block": ("features", {"draft_shape": "chain", "acceptance": "block"}),
    "features, tree of 32 by match": ("features", {"draft_shape": "tree", "tree_budget": 32, "acceptance": "match"}),
    "features, tree of 32 by ratio": ("features", {"draft_shape": "tree", "tree_budget": 32, "acceptance": "ratio"}),
    "features, auto": ("features", {"tree_budget": "auto"}),
}
SAMPLES: Methods = {
    f"features, {count} samples by {rule.replace('_', '-')}": (
        "features",
        {"draft_shape": "samples", "num_drafts": count, "acceptance": rule, "draft_temperature": HOT},
    )
    for count in NUM_DRAFTS
    for rule in ("match", "self_selection")
}


@dataclass(slots=True)
class Row:
    """What one method did over the prompts of one task.

    Attributes:
        task (`str`): `"math"` or `"code"`.
        method (`str`): drafter, shape and rule.
        temperature (`float`): 0 for greedy.
        batch_size (`int`): prompts decoded together.
        seconds (`float`): wall-clock time.
        num_tokens (`int`): tokens written, padding left out.
        num_identical (`int`): greedy outputs equal to plain `generate`'s; 0 when sampling.
        arguments (`dict`): of speculation.
        num_prompts (`int`): prompts.
        stats (`list[SpeculationStats]`): of every call.
    """

    task: str
    method: str
    temperature: float
    batch_size: int
    arguments: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    num_tokens: int = 0
    num_identical: int = 0
    num_prompts: int = 0
    stats: list[SpeculationStats] = field(default_factory=list)

    @property
    def tokens_per_second(self) -> float:
        """Tokens written over wall-clock time."""
        return self.num_tokens / self.seconds

    @property
    def tokens_per_round(self) -> float:
        """Mean tokens that a round adds to a row; 1 for plain decoding."""
        accepted = [count for stats in self.stats for row in stats.num_accepted for count in row]
        return sum(accepted) / len(accepted) + 1 if accepted else 1.0

    @property
    def drafted_per_round(self) -> float:
        """Mean nodes that a round verifies for a row."""
        drafted = [count for stats in self.stats for row in stats.num_drafted for count in row]
        return sum(drafted) / len(drafted) if drafted else 0.0


@dataclass(frozen=True, slots=True)
class Models:
    """A target, its tokenizer, and drafters for it by name."""

    target: Any
    tokenizer: Any
    drafters: dict[str, Any]


def load_pairs() -> Models:
    """Return the bundled models, and an untrained drafter."""
    target, features, tokenizer = load_demo("features")
    tokens = load_demo("tokens")[1]
    untrained: SpecDiffDrafter = new_drafter(features.config, seed=0)
    return Models(target, tokenizer, {"features": features, "tokens": tokens, "untrained": untrained.eval()})


def measure(
    task: str,
    texts: list[str],
    models: Models,
    methods: Methods,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    batch_size: int = 1,
) -> list[Row]:
    """Run prompts through plain `generate` and through every method, in turn.

    Args:
        task (`str`): the prompts' name.
        texts (`list[str]`): prompts.
        models (`Models`): who decodes them.
        methods (`dict`): name to drafter and arguments of speculation.
        max_new_tokens (`int`): the length limit.
        temperature (`float`): 0 for greedy.
        batch_size (`int`): prompts decoded together.

    Returns:
        `list[Row]`: plain `generate` first.
    """
    target, tokenizer, drafters = models.target, models.tokenizer, models.drafters
    batches = [
        tokenizer(
            texts[start : start + batch_size], return_tensors="pt", padding=batch_size > 1, return_token_type_ids=False
        ).to(target.device)
        for start in range(0, len(texts), batch_size)
    ]
    settings: dict[str, Any] = {"max_new_tokens": max_new_tokens, "return_dict_in_generate": True}
    settings |= {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}

    def ours(name: str, arguments: dict[str, Any]) -> Callable[..., Any]:
        return lambda inputs: generate(target, **inputs, assistant_model=drafters[name], **settings, **arguments)

    calls: dict[str, Callable[..., Any]] = {PLAIN: lambda inputs: target.generate(**inputs, **settings)}
    calls |= {method: ours(name, arguments) for method, (name, arguments) in methods.items()}
    rows = {
        method: Row(task, method, temperature, batch_size, methods[method][1] if method in methods else {}) for method in calls
    }
    for call in calls.values():
        call(batches[0])  # warm-up, and the profile's measurement
    label = f"{task}, temperature {temperature:g}, batch {batch_size}"
    for seed, inputs in enumerate(track(batches, description=label)):
        expected: torch.Tensor | None = None
        for method, call in calls.items():
            torch.manual_seed(seed)
            start = time.perf_counter()
            output = call(inputs)
            row = rows[method]
            row.seconds += time.perf_counter() - start
            new_tokens = output.sequences[:, inputs["input_ids"].shape[1] :]
            is_pad = new_tokens == tokenizer.pad_token_id if tokenizer.pad_token_id is not None else torch.zeros(())
            row.num_tokens += new_tokens.numel() - int(is_pad.sum())
            expected = output.sequences if expected is None else expected
            if not temperature:
                row.num_identical += count_identical(output.sequences, expected)
            row.num_prompts += len(new_tokens)
            if hasattr(output, "speculation"):
                row.stats.append(output.speculation)
    return list(rows.values())


def count_identical(sequences: torch.Tensor, expected: torch.Tensor) -> int:
    """Return how many rows are the same, also where one of the two has been written further."""
    width = max(sequences.shape[1], expected.shape[1])
    one, other = (torch.nn.functional.pad(ids, (0, width - ids.shape[1]), value=-1) for ids in (sequences, expected))
    return int((one == other).all(dim=1).sum())


def record_of(rows: list[Row]) -> list[dict[str, Any]]:
    """Return figures for JSON; the first row is plain `generate`."""
    plain = rows[0].tokens_per_second
    return [
        {
            "task": row.task,
            "method": row.method,
            "temperature": row.temperature,
            "batch_size": row.batch_size,
            "arguments": row.arguments,
            "tokens_per_second": row.tokens_per_second,
            "ratio_to_plain": row.tokens_per_second / plain,
            "tokens_per_round": row.tokens_per_round,
            "drafted_per_round": row.drafted_per_round,
            "num_identical": row.num_identical,
            "num_prompts": row.num_prompts,
            "shape_and_rule": [row.stats[0].draft_shape, row.stats[0].acceptance] if row.stats else None,
        }
        for row in rows
    ]


def write_results(output: Path, records: list[dict[str, Any]], command: str, **conditions: Any) -> None:
    """Write figures and what they were measured with, beside the file first.

    Args:
        output (`pathlib.Path`): the JSON file; its folder is made.
        records (`list[dict]`): of `record_of`.
        command (`str`): what measured them.
        **conditions: more that the figures depend on.
    """
    versions = {
        "hf_specdiff": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
    }
    record = {"conditions": {**versions, **conditions, "command": command}, "rows": records}
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = output.with_suffix(".partial")
    partial.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, output)


def main(
    output: Annotated[Path, typer.Argument(help="JSON file for the figures")],
    num_prompts: Annotated[int, typer.Option(min=8, help="held-out prompts of each set")] = 32,
) -> None:
    """Measure all shapes and rules, greedy and sampling, one by one and in batches."""
    transformers.logging.disable_progress_bar()
    models = load_pairs()

    def bundled(task: str, methods: Methods, **settings: Any) -> list[dict[str, Any]]:
        texts = [str(record["prompt"]) for record in load_prompts(task)[:num_prompts]]
        return record_of(measure(task, texts, models, methods, max_new_tokens=MAX_NEW_TOKENS[task], **settings))

    records = bundled("math", GREEDY | SAMPLES)
    records += bundled("code", GREEDY)
    records += bundled("math", SAMPLED | SAMPLES, temperature=1.0)
    records += bundled("math", BATCHED, batch_size=8)
    write_results(output, records, f"python -m hf_specdiff.benchmarks.shapes {output} --num-prompts {num_prompts}")
    for record in records:
        typer.echo(
            f"{record['task']:5} T={record['temperature']:g} batch {record['batch_size']}  {record['method']:36} "
            f"{record['ratio_to_plain']:5.2f}x  {record['tokens_per_round']:5.2f} tokens per round"
        )


if __name__ == "__main__":
    typer.run(main)

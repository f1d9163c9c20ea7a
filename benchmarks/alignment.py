"""What each training objective brings: `python -m benchmarks.alignment OUTPUT.json --work FOLDER`.

Every row trains a drafter of the bundled target from nothing, with the same number of steps of the same size, and decodes the
same held-out prompts with the real loop. Runs are short, so figures compare objectives with each other and with nothing else,
and all is about word problems: of code a drafter learns too little in such a run to tell objectives apart. Finished runs are
kept in FOLDER, and an interrupted command goes on; with `--conditioning` two processes can share the work.
"""

import itertools
import json
import os
import time
from dataclasses import dataclass
from dataclasses import field
from dataclasses import replace
from pathlib import Path
from typing import Annotated
from typing import Any

import torch
import transformers
import typer
from rich.progress import track

from hf_specdiff.benchmarks.journal import Journal
from hf_specdiff.benchmarks.methods import Models
from hf_specdiff.benchmarks.standard import conditions_of
from hf_specdiff.benchmarks.standard import write_record
from hf_specdiff.core.files import write_text_whole
from hf_specdiff.core.modeling_specdiff import SpecDiffDrafter
from hf_specdiff.demo.bundle import load_demo
from hf_specdiff.demo.bundle import load_prompts
from hf_specdiff.demo.word_problems import iter_problems
from hf_specdiff.training.data import Sequences
from hf_specdiff.training.data import sequences_of_texts
from hf_specdiff.training.drafter_config import spread_layers
from hf_specdiff.training.evaluation import decode_held_out
from hf_specdiff.training.pipeline import fit_drafter
from hf_specdiff.training.plan import TrainingPlan
from hf_specdiff.training.regeneration import regenerate
from recipes.bundled import MAX_LENGTH

CONDITIONINGS = ("features", "tokens")
NUM_DOCUMENTS = 2048
# Of the problems to learn from: neither the target's nor the bundled drafters' own.
PROBLEM_SEED = 7
BATCH_SIZE = 8
NUM_ANCHORS = 16
EVAL_PROMPTS = 24
EVAL_TOKENS = 128


@dataclass(frozen=True, slots=True)
class Recipe:
    """One way to train.

    Attributes:
        stages (`tuple`): for each stage its share of the steps and the weights of its objectives.
        data (`str`): `"regenerated"` (the target's own continuations) or `"original"` (solutions as it was taught them).
        context_weight (`float`): of next-token prediction on the context, for token-conditioned drafters.
        conditionings (`tuple`): for which kinds of drafter.
    """

    stages: tuple[tuple[float, dict[str, float]], ...]
    data: str = "regenerated"
    context_weight: float = 0.0
    conditionings: tuple[str, ...] = CONDITIONINGS


TOKENS: dict[str, Any] = {"conditionings": ("tokens",)}
CE, CHAIN = {"ce": 1.0}, {"ce": 1.0, "chain": 5.0}
READER: dict[str, Any] = {"context_weight": 0.5, **TOKENS}
RECIPES = {
    "uniform CE": Recipe(((1.0, CE),)),
    "position-decayed CE": Recipe(((1.0, {"decayed_ce": 1.0}),), **TOKENS),
    "streak from scratch": Recipe(((1.0, {"streak": 1.0}),), **TOKENS),
    "CE, then streak": Recipe(((0.5, CE), (0.5, {"streak": 1.0})), **TOKENS),
    "CE, then CE + chain": Recipe(((0.5, CE), (0.5, CHAIN)), **TOKENS),
    "D-PACE": Recipe(((1.0, {"dpace": 1.0}),)),
    "CE + total variation": Recipe(((1.0, {"ce": 1.0, "tv": 1.0}),), **TOKENS),
    "uniform CE, original text": Recipe(((1.0, CE),), data="original", **TOKENS),
    # Learning to continue the context as well: a token-conditioned drafter has no other model to read it for it.
    "uniform CE, reading": Recipe(((1.0, CE),), **READER),
    "CE, then CE + chain, reading": Recipe(((0.5, CE), (0.5, CHAIN)), **READER),
    "D-PACE, reading": Recipe(((1.0, {"dpace": 1.0}),), **READER),
}


@dataclass(slots=True)
class Bench:
    """What all runs share."""

    target: Any
    tokenizer: Any
    work: Path
    steps: int
    sequences: dict[str, Sequences] = field(default_factory=dict)

    def data(self, kind: str) -> Sequences:
        """Return training sequences, made when they are first asked for."""
        if kind not in self.sequences:
            problems = list(itertools.islice(iter_problems(PROBLEM_SEED, held_out=False), NUM_DOCUMENTS))
            if kind == "regenerated":
                prompts = [problem.prompt for problem in problems]
                folder = self.work / "sequences"
                made = regenerate(self.target, self.tokenizer, prompts, folder, max_length=MAX_LENGTH, batch_size=128)
            else:
                texts = [problem.prompt + problem.solution for problem in problems]
                made = sequences_of_texts(self.tokenizer, texts, MAX_LENGTH)
            self.sequences[kind] = made
        return self.sequences[kind]


def run(bench: Bench, name: str, conditioning: str, seed: int) -> dict[str, Any]:
    """Train one drafter and decode with it; a finished run is read, not repeated.

    Args:
        bench (`Bench`): target, data, steps.
        name (`str`): in `RECIPES`.
        conditioning (`str`): `"features"` or `"tokens"`.
        seed (`int`): of weights, order and windows.

    Returns:
        `dict`: the row of the results file.
    """
    folder = bench.work / f"{name.replace(' ', '_')}-{conditioning}-{seed}-{bench.steps}"
    finished = folder / "row.json"
    if finished.is_file():
        return json.loads(finished.read_text(encoding="utf-8"))
    recipe, start_from = RECIPES[name], None
    sequences = bench.data(recipe.data)
    layers = spread_layers(bench.target.config.num_hidden_layers, 4) if conditioning == "features" else None
    plan = TrainingPlan(layers, num_layers=3, num_anchors=NUM_ANCHORS, batch_size=BATCH_SIZE, learning_rate=2e-3)
    plan = replace(plan, max_length=MAX_LENGTH, save_steps=1000, context_weight=recipe.context_weight, seed=seed)
    start = time.perf_counter()
    for number, (share, weights) in enumerate(recipe.stages):
        epochs = share * bench.steps * BATCH_SIZE / len(sequences.ends)
        stage = replace(plan, num_epochs=epochs, loss_weights=weights)
        output = folder / f"stage-{number}"
        mask = bench.tokenizer.mask_token_id
        if not fit_drafter(bench.target, sequences, output, stage, mask_token_id=mask, start_from=start_from):
            raise typer.Exit(130)
        start_from = output
    seconds = time.perf_counter() - start
    drafter = SpecDiffDrafter.from_pretrained(start_from).eval()
    prompts = [str(record["prompt"]) for record in load_prompts("math")[:EVAL_PROMPTS]]
    ids = [bench.tokenizer(prompt)["input_ids"] for prompt in prompts]
    greedy = decode_held_out(bench.target, drafter, ids, EVAL_TOKENS)
    drawn = decode_held_out(bench.target, drafter, ids, EVAL_TOKENS, temperature=1.0, seed=seed)
    row = {
        "objective": name,
        "conditioning": conditioning,
        "data": recipe.data,
        "seed": seed,
        "steps": bench.steps,
        "tokens_per_round": greedy.tokens_per_round,
        "acceptance_per_position": greedy.acceptance_per_position,
        "tokens_per_round_sampled": drawn.tokens_per_round,
        "seconds_per_step": seconds / bench.steps,
    }
    write_text_whole(finished, json.dumps(row))
    return row


def main(
    output: Annotated[Path, typer.Argument(help="JSON file for the figures")],
    work: Annotated[Path, typer.Option(help="folder of data and finished runs")],
    steps: Annotated[int, typer.Option(min=3, help="of every run")] = 500,
    num_seeds: Annotated[int, typer.Option(min=1)] = 2,
    conditioning: Annotated[str | None, typer.Option(help="features or tokens; by default both")] = None,
) -> None:
    """Train and measure every row; write the results when all rows of both conditionings are there."""
    if conditioning not in (None, *CONDITIONINGS):
        raise typer.BadParameter(f"must be features or tokens, got {conditioning!r}")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    target, _, tokenizer = load_demo()
    tokenizer.padding_side = "left"
    work.mkdir(parents=True, exist_ok=True)
    settings = {"documents": NUM_DOCUMENTS, "problem_seed": PROBLEM_SEED, "batch_size": BATCH_SIZE, "num_anchors": NUM_ANCHORS}
    Journal(work, {**settings, "eval_prompts": EVAL_PROMPTS, "eval_tokens": EVAL_TOKENS})  # runs of other settings do not mix
    bench = Bench(target, tokenizer, work, steps)
    kinds = CONDITIONINGS if conditioning is None else (conditioning,)
    every = itertools.product(range(num_seeds), RECIPES, kinds)
    todo = [(seed, name, kind) for seed, name, kind in every if kind in RECIPES[name].conditionings]
    rows = [run(bench, name, kind, seed) for seed, name, kind in track(todo, description="Training runs")]
    if conditioning is None:
        command = f"python -m benchmarks.alignment {output} --work FOLDER --steps {steps} --num-seeds {num_seeds}"
        conditions = conditions_of(Models(target, tokenizer, {}), command)
        conditions |= {"batch_size": BATCH_SIZE, "documents": NUM_DOCUMENTS, "eval_prompts": EVAL_PROMPTS}
        write_record(output, {"conditions": conditions, "rows": rows})
        typer.echo(f"{len(rows)} rows written to {output}")


if __name__ == "__main__":
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0))))
    typer.run(main)

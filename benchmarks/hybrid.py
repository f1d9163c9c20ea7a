"""A small hybrid target and its drafter, made and measured on a CPU: `python -m benchmarks.hybrid FOLDER`.

An LFM2 of 6 million parameters, two thirds of whose layers are convolutions, learns the demo's word problems; a
feature-conditioned drafter learns with D-PACE weights from what it writes. Then plain decoding and our
methods take turns on the held-out problems. Finished stages are skipped and an interrupted one goes on, so the same command may
be given again. `FOLDER/hybrid.json` is what belongs under `benchmarks/results`. Code is left out: it takes hours to learn.

A target of too few steps (190 were) writes nearly the same text whatever it is asked, which any drafter foresees; so right
answers are counted too.
"""

import itertools
import shutil
from dataclasses import asdict
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated
from typing import Any

import torch
import transformers
import typer
from transformers import AutoModelForCausalLM
from transformers import AutoTokenizer
from transformers import Lfm2Config

from benchmarks.pair import DRAFTER
from benchmarks.pair import TARGET
from benchmarks.pair import TEXT
from benchmarks.pair import Stages
from hf_specdiff.benchmarks.clocks import PassClock
from hf_specdiff.benchmarks.journal import Journal
from hf_specdiff.benchmarks.methods import Models
from hf_specdiff.benchmarks.methods import ours
from hf_specdiff.benchmarks.standard import Extent
from hf_specdiff.benchmarks.standard import benchmark
from hf_specdiff.benchmarks.standard import write_record
from hf_specdiff.benchmarks.tables import speed_table
from hf_specdiff.demo.bundle import PAIR
from hf_specdiff.demo.bundle import load_prompts
from hf_specdiff.demo.word_problems import iter_problems
from hf_specdiff.training.data import SequenceDataset
from hf_specdiff.training.drafter_config import spread_layers
from hf_specdiff.training.pipeline import fit_drafter
from hf_specdiff.training.plan import TrainingPlan
from hf_specdiff.training.regeneration import regenerate
from recipes.bundled import MAX_LENGTH
from recipes.bundled import model_config
from recipes.language_models import PackedDocuments
from recipes.language_models import train_language_model

TASK = "math"
SAVE_STEPS = 40
# Of the standard methods those that a hybrid's figures are about; the tree is there to be refused.
WORDS = ("chain", "tree of 15", "auto")
# Chains whose passes are counted: the shorter, the more of one is accepted.
WINDOWS = (4, 8, 15)
NUM_COUNTED = 8


@dataclass(frozen=True, slots=True)
class Size:
    """What is made, and from how much.

    Attributes:
        num_layers (`int`): of the target; each third reads by attention, the others by convolution.
        hidden_size (`int`): of the target and its drafter.
        num_heads (`int`): of both.
        num_problems (`int`): word problems of the target's corpus.
        num_prompts (`int`): problems that the target answers for its drafter.
        generation_batch_size (`int`): problems answered together.
        target_steps (`int`): training steps of the target.
        target_batch_size (`int`): blocks of such a step.
        target_learning_rate (`float`): peak of its schedule.
        drafter_steps (`int`): training steps of the drafter.
        drafter_batch_size (`int`): sequences of such a step.
        drafter_learning_rate (`float`): peak of its schedule.
        num_anchors (`int`): windows of a sequence and step.
        max_new_tokens (`int`): what the benchmark writes.
    """

    num_layers: int = 18
    hidden_size: int = 160
    num_heads: int = 4
    num_problems: int = 12_000
    num_prompts: int = 1_024
    generation_batch_size: int = 128
    target_steps: int = 1_500
    target_batch_size: int = 6
    target_learning_rate: float = 2.5e-3
    drafter_steps: int = 1_200
    drafter_batch_size: int = 8
    drafter_learning_rate: float = 2e-3
    num_anchors: int = 24
    max_new_tokens: int = 176

    @property
    def config(self) -> Lfm2Config:
        """The target's configuration: the bundled target's, but for its layers."""
        base = model_config(self.num_layers, self.hidden_size, self.num_heads)
        names = [
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
        ]
        names += ["tie_word_embeddings", "max_position_embeddings", "pad_token_id", "bos_token_id", "eos_token_id"]
        kinds = ["full_attention" if i % 3 == 2 else "conv" for i in range(self.num_layers)]
        same = {name: getattr(base, name) for name in names}
        return Lfm2Config(**same, layer_types=kinds, block_auto_adjust_ff_dim=False)


FULL = Size()
TINY = Size(
    num_layers=3,
    hidden_size=48,
    num_heads=2,
    num_problems=40,
    num_prompts=8,
    generation_batch_size=8,
    target_steps=2,
    target_batch_size=2,
    drafter_steps=2,
    drafter_batch_size=4,
    num_anchors=2,
    max_new_tokens=6,
)


def make_target(stages: Stages, size: Size) -> None:
    """Train the target on word problems; its tokenizer is the bundled one."""
    tokenizer = AutoTokenizer.from_pretrained(PAIR / "target")
    problems = itertools.islice(iter_problems(1, held_out=False), size.num_problems)
    dataset = PackedDocuments([problem.prompt + problem.solution for problem in problems], tokenizer)
    folder = stages.output / TARGET
    arguments = {"bf16": False, "warmup_steps": size.target_steps // 10, "save_steps": SAVE_STEPS}
    arguments |= {"max_steps": size.target_steps, "logging_steps": 10}
    settings: dict[str, Any] = {"learning_rate": size.target_learning_rate, "batch_size": size.target_batch_size}
    with stages.timed(TARGET):
        train_language_model(folder, folder / "work", size.config, dataset, arguments=arguments, **settings)
    tokenizer.save_pretrained(folder)
    stages.finish(TARGET)


def make_drafter(stages: Stages, size: Size) -> None:
    """Let the target answer problems, and train a feature-conditioned drafter on that.

    Raises:
        typer.Exit: after Ctrl-C; the same call goes on.
    """
    target, folder = load(stages, TARGET), stages.output / DRAFTER
    tokenizer = AutoTokenizer.from_pretrained(stages.output / TARGET, padding_side="left")
    prompts = [problem.prompt for problem in itertools.islice(iter_problems(2, held_out=False), size.num_prompts)]
    with stages.timed(TEXT):
        texts: dict[str, Any] = {"max_length": MAX_LENGTH, "batch_size": size.generation_batch_size}
        sequences = regenerate(target, tokenizer, prompts, stages.output / "texts", **texts)
    plan = TrainingPlan(
        spread_layers(size.num_layers, 1 + size.num_layers // 6),
        max_length=MAX_LENGTH,
        num_epochs=size.drafter_steps / -(-len(SequenceDataset(sequences, MAX_LENGTH)) // size.drafter_batch_size),
        batch_size=size.drafter_batch_size,
        num_anchors=size.num_anchors,
        learning_rate=size.drafter_learning_rate,
        loss_weights={"dpace": 1.0},
        bf16=False,
        save_steps=SAVE_STEPS,
    )
    with stages.timed(DRAFTER):
        states, mask = stages.output / "features", tokenizer.mask_token_id
        if not fit_drafter(target, sequences, folder, plan, mask_token_id=mask, cache_features=states):
            raise typer.Exit(130)
    tokenizer.save_pretrained(folder)
    shutil.rmtree(states)
    stages.finish(DRAFTER)


def load(stages: Stages, name: str) -> Any:
    """Load the target or the drafter in float32, where greedy text can be compared token for token."""
    return AutoModelForCausalLM.from_pretrained(stages.output / name, dtype=torch.float32).eval()


def measure(stages: Stages, size: Size, num_prompts: int, command: str) -> dict[str, Any]:
    """Put the pair through the benchmark and write `hybrid.json`.

    Args:
        stages (`Stages`): all finished.
        size (`Size`): what was made.
        num_prompts (`int`): held-out problems.
        command (`str`): what was typed, without this machine's folders.

    Returns:
        `dict`: what is in `hybrid.json`: what `benchmark` returns, `passes` (see `passes_of`), `pair` (how large, how made).
    """
    tokenizer = AutoTokenizer.from_pretrained(stages.output / TARGET, padding_side="left")
    models = Models(load(stages, TARGET), tokenizer, {DRAFTER: load(stages, DRAFTER)})
    problems = load_prompts(TASK)[:num_prompts]
    texts, answers = [str(problem["prompt"]) for problem in problems], [str(problem["answer"]) for problem in problems]
    extent = Extent({TASK: texts}, {TASK: size.max_new_tokens}, temperatures=(0.0,), words=WORDS, answers={TASK: answers})
    names = {"target": TARGET, "drafters": [DRAFTER], "assistant": None}
    record = benchmark(models, extent, stages.output / "bench", names, command)
    record["passes"] = [passes_of(models, window, texts[:NUM_COUNTED], size.max_new_tokens) for window in WINDOWS]
    record["pair"] = {
        "target_type": models.target.config.model_type,
        "layers": models.target.config.layer_types,
        "target_parameters": models.target.num_parameters(),
        "drafter_parameters": models.drafters[DRAFTER].num_parameters(),
        "seconds": {stage: stages.seconds(stage) for stage in (TARGET, TEXT, DRAFTER)},
        "size": asdict(size),
    }
    write_record(stages.output / "hybrid.json", record)
    return record


def passes_of(models: Models, gamma: int, texts: list[str], max_new_tokens: int) -> dict[str, Any]:
    """Count the target's passes behind the prompt: one a round, and those of its own that move the state up.

    Args:
        models (`Models`): who decodes.
        gamma (`int`): tokens of a chain.
        texts (`list[str]`): prompts.
        max_new_tokens (`int`): the length limit.

    Returns:
        `dict`: `gamma`, `acceptance_rate`, `tokens_per_round`, `num_rounds` and `passes_per_round`.
    """
    method = ours(DRAFTER, "chain", draft_shape="chain", gamma=gamma)
    num_passes, calls = 0, []
    for text in texts:
        inputs = models.tokenizer(text, return_tensors="pt", return_token_type_ids=False)
        settings = {"do_sample": False, "max_new_tokens": max_new_tokens, "return_dict_in_generate": True}
        with PassClock([models.target], models.device) as clock:
            calls.append(method.decode(models, inputs, **settings).speculation)
        num_passes += len(clock.passes_of(models.target)) - 1
    num_rounds = sum(stats.num_rounds for stats in calls)
    accepted = sum(sum(map(sum, stats.num_accepted)) for stats in calls)
    return {
        "gamma": gamma,
        "acceptance_rate": accepted / max(1, sum(stats.num_drafted_tokens for stats in calls)),
        "tokens_per_round": accepted / max(1, num_rounds) + 1,
        "num_rounds": num_rounds,
        "passes_per_round": num_passes / max(1, num_rounds),
    }


def main(
    output: Annotated[Path, typer.Argument(help="folder for the pair and the figures; an earlier run's goes on")],
    num_prompts: Annotated[int, typer.Option(min=1, help="held-out problems to measure with")] = 16,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="tiny models and seconds; for no figures")] = False,
) -> None:
    """Make a hybrid pair on a CPU and measure it."""
    command = "python -m benchmarks.hybrid FOLDER"
    size, command = (TINY, f"{command} --dry-run") if dry_run else (FULL, command)
    transformers.logging.set_verbosity_error()
    stages = Stages(output, Journal(output, {"size": asdict(size)}))
    if not stages.is_finished(TARGET):
        make_target(stages, size)
    if not stages.is_finished(DRAFTER):
        make_drafter(stages, size)
    record = measure(stages, size, num_prompts, f"{command} --num-prompts {num_prompts}")
    typer.echo(speed_table(record["rows"]))
    typer.echo(f"The figures are in {output / 'hybrid.json'}.")


if __name__ == "__main__":
    typer.run(main)

"""A pair made within minutes on whatever GPU there is: target, its texts, drafter.

Each stage has a time of its own, since nobody knows beforehand how fast the GPU is. Knows how to make a pair; measures no
decoding.
"""

import random
import shutil
import tempfile
import time
from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from dataclasses import field
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import typer
from transformers import AutoModelForCausalLM
from transformers import AutoTokenizer
from transformers import LlamaConfig
from transformers import TrainerCallback
from transformers import TrainerControl
from transformers import TrainerState
from transformers import TrainingArguments

from hf_specdiff.benchmarks.clocks import Clock
from hf_specdiff.benchmarks.clocks import wait
from hf_specdiff.benchmarks.journal import Journal
from hf_specdiff.demo.bundle import MAX_NEW_TOKENS
from hf_specdiff.demo.bundle import PAIR
from hf_specdiff.training.data import SequenceDataset
from hf_specdiff.training.data import Sequences
from hf_specdiff.training.data import sequences_of_texts
from hf_specdiff.training.drafter_config import spread_layers
from hf_specdiff.training.pipeline import fit_drafter
from hf_specdiff.training.plan import TrainingPlan
from hf_specdiff.training.regeneration import regenerate
from recipes.bundled import MAX_LENGTH
from recipes.bundled import model_config
from recipes.bundled import more_code_prompts
from recipes.bundled import more_math_prompts
from recipes.bundled import training_prompts
from recipes.language_models import PackedDocuments
from recipes.language_models import make_corpus
from recipes.language_models import train_language_model
from recipes.language_models import training_definitions

TARGET, TEXT, DRAFTER = "target", "text", "drafter"
# What no stage counts belongs to the whole: reading the corpus, loading.
WHOLE = "whole"
# Kinds of the journal's records: the extent of a stage, the time that a part of it took, its end.
EXTENT, PART, END = "extent", "part", "end"


@dataclass(frozen=True, slots=True)
class Size:
    """What is made, and from how much.

    Attributes:
        num_layers (`int`): of the target.
        hidden_size (`int`): of the target and its drafter.
        num_heads (`int`): of both.
        num_problems (`int`): word problems of the corpus.
        code_epochs (`int`): how often the corpus holds each definition.
        num_definitions (`int`, *optional*): that the drafter learns from as they stand, beside the target's continuations; by
            default all.
        batch_size (`int`): sequences of a training step.
        num_prompts (`int`): that the target may continue.
        shard_size (`int`): prompts between two looks at the clock.
        generation_batch_size (`int`): prompts continued together.
        target_learning_rate (`float`): peak of its schedule.
        drafter_learning_rate (`float`): peak of its schedule.
        num_untimed_steps (`int`): training steps before the clock starts: they allocate and select kernels.
        num_timed_steps (`int`): training steps that tell how many fit.
        max_new_tokens (`dict[str, int]`): what the benchmark writes, by task.
    """

    num_layers: int = 24
    hidden_size: int = 640
    num_heads: int = 10
    num_problems: int = 64_000
    code_epochs: int = 4
    num_definitions: int | None = None
    batch_size: int = 64
    num_prompts: int = 20_480
    shard_size: int = 2048
    generation_batch_size: int = 1024
    target_learning_rate: float = 8e-4
    drafter_learning_rate: float = 1e-3
    num_untimed_steps: int = 10
    num_timed_steps: int = 30
    max_new_tokens: dict[str, int] = field(default_factory=lambda: dict(MAX_NEW_TOKENS))

    @property
    def config(self) -> LlamaConfig:
        """The target's configuration."""
        return model_config(self.num_layers, self.hidden_size, self.num_heads)


FULL = Size()
TINY = Size(
    num_layers=4,
    hidden_size=48,
    num_heads=2,
    num_problems=200,
    code_epochs=0,
    num_definitions=20,
    batch_size=4,
    num_prompts=16,
    shard_size=8,
    generation_batch_size=8,
    num_untimed_steps=1,
    num_timed_steps=2,
    max_new_tokens={"math": 6, "code": 6},
)


class StepTimer(TrainerCallback):
    """Find out how long a training step takes: let a few run, then stop.

    Args:
        size (`Size`): how many steps.
        device (`torch.device`): where they run.
        clock (`Callable[[], float]`): tells the seconds.
    """

    def __init__(self, size: Size, device: torch.device, clock: Clock = time.perf_counter) -> None:
        self.clock = clock
        self.first = size.num_untimed_steps
        self.last = size.num_untimed_steps + size.num_timed_steps
        self.device = device
        self.seconds_per_step = 0.0
        self._start = 0.0

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Read the clock before the first timed step and after the last one."""
        if state.global_step == self.first:
            self._start = self._now()
        if state.global_step == self.last:
            self.seconds_per_step = (self._now() - self._start) / (self.last - self.first)
            control.should_training_stop = True
            control.should_save = False

    def _now(self) -> float:
        wait(self.device)
        return self.clock()


# Trains for so many steps and saves into a folder; checkpoints go to its `work` subfolder.
Train = Callable[[int, Path, Sequence[TrainerCallback]], None]


@dataclass(frozen=True, slots=True)
class Stages:
    """Where stages leave their results, and which are finished.

    Attributes:
        output (`pathlib.Path`): gets a folder for each stage.
        journal (`Journal`): which stages are finished, and what was settled in them.
    """

    output: Path
    journal: Journal

    def is_finished(self, stage: str) -> bool:
        """Return whether there is nothing left to do."""
        return bool(self.journal.select(kind=END, stage=stage))

    def settled(self, stage: str) -> int | None:
        """Return how many steps or shards fit into a stage's time, once that is known: who goes on must not decide anew."""
        known = self.journal.select(kind=EXTENT, stage=stage)
        return known[0]["count"] if known else None

    def settle(self, stage: str, count: int) -> None:
        """Keep how many fit."""
        self.journal.append([{"kind": EXTENT, "stage": stage, "count": count}])

    def finish(self, stage: str) -> None:
        """Keep that there is nothing left to do, and remove the checkpoints."""
        self.journal.append([{"kind": END, "stage": stage}])
        shutil.rmtree(self.output / stage / "work")

    def seconds(self, stage: str) -> float:
        """Return the time that a stage has taken so far."""
        return sum(record["seconds"] for record in self.journal.select(kind=PART, stage=stage))

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Add the time inside `with` to a stage's, also if it is interrupted."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.journal.append([{"kind": PART, "stage": stage, "seconds": time.perf_counter() - start}])


@dataclass(frozen=True, slots=True)
class Job(Stages):
    """What all stages share: the folder gets `target`, `texts` and `drafter`.

    Attributes:
        size (`Size`): what is made.
        minutes (`dict[str, float]`): of each stage.
        device (`torch.device`): where everything runs.
    """

    size: Size
    minutes: dict[str, float]
    device: torch.device


def make_pair(job: Job) -> None:
    """Make target, texts and drafter, as far as they are not there.

    Args:
        job (`Job`): what all stages share.

    Raises:
        typer.Exit: after Ctrl-C while the drafter trains; the same call goes on.
    """
    if job.is_finished(DRAFTER):
        return
    with job.timed(WHOLE):
        if not job.is_finished(TARGET):
            make_target(job)
        make_drafter(job)


def make_target(job: Job) -> None:
    """Train the target on the bundled corpus; its tokenizer is the bundled one."""
    size = job.size
    tokenizer = AutoTokenizer.from_pretrained(PAIR / "target")
    dataset = PackedDocuments(make_corpus(size.num_problems, size.code_epochs), tokenizer)

    def train(num_steps: int, folder: Path, callbacks: Sequence[TrainerCallback]) -> None:
        settings: dict[str, Any] = {"batch_size": size.batch_size, "max_steps": num_steps, "callbacks": callbacks}
        train_language_model(folder, folder / "work", size.config, dataset, learning_rate=size.target_learning_rate, **settings)

    train_in_time(job, TARGET, train)
    tokenizer.save_pretrained(job.output / TARGET)
    job.finish(TARGET)


def make_drafter(job: Job) -> None:
    """Let the target continue prompts, and train a feature-conditioned drafter on that."""
    size = job.size
    target, tokenizer = load(job, TARGET), AutoTokenizer.from_pretrained(job.output / TARGET, padding_side="left")
    continued = continuations(job, target, tokenizer)
    # Code as it stands too: continuations alone are too little to learn it from.
    raw = sequences_of_texts(tokenizer, list(training_definitions()[: size.num_definitions]), MAX_LENGTH)
    sequences = Sequences.concatenate([continued, raw])
    plan = TrainingPlan(
        spread_layers(size.num_layers, 4),
        max_length=MAX_LENGTH,
        batch_size=size.batch_size,
        num_anchors=24,
        learning_rate=size.drafter_learning_rate,
        loss_weights={"dpace": 1.0},
        save_steps=1000,
    )
    steps_per_epoch = -(-len(SequenceDataset(sequences, MAX_LENGTH)) // size.batch_size)

    def train(num_steps: int, folder: Path, callbacks: Sequence[TrainerCallback]) -> None:
        timed = replace(plan, num_epochs=num_steps / steps_per_epoch)
        mask = tokenizer.mask_token_id
        if not fit_drafter(target, sequences, folder, timed, mask_token_id=mask, callbacks=callbacks):
            raise typer.Exit(130)

    train_in_time(job, DRAFTER, train)
    tokenizer.save_pretrained(job.output / DRAFTER)
    job.finish(DRAFTER)


def train_in_time(job: Job, stage: str, train: Train) -> None:
    """Train for as many steps as fit into a stage's minutes.

    The schedule must know its end, so a few steps are timed first, and what they teach is thrown away.

    Args:
        job (`Job`): what all stages share.
        stage (`str`): its name, and its folder's.
        train (`Callable`): trains for so many steps, saves into a folder and keeps checkpoints in its `work` subfolder.
    """
    with job.timed(stage):
        num_steps = job.settled(stage)
        if num_steps is None:
            timer = StepTimer(job.size, job.device)
            with tempfile.TemporaryDirectory(dir=job.output) as folder:
                train(timer.last + 1, Path(folder), [timer])
            num_steps = max(1, int(60 * job.minutes[stage] / timer.seconds_per_step))
            job.settle(stage, num_steps)
        train(num_steps, job.output / stage, [])


def continuations(job: Job, target: Any, tokenizer: Any) -> Sequences:
    """Let the target continue as many prompts as fit into the stage's minutes.

    Args:
        job (`Job`): what all stages share.
        target (`transformers.PreTrainedModel`): the target.
        tokenizer (`PreTrainedTokenizerBase`): its tokenizer, padding on the left.

    Returns:
        `Sequences`: prompts of all kinds in random order, with their continuations.
    """
    prompts = training_prompts() + more_code_prompts() + more_math_prompts()
    random.Random(4).shuffle(prompts)
    del prompts[job.size.num_prompts :]
    settings: dict[str, Any] = {"max_length": MAX_LENGTH, "batch_size": job.size.generation_batch_size}
    settled = job.settled(TEXT)
    parts: list[Sequences] = []
    starts = range(0, len(prompts), job.size.shard_size)
    for number, start in enumerate(starts[:settled]):
        if settled is None and parts and job.seconds(TEXT) > 60 * job.minutes[TEXT]:
            break
        shard = prompts[start : start + job.size.shard_size]
        with job.timed(TEXT):
            folder = job.output / "texts" / f"{number:03d}"
            parts.append(regenerate(target, tokenizer, shard, folder, **settings))
    if settled is None:
        job.settle(TEXT, len(parts))
    return Sequences.concatenate(parts)


def load(job: Job, name: str) -> Any:
    """Load the target or the drafter in bfloat16."""
    return AutoModelForCausalLM.from_pretrained(job.output / name, dtype=torch.bfloat16).to(job.device).eval()

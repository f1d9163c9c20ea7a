"""SpecDiff's and SpecDiff-2's experiment in small: `python -m benchmarks.specdiff_papers OUTPUT.json --work FOLDER`.

A masked diffusion language model learns the demo's word problems as a language model, and drafts for the bundled target as it
is ("unaligned"). Then copies of it are aligned with what the target writes, each by another objective, and all are decoded with
the real loop under many settings, one of them varied at a time. What is finished is kept in FOLDER, and the same command goes
on from there; with `--minutes` it stops in time and writes down what it has.
"""

import itertools
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import asdict
from dataclasses import dataclass
from dataclasses import field
from pathlib import Path
from typing import Annotated
from typing import Any

import torch
import transformers
import typer
from transformers import TrainerCallback
from transformers import TrainerControl
from transformers import TrainerState
from transformers import TrainingArguments

from hf_specdiff.benchmarks.figures import rows_of
from hf_specdiff.benchmarks.journal import Journal
from hf_specdiff.benchmarks.methods import PLAIN
from hf_specdiff.benchmarks.methods import Method
from hf_specdiff.benchmarks.methods import Models
from hf_specdiff.benchmarks.methods import ours
from hf_specdiff.benchmarks.runner import Block
from hf_specdiff.benchmarks.runner import count_identical
from hf_specdiff.benchmarks.runner import run_block
from hf_specdiff.benchmarks.standard import conditions_of
from hf_specdiff.benchmarks.standard import write_record
from hf_specdiff.core.generate import generate
from hf_specdiff.demo.bundle import load_demo
from hf_specdiff.demo.bundle import load_prompts
from hf_specdiff.demo.word_problems import iter_problems
from hf_specdiff.formats.loading import load_drafter
from hf_specdiff.training.data import Sequences
from hf_specdiff.training.data import sequences_of_texts
from hf_specdiff.training.pipeline import fit_drafter
from hf_specdiff.training.plan import TrainingPlan
from hf_specdiff.training.regeneration import regenerate
from recipes.diffusion_language_models import body_config
from recipes.diffusion_language_models import train_diffusion_language_model

UNALIGNED = "unaligned"
OBJECTIVES = {
    "+ CE": {"ce": 1.0},
    "+ streak": {"streak": 1.0},
    "+ CE + streak": {"ce": 1.0, "streak": 1.0},
}
# Of the problems that the language model reads, and of those that the target continues: neither the target's nor held out.
CORPUS_SEED, PROMPT_SEED = 11, 12
# Windows that are trained, and the longest that are tried: no weight hangs on the size.
BLOCK_SIZE, LONGEST_BLOCK = 17, 33
# What the target's continuations are drawn at, as in the papers' code.
TEXT_TEMPERATURE = 0.5
NUM_DRAFTS, DRAFT_TEMPERATURES = (1, 2, 4, 8), (0.5, 1.0, 2.0)
STEPS, GAMMAS = (1, 2, 4), (8, 16, 32)


@dataclass(frozen=True, slots=True)
class Scale:
    """How large the experiment is.

    Attributes:
        num_layers (`int`): of the language model.
        language_model_steps (`int`): of its own training.
        alignment_steps (`int`): of each alignment.
        num_texts (`int`): word problems to read, and as many others to be continued.
        max_length (`int`): tokens of a text.
        batch_size (`int`): texts of a step.
        num_anchors (`int`): windows of a text and step.
        num_seeds (`int`): alignments by each objective, and samples of each setting.
        num_prompts (`int`): held-out prompts.
        num_tokens (`int`): to write after each.
        prompts_together (`int`): prompts that are decoded together.
        objectives (`tuple[str, ...]`): to align by, of `OBJECTIVES`.
    """

    num_layers: int
    language_model_steps: int
    alignment_steps: int
    num_texts: int
    max_length: int
    batch_size: int
    num_anchors: int
    num_seeds: int
    num_prompts: int
    num_tokens: int
    prompts_together: int
    objectives: tuple[str, ...] = tuple(OBJECTIVES)

    @property
    def names(self) -> list[str]:
        """Of the drafters: the language model as it is, and aligned."""
        return [UNALIGNED, *self.objectives]


@dataclass(frozen=True, slots=True)
class Setting:
    """How to draft and to accept.

    Attributes:
        temperature (`float`): of the target.
        gamma (`int`): tokens of a draft.
        num_denoising_steps (`int`): passes for it.
        num_drafts (`int`): K; 0: one draft, of the likeliest tokens.
        draft_temperature (`float`): of the K joint samples.
    """

    temperature: float
    gamma: int = 16
    num_denoising_steps: int = 1
    num_drafts: int = 0
    draft_temperature: float = 0.0

    @property
    def arguments(self) -> dict[str, Any]:
        """Of `generate`."""
        chosen: dict[str, Any] = {"gamma": self.gamma, "draft_temperature": self.draft_temperature}
        if self.num_drafts:
            return {**chosen, "draft_shape": "samples", "num_drafts": self.num_drafts, "acceptance": "self_selection"}
        return {**chosen, "draft_shape": "chain", "num_denoising_steps": self.num_denoising_steps, "acceptance": "match"}


def settings_of(temperature: float) -> list[Setting]:
    """Return the settings to try at a temperature of the target, one thing varied at a time, the ends of each range first."""
    chains = [Setting(temperature, num_denoising_steps=steps) for steps in STEPS]
    chains += [Setting(temperature, gamma=gamma) for gamma in GAMMAS if gamma != Setting(temperature).gamma]
    pairs = sorted(itertools.product(NUM_DRAFTS, DRAFT_TEMPERATURES), key=lambda pair: pair not in ((1, 1.0), (8, 2.0)))
    samples = [Setting(temperature, num_drafts=count, draft_temperature=heat) for count, heat in pairs]
    longer = [Setting(temperature, gamma=gamma, num_drafts=8, draft_temperature=2.0) for gamma in GAMMAS if gamma != 16]
    return [chains[0], *samples[:2], *chains[1:], *samples[2:], *longer]


class OutOfTime(Exception):
    """The minutes are over; everything that was finished is on disk."""


@dataclass(slots=True)
class Deadline(TrainerCallback):
    """When to stop; in training it does what Ctrl-C does.

    Attributes:
        end (`float`): on the monotonic clock.
    """

    end: float

    def check(self) -> None:
        """Raise `OutOfTime` if it is over."""
        if time.monotonic() > self.end:
            raise OutOfTime

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Ask for a checkpoint and an end."""
        if time.monotonic() > self.end:
            signal.raise_signal(signal.SIGINT)


@dataclass(slots=True)
class Experiment:
    """What all phases share.

    Attributes:
        work (`pathlib.Path`): everything that is finished.
        scale (`Scale`): how large it is.
        deadline (`Deadline`): when to stop.
        target (`transformers.PreTrainedModel`): the bundled one.
        tokenizer (`PreTrainedTokenizerBase`): its tokenizer.
        drafters (`dict`): by name and seed, loaded when they are first asked for.
    """

    work: Path
    scale: Scale
    deadline: Deadline
    target: Any
    tokenizer: Any
    drafters: dict[tuple[str, int], Any] = field(default_factory=dict)

    def make_language_model(self) -> None:
        """Train the language model on word problems with their solutions, unless it is there."""
        if (self.work / "language-model" / "config.json").is_file():
            return
        problems = itertools.islice(iter_problems(CORPUS_SEED, held_out=False), self.scale.num_texts)
        texts = [problem.prompt + problem.solution for problem in problems]
        is_finished = train_diffusion_language_model(
            self.work / "language-model",
            self.work / "language-model-checkpoints",
            body_config(self.scale.num_layers),
            sequences_of_texts(self.tokenizer, texts, self.scale.max_length),
            mask_token_id=self.tokenizer.mask_token_id,
            max_length=self.scale.max_length,
            max_steps=self.scale.language_model_steps,
            batch_size=self.scale.batch_size,
            callbacks=[self.deadline],
        )
        if not is_finished:
            raise OutOfTime

    def texts(self) -> Sequences:
        """Return what the target writes behind other word problems; written when it is first asked for."""
        problems = itertools.islice(iter_problems(PROMPT_SEED, held_out=False), self.scale.num_texts)
        settings: dict[str, Any] = {"max_length": self.scale.max_length, "temperature": TEXT_TEMPERATURE, "batch_size": 64}
        prompts = [problem.prompt for problem in problems]
        return regenerate(self.target, self.tokenizer, prompts, self.work / "texts", **settings)

    def align(self, name: str, seed: int) -> None:
        """Train a copy of the language model by an objective, unless that is done."""
        output = self.folder_of(name, seed)
        if (output / "config.json").is_file():
            return
        scale, sequences = self.scale, self.texts()
        plan = TrainingPlan(
            None,
            block_size=BLOCK_SIZE,
            max_length=scale.max_length,
            num_epochs=scale.alignment_steps * scale.batch_size / len(sequences),
            batch_size=scale.batch_size,
            num_anchors=scale.num_anchors,
            learning_rate=5e-4,
            loss_weights=OBJECTIVES[name],
            save_steps=100,
            seed=seed,
        )
        drafter = load_drafter(
            self.work / "language-model", target=self.target, block_size=BLOCK_SIZE, context_cache="exact", dtype=torch.float32
        )
        mask = drafter.config.mask_token_id
        if not fit_drafter(
            self.target, sequences, output, plan, mask_token_id=mask, language_model=drafter, callbacks=[self.deadline]
        ):
            raise OutOfTime
        self.tokenizer.save_pretrained(output)

    def folder_of(self, name: str, seed: int) -> Path:
        """Return where a drafter lies."""
        words = name.replace("+", "").split()
        return self.work / ("language-model" if name == UNALIGNED else "-".join([*words, str(seed)]).lower())

    def drafter(self, name: str, seed: int) -> Any:
        """Return a drafter with room for the longest windows; the unaligned one is the same for every seed."""
        key = (name, 0 if name == UNALIGNED else seed)
        if key not in self.drafters:
            settings: dict[str, Any] = {"block_size": LONGEST_BLOCK, "context_cache": "exact", "dtype": torch.float32}
            self.drafters[key] = load_drafter(self.folder_of(*key), target=self.target, **settings)
        return self.drafters[key]

    def batches(self) -> list[dict[str, torch.Tensor]]:
        """Return ids and masks of the held-out prompts, padded on the left."""
        texts = [str(record["prompt"]) for record in load_prompts("math")[: self.scale.num_prompts]]
        size = self.scale.prompts_together
        groups = [texts[start : start + size] for start in range(0, len(texts), size)]
        names = ("input_ids", "attention_mask")
        padded = [self.tokenizer(group, padding=True, return_tensors="pt") for group in groups]
        return [{name: batch[name] for name in names} for batch in padded]


def todo(scale: Scale) -> Iterator[tuple[Setting, str, int]]:
    """Yield what is to be decoded: setting, drafter and seed; what tells most comes first."""
    for number in range(len(settings_of(0.0))):
        for temperature, name, seed in itertools.product((0.0, 1.0), scale.names, range(scale.num_seeds)):
            yield settings_of(temperature)[number], name, seed


def measure(experiment: Experiment, journal: Journal) -> None:
    """Decode the held-out prompts under every setting with every drafter; what the journal holds is not decoded again.

    Args:
        experiment (`Experiment`): with all drafters on disk.
        journal (`Journal`): gets a note for each setting, drafter, seed and batch.

    Raises:
        OutOfTime: if the minutes are over.
    """
    batches, plain = experiment.batches(), {}
    for setting, name, seed in todo(experiment.scale):
        for number, batch in enumerate(batches):
            key = {**asdict(setting), "drafter": name, "seed": seed, "batch": number}
            if journal.select(**key):
                continue
            experiment.deadline.check()
            if setting.temperature == 0 and number not in plain:
                plain[number] = experiment.target.generate(**batch, do_sample=False, max_new_tokens=experiment.scale.num_tokens)
            note = note_of(experiment, setting, experiment.drafter(name, seed), seed, batch, plain.get(number))
            journal.append([{**key, **note}])


def note_of(
    experiment: Experiment,
    setting: Setting,
    drafter: Any,
    seed: int,
    batch: dict[str, torch.Tensor],
    plain: torch.Tensor | None,
) -> dict[str, Any]:
    """Return what became of a batch: rounds, drafted tokens accepted in them, and rows equal to plain `generate`'s."""
    heat = setting.temperature
    sampling: dict[str, Any] = {"do_sample": True, "temperature": heat, "top_k": 0} if heat else {"do_sample": False}
    torch.manual_seed(seed)
    output = generate(
        experiment.target,
        **batch,
        **sampling,
        **setting.arguments,
        assistant_model=drafter,
        max_new_tokens=experiment.scale.num_tokens,
        return_dict_in_generate=True,
    )
    accepted = [count for row in output.speculation.num_accepted for count in row]
    note: dict[str, Any] = {"num_rounds": len(accepted), "num_accepted": sum(accepted), "num_rows": len(output.sequences)}
    if plain is not None and heat == 0:
        note["num_identical"] = count_identical(output.sequences, plain)
    return note


def rows_of_notes(notes: list[dict[str, Any]], num_seeds: int, num_batches: int) -> list[dict[str, Any]]:
    """Return tokens per round of each setting and drafter that was decoded whole, with an interval.

    Args:
        notes (`list[dict]`): of `measure`.
        num_seeds (`int`): that a whole setting has.
        num_batches (`int`): of each of them.

    Returns:
        `list[dict]`: a setting's fields, the drafter, `tokens_per_round`, `low` and `high` (95 %, resampled over seeds and
            batches), and what it was counted from.
    """
    names = ("temperature", "gamma", "num_denoising_steps", "num_drafts", "draft_temperature", "drafter")
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for note in notes:
        groups.setdefault(tuple(note[name] for name in names), []).append(note)
    rows = []
    for key, group in groups.items():
        if len(group) < num_seeds * num_batches:
            continue
        counts = torch.tensor([[note["num_accepted"], note["num_rounds"]] for note in group], dtype=torch.float64)
        drawn = counts[torch.randint(len(counts), (2000, len(counts)), generator=torch.Generator().manual_seed(0))].sum(dim=1)
        low, high = torch.quantile(1 + drawn[:, 0] / drawn[:, 1], torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
        accepted, rounds = counts.sum(dim=0).tolist()
        row = {**dict(zip(names, key, strict=True)), "tokens_per_round": 1 + accepted / rounds, "low": low, "high": high}
        by_seed = [[note for note in group if note["seed"] == seed] for seed in range(num_seeds)]
        row["by_seed"] = [1 + sum(n["num_accepted"] for n in own) / sum(n["num_rounds"] for n in own) for own in by_seed]
        row |= {"num_rounds": int(rounds), "num_prompts": sum(note["num_rows"] for note in group)}
        if all("num_identical" in note for note in group):
            row["num_identical"] = sum(note["num_identical"] for note in group)
        rows.append(row)
    return rows


def speed_rows(experiment: Experiment) -> list[dict[str, Any]]:
    """Return speed against plain `generate` on an idle machine, one prompt at a time: each drafter's chain and 8 samples."""
    names = experiment.scale.names
    drafters = {name: experiment.drafter(name, 0) for name in names}
    for drafter in drafters.values():
        drafter.context_cache = "auto"
    models = Models(experiment.target, experiment.tokenizer, drafters)
    texts = [str(record["prompt"]) for record in load_prompts("math")[: experiment.scale.num_prompts]]
    journal, rows = Journal(experiment.work / "speed", asdict(experiment.scale)), []
    for heat in (0.0, 1.0):
        chain, _, hot = settings_of(heat)[:3]
        methods = [Method(PLAIN, {})]
        methods += [ours(name, "chain", **chain.arguments) for name in names]
        methods += [ours(name, "8 samples at 2", **hot.arguments) for name in names]
        block = Block("math", texts, methods, experiment.scale.num_tokens, temperature=heat, num_detailed=0)
        run_block(models, block, journal, experiment.deadline.check)
        rows += rows_of(block, models, journal)
    return rows


def main(
    output: Annotated[Path, typer.Argument(help="JSON file for the figures")],
    work: Annotated[Path, typer.Option(help="folder of models, texts and notes; the same command goes on from it")],
    minutes: Annotated[float, typer.Option(min=0, help="stop in time and write down what there is; 0: no limit")] = 0,
    speed: Annotated[bool, typer.Option("--speed", help="time it too, which needs an idle machine")] = False,
    num_layers: Annotated[int, typer.Option(min=1, help="of the language model; 8 are twice the bundled drafters")] = 8,
    language_model_steps: Annotated[int, typer.Option(min=1)] = 6000,
    alignment_steps: Annotated[int, typer.Option(min=1, help="of each objective and seed")] = 1500,
    num_texts: Annotated[int, typer.Option(min=16, help="word problems to read; as many others the target continues")] = 8192,
    max_length: Annotated[int, typer.Option(min=32)] = 256,
    batch_size: Annotated[int, typer.Option(min=1)] = 16,
    num_anchors: Annotated[int, typer.Option(min=1, help="windows of a text and step, each a pass of its own")] = 2,
    num_seeds: Annotated[int, typer.Option(min=1)] = 2,
    num_prompts: Annotated[int, typer.Option(min=1)] = 32,
    num_tokens: Annotated[int, typer.Option(min=8)] = 128,
    prompts_together: Annotated[int, typer.Option(min=1)] = 4,
    objective: Annotated[list[str] | None, typer.Option(help="align by these only: " + ", ".join(OBJECTIVES))] = None,
) -> None:
    """Train, align, decode; each phase is skipped where its result exists."""
    objectives = tuple(objective or OBJECTIVES)
    if unknown := set(objectives) - set(OBJECTIVES):
        raise typer.BadParameter(f"`--objective` must be one of {', '.join(OBJECTIVES)}, got {', '.join(sorted(unknown))}.")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    target, _, tokenizer = load_demo()
    tokenizer.padding_side = "left"
    training = (num_layers, language_model_steps, alignment_steps, num_texts, max_length, batch_size, num_anchors)
    scale = Scale(*training, num_seeds, num_prompts, num_tokens, prompts_together, objectives)
    deadline = Deadline(time.monotonic() + minutes * 60 if minutes else float("inf"))
    journal = Journal(work / "notes", asdict(scale))  # runs of other sizes do not mix
    experiment = Experiment(work, scale, deadline, target, tokenizer)
    timed: list[dict[str, Any]] = []
    try:
        experiment.make_language_model()
        for seed, name in itertools.product(range(num_seeds), objectives):
            deadline.check()
            experiment.align(name, seed)
        measure(experiment, journal)
        timed = speed_rows(experiment) if speed else []
    except OutOfTime:
        typer.echo("The minutes are over; the same command goes on.")
    num_batches = -(-num_prompts // prompts_together)
    rows = rows_of_notes(journal.records, num_seeds, num_batches)
    if not rows:
        typer.echo("Nothing is decoded yet.")
        raise typer.Exit(1)
    sizes = {name: value for name, value in asdict(scale).items() if name != "objectives"}
    options = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in sizes.items())
    options += "".join(f' --objective "{name}"' for name in objective or ())
    command = f"python -m benchmarks.specdiff_papers OUTPUT.json --work FOLDER {options}"
    conditions = conditions_of(Models(target, tokenizer, {}), command) | asdict(scale)
    parameters = {"drafter": experiment.drafter(UNALIGNED, 0).num_parameters(), "target": target.num_parameters()}
    num_wanted = len(settings_of(0.0)) * 2 * len(scale.names)
    conditions |= {"parameters": parameters, "num_settings": len(rows), "num_settings_planned": num_wanted}
    write_record(output, {"conditions": conditions, "rows": rows, "speed": timed})
    typer.echo(f"{len(rows)} of {num_wanted} settings written to {output}.")


if __name__ == "__main__":
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0))))
    typer.run(main)

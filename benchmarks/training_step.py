"""What a training step costs beside its passes: `python -m benchmarks.training_step [OUTPUT.json]`.

The passes are the target's where anything of it is wanted, and the drafter's there and back, on the same sequences and windows.
All else that the trainer does (windows and masks, the loss, checks, clipping, the optimizer) is what the ratio is above 1.
Both are measured in turn, in one process; medians, because machines are busy.
"""

import itertools
import statistics
import tempfile
import time
from collections.abc import Callable
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
from transformers.trainer_callback import PrinterCallback

from hf_specdiff.benchmarks.methods import Models
from hf_specdiff.benchmarks.standard import conditions_of
from hf_specdiff.benchmarks.standard import write_record
from hf_specdiff.demo.bundle import load_demo
from hf_specdiff.demo.word_problems import iter_problems
from hf_specdiff.training.data import SequenceDataset
from hf_specdiff.training.data import sequences_of_texts
from hf_specdiff.training.footprint import peak_memory
from hf_specdiff.training.plan import TrainingPlan
from hf_specdiff.training.trainer import SpecDiffTrainer
from hf_specdiff.training.windows import Windows
from hf_specdiff.training.windows import sample_windows
from hf_specdiff.training.windows import window_attention_mask
from recipes.bundled import MAX_LENGTH

CONDITIONINGS = ("features", "tokens")
NUM_DOCUMENTS = 256


class TimedTrainer(SpecDiffTrainer):
    """Run the passes of every step alone too, before the step or after it in turn, so that neither always finds memory warm.

    Attributes:
        alone (`list[float]`): seconds of the passes, by step.
        whole (`list[float]`): seconds of the step, from the batch in hand to the optimizer's end.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.alone: list[float] = []
        self.whole: list[float] = []
        self.add_callback(_StepEnd(self))

    def training_step(
        self, model: Any, inputs: dict[str, torch.Tensor], num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """Do the step, after its passes if it is their turn."""
        model.train()  # the windows of a step are others than those of an evaluation
        passes = only_passes(self, inputs)
        if self.state.global_step % 2 == 0:
            self.alone.append(seconds_of(passes))
        else:
            self._waiting = passes
        self.whole.append(-time.perf_counter())
        return super().training_step(model, inputs, num_items_in_batch)

    def end_step(self) -> None:
        """Stop the step's clock, and run the passes if they have not been run."""
        self.whole[-1] += time.perf_counter()
        if len(self.alone) < len(self.whole):
            self.alone.append(seconds_of(self._waiting))


class _StepEnd(TrainerCallback):
    def __init__(self, trainer: TimedTrainer) -> None:
        self.trainer = trainer

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Tell the trainer."""
        self.trainer.end_step()


def seconds_of(call: Callable[[], None]) -> float:
    """Return how long a call takes, in seconds."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def make_trainer(conditioning: str, folder: Path, *, batch_size: int, num_anchors: int, num_steps: int) -> TimedTrainer:
    """Return a trainer of a bundled drafter, in float32 on the CPU, on word problems.

    Args:
        conditioning (`str`): `"features"` or `"tokens"`.
        folder (`pathlib.Path`): nothing is written to it.
        batch_size (`int`): sequences of a step.
        num_anchors (`int`): windows of a sequence.
        num_steps (`int`): when to stop.

    Returns:
        `TimedTrainer`: not yet run.
    """
    target, drafter, tokenizer = load_demo(conditioning)
    problems = itertools.islice(iter_problems(2, held_out=False), NUM_DOCUMENTS)
    texts = [problem.prompt + problem.solution for problem in problems]
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=num_steps,
        per_device_train_batch_size=batch_size,
        use_cpu=True,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    dataset = SequenceDataset(sequences_of_texts(tokenizer, texts, MAX_LENGTH), MAX_LENGTH)
    plan = TrainingPlan(drafter.config.target_layer_ids, num_anchors=num_anchors)
    trainer = TimedTrainer(target, plan, model=drafter, args=arguments, train_dataset=dataset)
    trainer.remove_callback(PrinterCallback)
    return trainer


def only_passes(trainer: SpecDiffTrainer, batch: dict[str, torch.Tensor]) -> Callable[[], None]:
    """Return what runs the passes of a step and nothing else; windows and masks are made beforehand.

    Args:
        trainer (`SpecDiffTrainer`): of a drafter, on the CPU.
        batch (`dict`): as `collate` returns it.

    Returns:
        `Callable`: without arguments; leaves no gradients.
    """
    config, ids = trainer.model.config, batch["input_ids"]
    generator = torch.Generator().manual_seed(trainer._window_seed(batch["indices"]))
    windows = sample_windows(batch, trainer.plan.num_anchors, config.block_size, config.mask_token_id, generator)
    run = _feature_pass if config.is_feature_conditioned else _token_pass
    forward = run(trainer, ids, windows)

    def passes() -> None:
        logits = forward()
        logits.backward(torch.ones_like(logits))
        trainer.model.zero_grad()

    return passes


def _feature_pass(trainer: SpecDiffTrainer, ids: torch.Tensor, windows: Windows) -> Callable[[], torch.Tensor]:
    """Return target, drafter and head, forward."""
    config, target = trainer.model.config, trainer.target
    positions = torch.arange(ids.shape[1]).expand(len(ids), -1)
    settings = {
        "position_ids": torch.cat([positions, windows.position_ids], dim=1),
        "attention_mask": window_attention_mask(windows.anchors, ids.shape[1], config.block_size, context_queries=False),
        "noise_embeds": target.get_input_embeddings()(windows.input_ids),
    }

    def forward() -> torch.Tensor:
        features, _ = trainer._run_target(config, {"input_ids": ids}, windows)
        states = trainer.model(context_hidden_states=features, **settings).last_hidden_state
        states = states.unflatten(1, (-1, config.block_size))[:, :, 1:]
        return target.get_output_embeddings()(states)

    return forward


def _token_pass(trainer: SpecDiffTrainer, ids: torch.Tensor, windows: Windows) -> Callable[[], torch.Tensor]:
    """Return the drafter, forward."""
    block_size = trainer.model.config.block_size
    positions = torch.arange(ids.shape[1]).expand(len(ids), -1)
    settings = {
        "input_ids": torch.cat([ids, windows.input_ids], dim=1),
        "position_ids": torch.cat([positions, windows.position_ids], dim=1),
        "attention_mask": window_attention_mask(windows.anchors, ids.shape[1], block_size, context_queries=True),
        "logits_to_keep": windows.input_ids.shape[1],
    }
    return lambda: trainer.model(**settings).logits


def measure(conditioning: str, *, batch_size: int, num_anchors: int, num_steps: int) -> dict[str, Any]:
    """Train for a few steps and time them.

    Args:
        conditioning (`str`): `"features"` or `"tokens"`.
        batch_size (`int`): sequences of a step.
        num_anchors (`int`): windows of a sequence.
        num_steps (`int`): steps, after one that does not count.

    Returns:
        `dict`: the row of the results: times in seconds, each a median; the ratio is the median of each step's own; the memory
            in bytes is the process's, so an earlier row's if that took more.
    """
    sizes = {"batch_size": batch_size, "num_anchors": num_anchors, "num_steps": num_steps + 1}
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(conditioning, Path(folder), **sizes)
        trainer.train()
    alone, whole = trainer.alone[1:], trainer.whole[1:]
    return {
        "conditioning": conditioning,
        "seconds_per_step": statistics.median(whole),
        "seconds_of_passes": statistics.median(alone),
        "ratio": statistics.median(step / part for step, part in zip(whole, alone, strict=True)),
        "peak_memory_bytes": peak_memory(trainer.args.device),
    }


def main(
    output: Annotated[Path | None, typer.Argument(help="JSON file for the figures")] = None,
    batch_size: Annotated[int, typer.Option(min=1)] = 16,
    num_anchors: Annotated[int, typer.Option(min=1)] = 8,
    num_steps: Annotated[int, typer.Option(min=1)] = 15,
) -> None:
    """Measure both conditionings."""
    transformers.logging.disable_progress_bar()
    rows = []
    for conditioning in CONDITIONINGS:
        row = measure(conditioning, batch_size=batch_size, num_anchors=num_anchors, num_steps=num_steps)
        seconds = f"{row['seconds_per_step']:.3f} s per step, {row['seconds_of_passes']:.3f} s of passes"
        typer.echo(f"{conditioning:8}  {seconds}, ratio {row['ratio']:.3f}")
        rows.append(row)
    if output is not None:
        options = f"--batch-size {batch_size} --num-anchors {num_anchors} --num-steps {num_steps}"
        command = f"python -m benchmarks.training_step {output} {options}"
        conditions = conditions_of(Models(*load_demo()[::2], {}), command) | {"max_length": MAX_LENGTH}
        write_record(output, {"conditions": conditions, "rows": rows})


if __name__ == "__main__":
    typer.run(main)

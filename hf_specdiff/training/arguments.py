"""A plan as the host's training arguments."""

import sys
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from hf_specdiff.training.checkpoints import last_whole_checkpoint
from hf_specdiff.training.plan import TrainingPlan


def training_arguments(plan: TrainingPlan, folder: Path, *, evaluates: bool, use_cpu: bool) -> TrainingArguments:
    """Return what the host's trainer is told.

    Args:
        plan (`TrainingPlan`): all settings.
        folder (`pathlib.Path`): of the checkpoints.
        evaluates (`bool`): whether there is something to evaluate on; the best checkpoint is then the one that is kept.
        use_cpu (`bool`): whether to stay on the CPU.

    Returns:
        `transformers.TrainingArguments`: checked by the host.
    """
    return TrainingArguments(
        **(_evaluation(plan, folder) if evaluates else {}),
        output_dir=str(folder),
        num_train_epochs=plan.num_epochs,
        per_device_train_batch_size=plan.batch_size,
        learning_rate=plan.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=plan.warmup,  # a share, being less than 1
        disable_tqdm=not sys.stderr.isatty(),
        weight_decay=0.01,
        adam_beta2=0.98,
        seed=plan.seed,
        bf16=plan.bf16,
        use_cpu=use_cpu,
        save_steps=plan.save_steps,
        save_total_limit=2,
        logging_steps=25,
        report_to="none",
        dataloader_pin_memory=False,
        ddp_find_unused_parameters=False,
    )


def _evaluation(plan: TrainingPlan, folder: Path) -> dict[str, Any]:
    return {
        "eval_strategy": "steps",
        "eval_steps": plan.save_steps,
        # A resumed run has that behind it.
        "eval_on_start": last_whole_checkpoint(folder) is None,
        "per_device_eval_batch_size": plan.batch_size,
        "load_best_model_at_end": True,
        "metric_for_best_model": "tokens_per_round",
        "greater_is_better": True,
    }

"""A masked diffusion language model on the bundled corpus: what SpecDiff and SpecDiff-2 take from the Hub, made small.

Letters: B batch, S sequence length, V vocabulary. Trained as a language model, on texts as they stand; it never sees a target.
"""

from pathlib import Path
from typing import Any

import torch
from transformers import Qwen2Config
from transformers import Qwen2ForCausalLM
from transformers import Trainer
from transformers import TrainerCallback
from transformers import TrainingArguments

from hf_specdiff.core.masked_target import additive
from hf_specdiff.diffusion.drafter import DiffusionDrafter
from hf_specdiff.training.callbacks import StopOnInterrupt
from hf_specdiff.training.checkpoints import last_whole_checkpoint
from hf_specdiff.training.data import SequenceDataset
from hf_specdiff.training.data import Sequences
from hf_specdiff.training.data import collate
from hf_specdiff.training.losses import IGNORED
from hf_specdiff.training.losses import weighted_ce
from recipes.language_models import VOCAB_SIZE

# As of models that were made from a causal one: the row before a token speaks of it.
LOGIT_OFFSET = -1
# Masked tokens weigh 1 / (share of the text that is masked), which has no bound.
LEAST_SHARE = 0.05


def body_config(num_layers: int = 8, hidden_size: int = 192) -> Qwen2Config:
    """Return a Qwen2 of about twice the bundled drafters' size, half their target's.

    Args:
        num_layers (`int`): its layers.
        hidden_size (`int`): its width.

    Returns:
        `Qwen2Config`: with the bundled tokenizer's vocabulary, whose mask is a token of it.
    """
    return Qwen2Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=hidden_size,
        intermediate_size=64 * -(-hidden_size // 24),  # 8/3 of the width, in whole 64s
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        max_position_embeddings=1024,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )


def mask_texts(
    batch: dict[str, torch.Tensor], mask_token_id: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hide a random share of each text's tokens; the first stays.

    The shares of a batch are spread evenly over their range, which tells more of it than as many independent ones.

    Args:
        batch (`dict`): of `collate`.
        mask_token_id (`int`): what stands in a hidden token's place.
        generator (`torch.Generator`): a CPU generator; the only source of randomness.

    Returns:
        `tuple`: ids `(B, S)`, labels `(B, S)`, -100 where nothing is hidden, and shares `(B,)`.

    Source: arXiv:2406.07524, the objective of MDLM with a linear schedule.
    """
    ids = batch["input_ids"]
    num_rows, length = ids.shape
    shares = (torch.rand(1, generator=generator) + torch.arange(num_rows) / num_rows) % 1
    shares = LEAST_SHARE + (1 - LEAST_SHARE) * shares
    places = torch.arange(length)
    is_hidden = (torch.rand(num_rows, length, generator=generator) < shares[:, None]) & (places > 0)
    is_hidden = is_hidden.to(ids.device) & (places.to(ids.device) < batch["lengths"][:, None])
    return ids.masked_fill(is_hidden, mask_token_id), ids.masked_fill(~is_hidden, IGNORED), shares.to(ids.device)


class MaskedDiffusionTrainer(Trainer):
    """Train a bidirectional body to tell hidden tokens from those that are left.

    Args:
        mask_token_id (`int`): what stands in a hidden token's place.
        **kwargs: of `transformers.Trainer`.
    """

    def __init__(self, mask_token_id: int, **kwargs: Any) -> None:
        super().__init__(data_collator=collate, **kwargs)
        self.mask_token_id = mask_token_id

    def compute_loss(
        self, model: Any, inputs: dict[str, torch.Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return minus the bound on log-likelihood per token, in nats; see `transformers.Trainer.compute_loss`."""
        # Of nothing but the seed and the step: a resumed run hides the same tokens.
        generator = torch.Generator().manual_seed(self.args.seed * 2**32 + self.state.global_step)
        ids, labels, shares = mask_texts(inputs, self.mask_token_id, generator)
        places = torch.arange(ids.shape[1], device=ids.device)
        is_text = places < inputs["lengths"][:, None]
        seen = is_text[:, None] | (places == places[:, None])
        logits = model(input_ids=ids, attention_mask=additive(seen, torch.float32), use_cache=False).logits
        log_probs = torch.log_softmax(logits[:, :-1].float(), dim=-1)
        loss = weighted_ce(log_probs, labels[:, 1:], lambda picked, has_label: has_label / shares[:, None])
        return (loss, logits) if return_outputs else loss


def train_diffusion_language_model(
    folder: Path,
    work: Path,
    config: Qwen2Config,
    sequences: Sequences,
    *,
    mask_token_id: int,
    max_length: int,
    max_steps: int,
    batch_size: int = 32,
    learning_rate: float = 2e-3,
    seed: int = 0,
    callbacks: list[TrainerCallback] | None = None,
) -> bool:
    """Train a masked diffusion language model and save it as `load_drafter` reads it; an interrupted run goes on.

    Args:
        folder (`pathlib.Path`): where the model goes.
        work (`pathlib.Path`): where the checkpoints go.
        config (`Qwen2Config`): the model's shape.
        sequences (`Sequences`): texts.
        mask_token_id (`int`): an id that none of them holds.
        max_length (`int`): tokens of a text; the rest is cut off.
        max_steps (`int`): steps of `batch_size` texts.
        batch_size (`int`): texts of a step.
        learning_rate (`float`): peak of the cosine schedule.
        seed (`int`): of weights, order and masks.
        callbacks (`list[TrainerCallback]`, *optional*): of the host's trainer.

    Returns:
        `bool`: whether it is finished; false after Ctrl-C, with a checkpoint in `work`.
    """
    torch.manual_seed(seed)
    arguments = TrainingArguments(
        output_dir=str(work),
        max_steps=max_steps,
        per_device_train_batch_size=batch_size,
        learning_rate=learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=0.05,
        weight_decay=0.05,
        adam_beta2=0.98,
        seed=seed,
        bf16=True,
        use_cpu=not torch.cuda.is_available(),
        save_steps=200,
        save_total_limit=1,
        logging_steps=50,
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        remove_unused_columns=False,
    )
    trainer = MaskedDiffusionTrainer(
        mask_token_id,
        model=Qwen2ForCausalLM(config),
        args=arguments,
        train_dataset=SequenceDataset(sequences, max_length),
        callbacks=callbacks,
    )
    with StopOnInterrupt() as interrupt:
        trainer.add_callback(interrupt)
        trainer.train(resume_from_checkpoint=last_whole_checkpoint(work))
    if interrupt.was_interrupted:
        return False
    body = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
    drafter = DiffusionDrafter(body, mask_token_id=mask_token_id, logit_offset=LOGIT_OFFSET)
    drafter.save_pretrained(folder)
    return True

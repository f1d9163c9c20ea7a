"""The bundled target and the autoregressive assistant: tokenizer, corpus, causal language modelling.

Knows plain causal language models only; drafters are trained by `hf_specdiff.training`.
"""

import itertools
import random
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers import decoders
from tokenizers import models
from tokenizers import pre_tokenizers
from tokenizers import processors
from tokenizers import trainers
from torch.utils.data import Dataset
from transformers import AutoModelForCausalLM
from transformers import PreTrainedConfig
from transformers import PreTrainedTokenizerFast
from transformers import Trainer
from transformers import TrainerCallback
from transformers import TrainingArguments

from hf_specdiff.demo.word_problems import iter_problems
from hf_specdiff.training.checkpoints import last_whole_checkpoint
from recipes.source_code import iter_definitions
from recipes.source_code import iter_modules

VOCAB_SIZE = 576
BLOCK_LENGTH = 256
SPECIAL_TOKENS = {"pad_token": "<|pad|>", "bos_token": "<|bos|>", "eos_token": "<|eos|>", "mask_token": "<|mask|>"}


@cache
def training_definitions() -> tuple[str, ...]:
    """Return the source of every definition outside the held-out modules; they are read once in a process."""
    return tuple(text for path in iter_modules(held_out=False) for text in iter_definitions(path))


def train_tokenizer(folder: Path) -> None:
    """Train the byte-level BPE tokenizer, digits split, and save it.

    Args:
        folder (`pathlib.Path`): where the tokenizer files go.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(SPECIAL_TOKENS.values()),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    code = training_definitions()
    problems = itertools.islice(iter_problems(0, held_out=False), 4 * len(code))
    tokenizer.train_from_iterator(itertools.chain(code, (p.prompt + p.solution for p in problems)), trainer)
    bos = SPECIAL_TOKENS["bos_token"]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
    )
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, padding_side="left", clean_up_tokenization_spaces=False, **SPECIAL_TOKENS
    )
    wrapped.save_pretrained(folder)


class PackedDocuments(Dataset):
    """Documents joined end to end and cut into blocks of `BLOCK_LENGTH` tokens.

    Args:
        documents (`list[str]`): texts; each is encoded as bos, text, eos.
        tokenizer (`PreTrainedTokenizerFast`): the bundled tokenizer.
    """

    def __init__(self, documents: list[str], tokenizer: PreTrainedTokenizerFast) -> None:
        encoded = tokenizer(documents)["input_ids"]
        stream = torch.tensor([token for ids in encoded for token in (*ids, tokenizer.eos_token_id)])
        num_blocks = len(stream) // BLOCK_LENGTH
        self.blocks = stream[: num_blocks * BLOCK_LENGTH].view(num_blocks, BLOCK_LENGTH)

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.blocks[index], "labels": self.blocks[index]}


def make_corpus(num_problems: int, code_epochs: int) -> list[str]:
    """Return shuffled training documents of both kinds, none of them held out.

    Args:
        num_problems (`int`): word problems, all different.
        code_epochs (`int`): how often each definition occurs.
    """
    problems = itertools.islice(iter_problems(1, held_out=False), num_problems)
    documents = [problem.prompt + problem.solution for problem in problems]
    documents += training_definitions() * code_epochs
    random.Random(0).shuffle(documents)
    return documents


def train_language_model(
    folder: Path,
    work: Path,
    config: PreTrainedConfig,
    dataset: PackedDocuments,
    *,
    learning_rate: float,
    batch_size: int = 16,
    max_steps: int | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    arguments: dict[str, Any] | None = None,
) -> None:
    """Train a causal language model for one pass over the corpus and save it in bfloat16.

    It runs on a GPU if there is one. An interrupted run goes on from its last checkpoint.

    Args:
        folder (`pathlib.Path`): where the model goes.
        work (`pathlib.Path`): where the checkpoints go.
        config (`PreTrainedConfig`): the model's type and shape.
        dataset (`PackedDocuments`): the corpus.
        learning_rate (`float`): peak of the cosine schedule.
        batch_size (`int`): blocks of a step.
        max_steps (`int`, *optional*): steps in place of one pass; more than a pass begins it again.
        callbacks (`Sequence[TrainerCallback]`): of the host's trainer.
        arguments (`dict`, *optional*): other `TrainingArguments` than the usual ones.
    """
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    usual: dict[str, Any] = {
        "num_train_epochs": 1,
        "max_steps": -1 if max_steps is None else max_steps,
        "per_device_train_batch_size": batch_size,
        "learning_rate": learning_rate,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 100,
        "weight_decay": 0.05,
        "adam_beta2": 0.98,
        "bf16": True,
        "use_cpu": not torch.cuda.is_available(),
        "save_steps": 500,
        "save_total_limit": 1,
        "logging_steps": 50,
        "report_to": "none",
        "dataloader_pin_memory": False,
    }
    settings = TrainingArguments(output_dir=str(work), **usual | (arguments or {}))
    trainer = Trainer(model=model, args=settings, train_dataset=dataset, callbacks=list(callbacks))
    trainer.train(resume_from_checkpoint=last_whole_checkpoint(work))
    model.to(torch.bfloat16).save_pretrained(folder)

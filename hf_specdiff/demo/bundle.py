"""Loading what is bundled: no network, nothing trained here."""

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers import AutoTokenizer

PAIR = Path(__file__).parent / "pair"
# How the bundled drafters' configurations name their target.
BUNDLED_TARGET = "hf_specdiff.load_demo()"
PROMPTS = Path(__file__).parent / "prompts"
DRAFTERS = ("features", "tokens", "unaligned", "autoregressive")
PROMPT_SETS = ("math", "code")
# Enough for a solution; code has no natural end.
MAX_NEW_TOKENS = {"math": 200, "code": 128}


def load_demo(drafter: str = "features") -> tuple[Any, Any, Any]:
    """Load the bundled target, one of its drafters, and their tokenizer, in float32 on the CPU.

    Args:
        drafter (`str`): `"features"` (feature-conditioned, with a head that knows the token before) or `"tokens"`
            (token-conditioned); for comparison `"unaligned"` (the feature-conditioned one as cross-entropy left it, before
            alignment) or `"autoregressive"` (a plain small model).

    Returns:
        `tuple`: target (`LlamaForCausalLM`), drafter (`SpecDiffDrafter`, or `LlamaForCausalLM`), tokenizer.

    Raises:
        ValueError: for another name.
    """
    if drafter not in DRAFTERS:
        raise ValueError(f"`drafter` must be one of {', '.join(DRAFTERS)}, got {drafter!r}.")
    target, assistant = (
        AutoModelForCausalLM.from_pretrained(PAIR / name, dtype=torch.float32).eval() for name in ("target", drafter)
    )
    return target, assistant, AutoTokenizer.from_pretrained(PAIR / "target")


def load_prompts(name: str) -> list[dict[str, str | None]]:
    """Load a set of prompts that no bundled model has seen in training.

    Args:
        name (`str`): `"math"` (word problems) or `"code"` (beginnings of Python definitions).

    Returns:
        `list[dict]`: `{"prompt": str, "answer": str | None}`; the answer is the final number of a word problem.

    Raises:
        ValueError: for another name.
    """
    if name not in PROMPT_SETS:
        raise ValueError(f"`name` must be one of {', '.join(PROMPT_SETS)}, got {name!r}.")
    lines = (PROMPTS / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]

"""How the bundled pair is made: `python -m recipes.bundled OUTPUT`, about four and a half hours on two cores.

Every stage is skipped where its result exists, and goes on from its last checkpoint where it was interrupted. The bundled
drafters' first stage was cut from a longer schedule of the same kind (step 1,000 of 2,607 for features, 1,250 for tokens); here
it runs a schedule of that length to its end.
"""

import itertools
import json
import random
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Annotated
from typing import Any

import torch
import typer
from transformers import AutoModelForCausalLM
from transformers import AutoTokenizer
from transformers import LlamaConfig

from hf_specdiff.demo.bundle import BUNDLED_TARGET
from hf_specdiff.demo.word_problems import iter_problems
from hf_specdiff.training.data import Sequences
from hf_specdiff.training.data import sequences_of_texts
from hf_specdiff.training.drafter_config import spread_layers
from hf_specdiff.training.pipeline import fit_drafter
from hf_specdiff.training.plan import TrainingPlan
from hf_specdiff.training.regeneration import regenerate
from recipes.language_models import VOCAB_SIZE
from recipes.language_models import PackedDocuments
from recipes.language_models import make_corpus
from recipes.language_models import train_language_model
from recipes.language_models import train_tokenizer
from recipes.language_models import training_definitions
from recipes.source_code import iter_definitions
from recipes.source_code import iter_modules

NUM_CORPUS_PROBLEMS = 32_000
NUM_CORPUS_CODE_EPOCHS = 2
NUM_TRAINING_PROBLEMS = 5_000
NUM_TRAINING_PROMPTS = 5_120
NUM_MORE_CODE = 10_240
NUM_YET_MORE_CODE = 15_360
NUM_MORE_PROBLEMS = 5_120
NUM_HEAD_CODE = 1_024
NUM_HEAD_PROBLEMS = 384
HEAD_RANK = 64
HEAD_EPOCHS = 6.0
NUM_HELD_OUT = 96
TARGET_LAYERS = 16
MAX_LENGTH = 256
# What was fastest over both tasks on two cores: with the anchor, 16 tokens fill a tile of the matrix kernels.
# `benchmarks/results/standard.json` holds the figures.
TREE_BUDGET = 15
# With copies a tree of 15 brings a third to a half more on code, and no less on word problems.
NUM_COPIED = 32
# The feature-conditioned drafter after this stage is kept for comparison: cross-entropy alone has taught it.
UNALIGNED_STAGE = 2


def model_config(num_layers: int, hidden_size: int = 192, num_heads: int = 4) -> LlamaConfig:
    """Return a deep, narrow Llama: on a CPU it is most like a large model on a GPU, where more tokens in a pass cost little.

    Args:
        num_layers (`int`): its layers.
        hidden_size (`int`): its width.
        num_heads (`int`): attention heads; an even number that divides the width.

    Returns:
        `LlamaConfig`: with two query heads to a key head.
    """
    return LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=hidden_size,
        intermediate_size=64 * -(-hidden_size // 24),  # 8/3 of the width, in whole 64s
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=num_heads // 2,
        head_dim=hidden_size // num_heads,
        tie_word_embeddings=True,
        max_position_embeddings=1024,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )


def code_prompt(definition: str, num_characters: int) -> str | None:
    """Return the first lines of a definition, at least so many characters; `None` if less than a third of it is left."""
    lines = definition.splitlines()
    head = ""
    for line in lines:
        head = f"{head}\n{line}" if head else line
        if len(head) >= num_characters:
            return head if len(head) < 2 / 3 * len(definition) and len(head) < 3 * num_characters else None
    return None


def held_out_prompts() -> dict[str, list[dict[str, str | None]]]:
    """Return both prompt sets; no problem and no module of theirs is in any training text."""
    seen = "\n".join(training_definitions())
    problems = itertools.islice(iter_problems(3, held_out=True), NUM_HELD_OUT)
    heads = [
        head
        for path in iter_modules(held_out=True)
        for definition in iter_definitions(path)
        if (head := code_prompt(definition, 120)) is not None and head not in seen  # some code stands in two modules
    ]
    random.Random(3).shuffle(heads)
    return {
        "math": [{"prompt": problem.prompt, "answer": problem.answer} for problem in problems],
        "code": [{"prompt": head, "answer": None} for head in heads[:NUM_HELD_OUT]],
    }


def training_prompts() -> list[str]:
    """Return the prompts that the target continues for its drafters, none of them held out."""
    problems = itertools.islice(iter_problems(2, held_out=False), NUM_TRAINING_PROBLEMS)
    heads = [code_prompt(text, 90) for text in training_definitions()]
    prompts = [problem.prompt for problem in problems] + [head for head in heads if head is not None]
    random.Random(2).shuffle(prompts)
    return prompts[:NUM_TRAINING_PROMPTS]


def more_code_prompts() -> list[str]:
    """Return many more code prompts: several beginnings of each definition and of pieces of it."""
    return _code_beginnings((60, 120, 180, 300), (80, 160), characters_per_piece=900, max_pieces=6, seed=5)[:NUM_MORE_CODE]


def yet_more_code_prompts() -> list[str]:
    """Return code prompts beside those of `more_code_prompts`: other beginnings, and more pieces."""
    known = set(more_code_prompts())
    beginnings = _code_beginnings((75, 150, 240, 400), (70, 110, 220), characters_per_piece=300, max_pieces=40, seed=6)
    return [head for head in beginnings if head not in known][:NUM_YET_MORE_CODE]


def _code_beginnings(
    sizes: tuple[int, ...], piece_sizes: tuple[int, ...], *, characters_per_piece: int, max_pieces: int, seed: int
) -> list[str]:
    """Return beginnings, in random order, of whole definitions and of pieces of them from a random line on."""
    rng = random.Random(seed)
    heads = set()
    for text in training_definitions():
        lines = text.splitlines()
        heads |= {code_prompt(text, size) for size in sizes}
        for _ in range(min(max_pieces, len(text) // characters_per_piece)):
            start = rng.randrange(len(lines))
            heads.add(code_prompt("\n".join(lines[start:]), rng.choice(piece_sizes)))
    code = sorted(head for head in heads if head)
    rng.shuffle(code)
    return code


def more_math_prompts() -> list[str]:
    """Return more word problems."""
    return [problem.prompt for problem in itertools.islice(iter_problems(5, held_out=False), NUM_MORE_PROBLEMS)]


def head_prompts(first: bool) -> list[str]:
    """Return prompts for the head, code and word problems, that no earlier stage has seen; a first half and a second one.

    On text that the trunk was trained on it is surer than it will be, and leaves a head less to learn.
    """
    known = {*training_prompts(), *more_code_prompts(), *yet_more_code_prompts()}
    beginnings = _code_beginnings((100, 200, 330), (90, 130, 190), characters_per_piece=400, max_pieces=20, seed=8)
    code = [head for head in beginnings if head not in known][: 2 * NUM_HEAD_CODE]
    math = [problem.prompt for problem in itertools.islice(iter_problems(8, held_out=False), 2 * NUM_HEAD_PROBLEMS)]
    half = slice(0, None, 2) if first else slice(1, None, 2)
    return code[half] + math[half]


def drafter_stages() -> dict[str, list[tuple[str, TrainingPlan]]]:
    """Return the stages of each bundled drafter: what it learns from (see `training_data`), and how.

    First continuations and code as it stands, then continuations alone, then many more of them with D-PACE weights. The
    token-conditioned drafter then also learns to continue the context: that is how it learns to calculate (3.5 tokens per round
    of math before, above 9 after). The feature-conditioned one gets two more rounds of mostly code, and then, the trunk held
    fixed, a head that knows the token before.
    """
    both: dict[str, Any] = {"max_length": MAX_LENGTH, "learning_rate": 2e-3}
    features = TrainingPlan(spread_layers(TARGET_LAYERS, 4), num_layers=3, num_epochs=0.9, num_anchors=16, **both)
    tokens = TrainingPlan(None, num_layers=4, num_epochs=1.1, num_anchors=10, **both)
    aligned: dict[str, Any] = {"learning_rate": 1.2e-3, "loss_weights": {"dpace": 1.0}}
    third = replace(features, num_epochs=2.5, num_anchors=24, **aligned)
    head: dict[str, Any] = {"head": "gated", "head_rank": HEAD_RANK, "trained": "head"}
    return {
        "features": [
            ("mixed", features),
            ("continued", replace(features, num_epochs=4.4, learning_rate=1.5e-3)),
            ("everything", third),
            ("code", replace(third, num_epochs=1.5, learning_rate=7e-4, seed=1)),
            ("more code", replace(third, num_epochs=1.9, learning_rate=9e-4, seed=2)),
            ("head", replace(third, num_epochs=HEAD_EPOCHS, learning_rate=3e-3, num_anchors=16, seed=3, **head)),
        ],
        "tokens": [
            ("mixed", tokens),
            ("continued", replace(tokens, num_epochs=4.4, learning_rate=1.5e-3)),
            ("everything", replace(tokens, num_epochs=2.75, num_anchors=16, context_weight=0.5, **aligned)),
        ],
    }


def training_data(pair: Path, work: Path, tokenizer: Any) -> dict[str, Sequences]:
    """Return what the stages learn from, by name; the target continues the prompts where it has not yet.

    The target's own continuations are what a drafter must predict, but a few thousand of them are too little code to learn a
    language from, so code as it stands comes first. The larger part is continued in bfloat16.
    """
    target = AutoModelForCausalLM.from_pretrained(pair / "target", dtype=torch.float32).eval()
    settings: dict[str, Any] = {"max_length": MAX_LENGTH, "batch_size": 128}
    continued = regenerate(target, tokenizer, training_prompts(), work / "sequences", **settings)
    quick = AutoModelForCausalLM.from_pretrained(pair / "target", dtype=torch.bfloat16).eval()
    code = regenerate(quick, tokenizer, more_code_prompts(), work / "code", **settings)
    math = regenerate(quick, tokenizer, more_math_prompts(), work / "math", **settings)
    more_code = regenerate(quick, tokenizer, yet_more_code_prompts(), work / "more-code", **settings)
    head = [
        regenerate(quick, tokenizer, head_prompts(first=True), work / "head", **settings),
        # What is sampled leaves the beaten track, as a text does that is written by sampling.
        regenerate(quick, tokenizer, head_prompts(first=False), work / "head-sampled", **settings, temperature=1.0),
    ]
    raw = sequences_of_texts(tokenizer, list(training_definitions()), MAX_LENGTH)
    return {
        "mixed": Sequences.concatenate([continued, raw]),
        "continued": continued,
        "everything": Sequences.concatenate([continued, code, math]),
        "code": Sequences.concatenate([continued, code]),
        "more code": Sequences.concatenate([continued, code, more_code]),
        "head": Sequences.concatenate(head),
    }


def make_language_model(name: str, num_layers: int, learning_rate: float, corpus_share: float, pair: Path, work: Path) -> None:
    """Train the target or the assistant on the corpus or the first part of it, unless it is there."""
    if (pair / name / "model.safetensors").is_file():
        return
    tokenizer = AutoTokenizer.from_pretrained(pair / "target")
    documents = make_corpus(NUM_CORPUS_PROBLEMS, NUM_CORPUS_CODE_EPOCHS)
    documents = documents[: int(corpus_share * len(documents))]
    dataset = PackedDocuments(documents, tokenizer)
    train_language_model(pair / name, work / name, model_config(num_layers), dataset, learning_rate=learning_rate)


def make_drafters(pair: Path, work: Path) -> None:
    """Train both drafters, unless they are there."""
    tokenizer = AutoTokenizer.from_pretrained(pair / "target")
    target = AutoModelForCausalLM.from_pretrained(pair / "target", dtype=torch.float32).eval()
    data = training_data(pair, work, tokenizer)
    for name, stages in drafter_stages().items():
        if (pair / name / "model.safetensors").is_file():
            continue
        start_from = None
        for number, (kind, plan) in enumerate(stages, 1):
            output = work / f"{name}-{number}"
            # A head learns so fast that the target's passes would be most of the work.
            states = work / "states" if plan.trained == "head" else None
            settings: dict[str, Any] = {"start_from": start_from, "cache_features": states}
            if not fit_drafter(target, data[kind], output, plan, mask_token_id=tokenizer.mask_token_id, **settings):
                raise typer.Exit(130)
            start_from = output
            if name == "features" and number == UNALIGNED_STAGE:
                bundle(AutoModelForCausalLM.from_pretrained(output, dtype=torch.bfloat16), pair / "unaligned")
        bundle(AutoModelForCausalLM.from_pretrained(start_from, dtype=torch.bfloat16), pair / name, NUM_COPIED)


def bundle(drafter: Any, folder: Path, num_copied: int | None = None) -> None:
    """Save a drafter without the code and the card that a Hub repository has: the package around it holds both.

    Args:
        drafter (`SpecDiffDrafter`): in bfloat16.
        folder (`pathlib.Path`): where to.
        num_copied (`int`, *optional*): tokens that its drafts copy from the text by default.
    """
    drafter.config.target_model = BUNDLED_TARGET
    drafter.generation_config.tree_budget = TREE_BUDGET
    drafter.generation_config.prompt_lookup_num_tokens = num_copied
    drafter.save_pretrained(folder)
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name not in ("config.json", "generation_config.json", "model.safetensors"):
            path.unlink()
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    del config["auto_map"]  # which names the code
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def make_pair(output: Path) -> None:
    """Make tokenizer, target, prompts, drafters and assistant.

    Args:
        output (`pathlib.Path`): gets `pair` and `prompts`, laid out as they are bundled, and `work`.
    """
    pair, work, prompts = output / "pair", output / "work", output / "prompts"
    prompts.mkdir(parents=True, exist_ok=True)
    for name, records in held_out_prompts().items():
        (prompts / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    if not (pair / "target" / "tokenizer.json").is_file():
        train_tokenizer(pair / "target")
    make_language_model("target", TARGET_LAYERS, 2e-3, 1.0, pair, work)
    make_drafters(pair, work)
    make_language_model("autoregressive", 2, 4e-3, 0.5, pair, work)


def main(output: Annotated[Path, typer.Argument(help="folder for the pair, the prompts and the work in progress")]) -> None:
    """Make the bundled pair from nothing."""
    make_pair(output)


if __name__ == "__main__":
    typer.run(main)

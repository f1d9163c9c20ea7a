"""Which kernel a mixture of experts should verify drafts with: `python -m benchmarks.experts [OUTPUT.json]`.

On a GPU the host's plain decoding has its experts computed in one batched product (`batched_mm`), which copies the weights of
each token's experts; for prompts it groups the products by expert (`grouped_mm`). A pass over a draft has more tokens than the
one and fewer than the other. This measures passes of a small random model over 1, 8, 16 and 33 tokens with each kernel, in
turn, and takes the least of each.
"""

import time
from pathlib import Path
from typing import Annotated
from typing import Any

import torch
import typer
from transformers import DynamicCache
from transformers import Qwen3MoeConfig
from transformers import Qwen3MoeForCausalLM

from hf_specdiff.benchmarks.clocks import wait
from hf_specdiff.benchmarks.methods import Models
from hf_specdiff.benchmarks.standard import conditions_of
from hf_specdiff.benchmarks.standard import write_record
from hf_specdiff.benchmarks.tables import markdown
from hf_specdiff.benchmarks.tables import setting

KERNELS = ("eager", "grouped_mm", "batched_mm")
WIDTHS = (1, 8, 16, 33)
CONTEXT_LENGTH = 64


def make_target(device: torch.device) -> Qwen3MoeForCausalLM:
    """Return a random model of 32 experts, 4 for each token; in bfloat16 on a GPU."""
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=512,
        hidden_size=256,
        intermediate_size=512,
        moe_intermediate_size=256,
        num_experts=32,
        num_experts_per_tok=4,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
    )
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    return Qwen3MoeForCausalLM(config).eval().to(device=device, dtype=dtype)


@torch.no_grad()
def measure(target: Any, widths: tuple[int, ...] = WIDTHS, num_passes: int = 20) -> list[dict[str, Any]]:
    """Time passes with each kernel.

    Args:
        target (`transformers.PreTrainedModel`): with experts; its kernel is the same afterwards, whatever happens.
        widths (`tuple[int, ...]`): tokens of a pass.
        num_passes (`int`): of each width and kernel, after one that does not count.

    Returns:
        `list[dict]`: a row for each width and kernel, with the least seconds of a pass.
    """
    ids = torch.arange(CONTEXT_LENGTH + max(widths), device=target.device)[None] % target.config.vocab_size
    cache = DynamicCache(config=target.config)
    target(ids[:, :CONTEXT_LENGTH], past_key_values=cache)
    least: dict[tuple[int, str], float] = {}
    usual = target.get_experts_implementation()
    try:
        for number in range(num_passes + 1):
            for width in widths:
                for kernel in KERNELS:
                    target.set_experts_implementation(kernel)
                    wait(target.device)
                    start = time.perf_counter()
                    target(ids[:, CONTEXT_LENGTH : CONTEXT_LENGTH + width], past_key_values=cache)
                    wait(target.device)
                    seconds = time.perf_counter() - start
                    cache.crop(-width)
                    if number > 0:
                        least[width, kernel] = min(seconds, least.get((width, kernel), seconds))
    finally:
        target.set_experts_implementation(usual)
    return [{"width": width, "kernel": kernel, "seconds": seconds} for (width, kernel), seconds in least.items()]


def experts_section(record: dict[str, Any]) -> str:
    """Return the documentation's section on a record of `main`: a line for each width, a column for each kernel."""
    conditions, rows = record["conditions"], record["rows"]
    found = {(row["width"], row["kernel"]): row["seconds"] for row in rows}
    cells = [
        [str(width), *(f"{1e3 * found[width, kernel]:.1f} ms" for kernel in KERNELS)]
        for width in dict.fromkeys(row["width"] for row in rows)
    ]
    lines = [
        f"A random model of 32 experts, 4 for each token, {setting(conditions)}. Written by",
        f"`{conditions['command']}` ([`experts.json`](../benchmarks/results/experts.json)).",
        "",
        markdown(["tokens of a pass", *(f"`{kernel}`" for kernel in KERNELS)], cells),
    ]
    return "\n".join(lines)


def main(
    output: Annotated[Path | None, typer.Argument(help="JSON file for the figures")] = None,
    num_passes: Annotated[int, typer.Option(min=1, help="of each width and kernel")] = 20,
) -> None:
    """Measure on the GPU if there is one, else on the CPU."""
    target = make_target(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    rows = measure(target, num_passes=num_passes)
    for row in rows:
        typer.echo(f"{row['width']:3} tokens  {row['kernel']:10}  {1e3 * row['seconds']:.2f} ms")
    if output is not None:
        command = f"python -m benchmarks.experts OUTPUT.json --num-passes {num_passes}"
        write_record(output, {"conditions": conditions_of(Models(target, None, {}), command), "rows": rows})


if __name__ == "__main__":
    typer.run(main)

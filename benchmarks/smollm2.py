"""A real model on real prompts: `python -m benchmarks.smollm2 OUTPUT.json TARGET DRAFTER --work FOLDER`.

GSM8K, HumanEval, MBPP and each category of Spec-Bench, greedily and in part at temperature 0.7, and what an untrained drafter
costs. All methods take turns on each prompt, and the sets take turns too: when the time is over, each has had its share of its
prompts. OUTPUT.json is written after every prompt; an interrupted run goes on from FOLDER.
"""

import time
from collections.abc import Callable
from collections.abc import Iterator
from dataclasses import asdict
from dataclasses import dataclass
from dataclasses import replace
from pathlib import Path
from typing import Annotated
from typing import Any

import transformers
import typer

from hf_specdiff.benchmarks.data_sets import Questions
from hf_specdiff.benchmarks.data_sets import read_questions
from hf_specdiff.benchmarks.figures import rows_of
from hf_specdiff.benchmarks.journal import Journal
from hf_specdiff.benchmarks.methods import LOOKUP_TOKENS
from hf_specdiff.benchmarks.methods import PLAIN
from hf_specdiff.benchmarks.methods import Method
from hf_specdiff.benchmarks.methods import Models
from hf_specdiff.benchmarks.methods import ours
from hf_specdiff.benchmarks.runner import CALL
from hf_specdiff.benchmarks.runner import Block
from hf_specdiff.benchmarks.runner import run_step
from hf_specdiff.benchmarks.runner import warm_up
from hf_specdiff.benchmarks.standard import PROFILES
from hf_specdiff.benchmarks.standard import claim_of
from hf_specdiff.benchmarks.standard import conditions_of
from hf_specdiff.benchmarks.standard import write_record
from hf_specdiff.commands.loading import load_drafter
from hf_specdiff.commands.loading import load_model
from hf_specdiff.commands.loading import load_tokenizer
from hf_specdiff.core.profiling import isolated_profiles
from hf_specdiff.training.first_weights import new_drafter
from hf_specdiff.training.prompts import as_turns

DRAFTER, UNTRAINED = "drafter", "untrained"
MATHS, SPEC_BENCH = "gsm8k", "spec-bench"
SETS = (MATHS, "humaneval", "mbpp")
SAMPLED = 0.7
SHORT = 40
# Tokens of a warm-up: every kind of pass has run, and what passes cost here is known.
WARM_TOKENS = 8
GREEDY_METHODS = [
    Method(PLAIN, {}),
    ours(DRAFTER, "default"),
    ours(DRAFTER, "chain", draft_shape="chain"),
    ours(DRAFTER, "tree of 15", draft_shape="tree", tree_budget=15),
    ours(DRAFTER, "default with copies", prompt_lookup_num_tokens=LOOKUP_TOKENS),
    Method("transformers, prompt lookup", {"prompt_lookup_num_tokens": LOOKUP_TOKENS}),
]
SAMPLED_METHODS = GREEDY_METHODS[:2]
UNTRAINED_METHODS = [GREEDY_METHODS[0], ours(UNTRAINED, "default")]


@dataclass(frozen=True, slots=True)
class Size:
    """How many prompts, at most.

    Attributes:
        num_prompts (`int`): of GSM8K, HumanEval and MBPP each.
        num_category_prompts (`int`): of each category of Spec-Bench.
        num_sampled (`int`): of GSM8K at temperature 0.7; of each category of Spec-Bench half of it.
        num_untrained (`int`): with the untrained drafter, at each temperature.
        max_new_tokens (`int`): the length limit; with the untrained drafter 40.
    """

    num_prompts: int = 8
    num_category_prompts: int = 3
    num_sampled: int = 4
    num_untrained: int = 4
    max_new_tokens: int = 128


USUAL = Size()


def read_sets(tokenizer: Any, data: Path | None, size: Size) -> dict[str, Questions]:
    """Return all prompts by task, in the chat template where there is one.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): the target's.
        data (`pathlib.Path`, *optional*): see `read_questions`.
        size (`Size`): how many.

    Returns:
        `dict[str, Questions]`: the sets, then Spec-Bench's categories.
    """
    most = max(size.num_prompts, size.num_sampled, size.num_untrained)
    found = {task: one for name in SETS for task, one in read_questions(name, most, data).items()}
    found |= read_questions(SPEC_BENCH, max(size.num_category_prompts, size.num_sampled // 2), data)
    return {task: replace(one, prompts=as_turns(one.prompts, tokenizer)) for task, one in found.items()}


def blocks_of(sets: dict[str, Questions], size: Size, seed: int) -> list[Block]:
    """Return what is compared with what.

    Args:
        sets (`dict[str, Questions]`): of `read_sets`.
        size (`Size`): how many prompts.
        seed (`int`): of sampling.

    Returns:
        `list[Block]`: all greedy ones first, then those at temperature 0.7, then those of the untrained drafter.
    """

    def block(name: str, task: str, count: int, methods: list[Method], most: int, heat: float) -> Block:
        questions = sets[task]
        answers = None if questions.answers is None else questions.answers[:count]
        return Block(name, questions.prompts[:count], methods, most, heat, seed=seed, num_detailed=0, answers=answers)

    long = size.max_new_tokens
    counts = {task: size.num_prompts if task in SETS else size.num_category_prompts for task in sets}
    blocks = [block(task, task, count, GREEDY_METHODS, long, 0.0) for task, count in counts.items()]
    counts = {task: size.num_sampled if task == MATHS else size.num_sampled // 2 for task in sets if task not in SETS[1:]}
    blocks += [block(task, task, count, SAMPLED_METHODS, long, SAMPLED) for task, count in counts.items()]
    name = f"{MATHS}, {SHORT} tokens"
    blocks += [block(name, MATHS, size.num_untrained, UNTRAINED_METHODS, SHORT, heat) for heat in (0.0, 1.0)]
    return [one for one in blocks if one.texts]


def turns(blocks: list[Block]) -> Iterator[tuple[Block, int]]:
    """Yield each block with the numbers of its prompts, so that at any time all have had about the same share of theirs."""
    shares = [
        ((number + 0.5) / len(block.texts), index, number)
        for index, block in enumerate(blocks)
        for number in range(len(block.texts))
    ]
    for _, index, number in sorted(shares):
        yield blocks[index], number


def measure(
    models: Models,
    blocks: list[Block],
    journal: Journal,
    seconds: float,
    on_step: Callable[[], None],
    clock: Callable[[], float] = time.monotonic,
) -> bool:
    """Run prompts through their methods until the time is over.

    A prompt is begun only if one as long as the longest of its block so far would be finished in time.

    Args:
        models (`Models`): who decodes.
        blocks (`list[Block]`): what is compared.
        journal (`Journal`): what it holds already is not run again.
        seconds (`float`): the time, from this call on.
        on_step (`Callable`): called after each prompt.
        clock (`Callable[[], float]`): tells the seconds.

    Returns:
        `bool`: whether all prompts were run.
    """
    start = clock()
    batches = {block.name: block.batches(models) for block in blocks}
    longest = dict.fromkeys(batches, 0.0)
    warm: set[tuple[str, ...]] = set()
    is_whole = True
    for block, number in turns(blocks):
        if journal.select(kind=CALL, block=block.name, batch=number):
            continue
        began = clock()
        if began + longest[block.name] > start + seconds:
            is_whole = False
            continue
        inputs = batches[block.name][number]
        kind = (*(method.name for method in block.methods), "sampled" if block.temperature else "greedy")
        if kind not in warm:
            warm_up(models, replace(block, max_new_tokens=WARM_TOKENS), journal, inputs)
            warm.add(kind)
            began = clock()
        run_step(models, block, journal, CALL, number, inputs)
        longest[block.name] = max(longest[block.name], clock() - began)
        on_step()
    return is_whole


def rows_so_far(blocks: list[Block], models: Models, journal: Journal) -> list[dict[str, Any]]:
    """Return the figures of all blocks that have some.

    Args:
        blocks (`list[Block]`): what is compared.
        models (`Models`): who decodes.
        journal (`Journal`): with the notes so far.

    Returns:
        `list[dict]`: as `rows_of`, each with its `max_new_tokens`.
    """
    begun = [block for block in blocks if journal.select(kind=CALL, block=block.name)]
    return [{**row, "max_new_tokens": block.max_new_tokens} for block in begun for row in rows_of(block, models, journal)]


def main(
    output: Annotated[Path, typer.Argument(help="JSON file of the figures")],
    target: Annotated[str, typer.Argument(help="SmolLM2-135M-Instruct: a folder or its name on the Hub")],
    drafter: Annotated[str, typer.Argument(help="its drafter: a folder or a Hub repository")],
    work: Annotated[Path, typer.Option(help="folder of the run; the same command goes on")],
    data: Annotated[Path | None, typer.Option(help="a folder of the sets as NAME*.jsonl; by default the Hub")] = None,
    minutes: Annotated[float, typer.Option(min=0, help="after which no prompt is begun that would not be finished")] = 22.0,
    num_prompts: Annotated[int, typer.Option(min=1, help="of GSM8K, HumanEval and MBPP each")] = USUAL.num_prompts,
    num_category_prompts: Annotated[
        int, typer.Option(min=1, help="of each category of Spec-Bench")
    ] = USUAL.num_category_prompts,
    num_sampled: Annotated[int, typer.Option(min=0, help="at temperature 0.7; of a category half of it")] = USUAL.num_sampled,
    num_untrained: Annotated[int, typer.Option(min=0, help="with the untrained drafter")] = USUAL.num_untrained,
    max_new_tokens: Annotated[int, typer.Option(min=2)] = USUAL.max_new_tokens,
    seed: Annotated[int, typer.Option(help="of sampling")] = 0,
) -> None:
    """Measure the published drafter for SmolLM2-135M-Instruct on held-out prompts."""
    start = time.monotonic()
    size = Size(num_prompts, num_category_prompts, num_sampled, num_untrained, max_new_tokens)
    transformers.logging.set_verbosity_error()
    tokenizer = load_tokenizer("target", target)
    sets = read_sets(tokenizer, data, size)
    where = {"dtype": "float32", "device_map": "auto"}
    model = load_model("target", target, **where)
    trained = load_drafter(drafter, model, **where)
    untrained = new_drafter(trained.config, 0, model).eval().to(model.device)
    models = Models(model, tokenizer, {DRAFTER: trained, UNTRAINED: untrained})
    blocks = blocks_of(sets, size, seed)
    names = {"target": target, "drafter": drafter}
    journal = Journal(work, {**claim_of(models, names), **asdict(size), "seed": seed})
    command = "python -m benchmarks.smollm2 OUTPUT.json TARGET DRAFTER --work FOLDER"
    command += f" --num-prompts {num_prompts} --num-category-prompts {num_category_prompts} --num-sampled {num_sampled}"
    command += f" --num-untrained {num_untrained} --max-new-tokens {max_new_tokens} --minutes {minutes:g}"
    known = trained.config.target_model or target
    conditions = conditions_of(models, command) | {
        "target": Path(known).name if Path(known).exists() else known,  # no folder of this machine
        "target_parameters": model.num_parameters(),
        "drafter_parameters": trained.num_parameters(),
    }
    done = 0
    total = sum(len(block.texts) for block in blocks)

    def write() -> None:
        write_record(output, {"conditions": conditions, "rows": rows_so_far(blocks, models, journal)})

    def tell() -> None:
        nonlocal done
        done += 1
        write()
        elapsed = time.monotonic() - start
        typer.echo(f"{elapsed / 60:.1f} min, {done} prompts of {total}", err=True)

    with isolated_profiles(work / PROFILES):
        is_whole = measure(models, blocks, journal, 60 * minutes - (time.monotonic() - start), tell)
    write()
    typer.echo(f"The figures are in {output}." + ("" if is_whole else " The time was over; the same command goes on."))


if __name__ == "__main__":
    typer.run(main)

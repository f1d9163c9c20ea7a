"""Methods side by side: the same prompts through all of them, in one process and in turn: a drifting machine hits all alike.

Knows how to time a call and what to note of it. Makes no figures of the notes.
"""

import time
from collections.abc import Callable
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict
from dataclasses import dataclass
from typing import Any

import torch

from hf_specdiff.benchmarks.clocks import PassClock
from hf_specdiff.benchmarks.clocks import PeakMemory
from hf_specdiff.benchmarks.clocks import Recording
from hf_specdiff.benchmarks.clocks import wait
from hf_specdiff.benchmarks.journal import Journal
from hf_specdiff.benchmarks.methods import PLAIN
from hf_specdiff.benchmarks.methods import Method
from hf_specdiff.benchmarks.methods import Models

# Kinds of a journal's records.
CALL, DETAIL, REFUSAL = "call", "detail", "refusal"


@dataclass(frozen=True, slots=True)
class Block:
    """Prompts and methods that are compared with each other.

    Attributes:
        task (`str`): the prompts' name.
        texts (`list[str]`): the prompts.
        methods (`list[Method]`): plain `generate` first.
        max_new_tokens (`int`): the length limit.
        temperature (`float`): 0 for greedy.
        batch_size (`int`): prompts decoded together.
        seed (`int`): of sampling; each batch has a seed of its own, the same for every method.
        num_detailed (`int`): batches that are decoded once more with clocks in the models.
    """

    task: str
    texts: list[str]
    methods: list[Method]
    max_new_tokens: int
    temperature: float = 0.0
    batch_size: int = 1
    seed: int = 0
    num_detailed: int = 3

    @property
    def name(self) -> str:
        """What tells it from the others of a run."""
        return f"{self.task}, temperature {self.temperature:g}, batch {self.batch_size}"

    @property
    def num_batches(self) -> int:
        """Batches of prompts."""
        return -(-len(self.texts) // self.batch_size)

    @property
    def num_steps(self) -> int:
        """Batches to decode in all, detailed ones included."""
        return self.num_batches + min(self.num_detailed, self.num_batches)

    @property
    def settings(self) -> dict[str, Any]:
        """The arguments of `generate` that all methods share."""
        sampling = {"do_sample": True, "temperature": self.temperature, "top_k": 0, "top_p": 1.0}
        return {"max_new_tokens": self.max_new_tokens, **(sampling if self.temperature else {"do_sample": False})}

    def batches(self, models: Models) -> list[dict[str, torch.Tensor]]:
        """Return ids and masks, padded on the left."""
        groups = [self.texts[i : i + self.batch_size] for i in range(0, len(self.texts), self.batch_size)]
        encode = models.tokenizer
        return [
            dict(encode(group, return_tensors="pt", padding=self.batch_size > 1, return_token_type_ids=False).to(models.device))
            for group in groups
        ]


@dataclass(slots=True)
class Call:
    """What one method did with one batch.

    Attributes:
        block (`str`): the block's name.
        method (`str`): the method's.
        batch (`int`): the batch's number.
        seconds (`float`): wall-clock time.
        num_tokens (`int`): tokens written, padding left out.
        num_prompts (`int`): prompts of the batch.
        num_identical (`int`): greedy outputs equal to plain `generate`'s; 0 when sampling.
        rounds (`list[int]`): tokens that each target pass after the prefill added to a row; in transformers' assisted loops the
            pass over the prompt is a round too. Empty for plain decoding and for what does not tell.
        drafted (`list[int]`): for our loop, tokens or nodes that each of the rounds verified.
        depths (`list[int]`): for our loop, how far ahead each draft reached.
        shape_and_rule (`list[str]`): for our loop, what ran.
    """

    block: str
    method: str
    batch: int
    seconds: float
    num_tokens: int
    num_prompts: int
    num_identical: int
    rounds: list[int]
    drafted: list[int]
    depths: list[int]
    shape_and_rule: list[str]


@dataclass(slots=True)
class Detail:
    """Where the time of one call goes, measured with clocks in the models.

    Attributes:
        block (`str`): the block's name.
        method (`str`): the method's.
        batch (`int`): the batch's number.
        seconds (`float`): the whole call.
        prefill_seconds (`float`): the target's first pass.
        target_seconds (`float`): its other passes.
        drafter_seconds (`float`): the drafter's passes, with the embedding and the head that it borrows.
        rest_seconds (`float`): everything between: of our loop what it does, of the host's loops all of the call.
        num_rounds (`int`): target passes after the first.
        num_tokens (`int`): tokens written, padding left out.
        first_token_seconds (`float`, *optional*): to the first token; not known of batches.
        peak_bytes (`int`, *optional*): the most memory taken; not known where nobody counts.
    """

    block: str
    method: str
    batch: int
    seconds: float
    prefill_seconds: float
    target_seconds: float
    drafter_seconds: float
    rest_seconds: float
    num_rounds: int
    num_tokens: int
    first_token_seconds: float | None
    peak_bytes: int | None


def run_block(models: Models, block: Block, journal: Journal, on_batch: Callable[[], None] = lambda: None) -> None:
    """Run a block's prompts through its methods, in turn; what the journal holds already is not run again.

    A method that cannot run is noted with the reason and left out.

    Args:
        models (`Models`): who decodes.
        block (`Block`): what is compared.
        journal (`Journal`): gets a record for each method and batch.
        on_batch (`Callable`): called after each batch.
    """
    batches = block.batches(models)
    methods: list[Method] | None = None
    steps = [(CALL, number) for number in range(len(batches))]
    steps += [(DETAIL, number) for number in range(block.num_steps - len(batches))]
    for kind, number in steps:
        if not journal.select(kind=kind, block=block.name, batch=number):
            if methods is None:
                methods = _warm_up(models, block, batches[0], journal)
            observe = _calls if kind == CALL else _details
            journal.append({"kind": kind, **asdict(seen)} for seen in observe(models, block, methods, number, batches[number]))
        on_batch()


def _warm_up(models: Models, block: Block, inputs: Mapping[str, Any], journal: Journal) -> list[Method]:
    """Return the methods that run; the first call of each allocates, selects kernels and measures what "auto" needs."""
    able = []
    for method in block.methods:
        try:
            method.decode(models, inputs, **block.settings)
            able.append(method)
        except Exception as error:  # whatever a loop of the host's raises, the others can still be compared
            if method.name == PLAIN:
                raise
            if not journal.select(kind=REFUSAL, block=block.name, method=method.name):
                reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
                journal.append([{"kind": REFUSAL, "block": block.name, "method": method.name, "reason": reason}])
    return able


def _calls(models: Models, block: Block, methods: list[Method], number: int, inputs: Mapping[str, Any]) -> list[Call]:
    """Time every method on one batch."""
    calls = []
    expected: torch.Tensor | None = None
    for method in methods:
        # The host's loops tell only a streamer how many tokens came at a time.
        is_silent = method.is_ours or method.name == PLAIN or block.batch_size > 1
        recording = None if is_silent else Recording()
        torch.manual_seed(block.seed + number)
        wait(models.device)
        start = time.perf_counter()
        output = method.decode(models, inputs, **block.settings, streamer=recording, return_dict_in_generate=True)
        wait(models.device)
        seconds = time.perf_counter() - start
        expected = output.sequences if expected is None else expected
        stats = getattr(output, "speculation", None)
        rounds = [] if recording is None else recording.sizes
        if stats is not None:
            rounds = [accepted + 1 for row in stats.num_accepted for accepted in row]
        calls.append(
            Call(
                block=block.name,
                method=method.name,
                batch=number,
                seconds=seconds,
                num_tokens=_num_new_tokens(output.sequences, inputs, models),
                num_prompts=len(output.sequences),
                num_identical=0 if block.temperature else count_identical(output.sequences, expected),
                rounds=rounds,
                drafted=[] if stats is None else [count for row in stats.num_drafted for count in row],
                depths=[] if stats is None else [depth for row in stats.draft_depths or stats.num_drafted for depth in row],
                shape_and_rule=[] if stats is None else [stats.draft_shape, stats.acceptance],
            )
        )
    return calls


def _details(models: Models, block: Block, methods: list[Method], number: int, inputs: Mapping[str, Any]) -> list[Detail]:
    """Look into every method's call on one batch."""
    details = []
    lent = [models.target.get_input_embeddings(), models.target.get_output_embeddings()]
    for method in methods:
        assistants = [] if method.assistant is None else [(models.drafters | models.assistants)[method.assistant]]
        target_clock = PassClock([models.target], models.device)
        clock = PassClock([models.target, *assistants, *(lent if assistants else [])], models.device)
        memory = PeakMemory(models.device)
        torch.manual_seed(block.seed + number)
        with ExitStack() as stack:
            for context in (memory, target_clock, clock):
                stack.enter_context(context)
            recording = Recording() if block.batch_size == 1 else None
            wait(models.device)
            start = time.perf_counter()
            output = method.decode(models, inputs, **block.settings, streamer=recording, return_dict_in_generate=True)
            wait(models.device)
            seconds = time.perf_counter() - start
        prefill, *target_passes = target_clock.passes
        in_passes = sum(clock.passes)
        stats = getattr(output, "speculation", None)
        details.append(
            Detail(
                block=block.name,
                method=method.name,
                batch=number,
                seconds=seconds,
                prefill_seconds=prefill,
                target_seconds=sum(target_passes),
                drafter_seconds=in_passes - prefill - sum(target_passes),
                rest_seconds=(seconds if stats is None else stats.total_seconds) - in_passes,
                num_rounds=len(target_passes),
                num_tokens=_num_new_tokens(output.sequences, inputs, models),
                first_token_seconds=None if recording is None else recording.pieces[1][0],
                peak_bytes=memory.num_bytes,
            )
        )
    return details


def _num_new_tokens(sequences: torch.Tensor, inputs: Mapping[str, Any], models: Models) -> int:
    """Return how many tokens were written: those of a row end with its first end-of-text token, padding follows."""
    new_tokens = sequences[:, inputs["input_ids"].shape[1] :]
    ends = models.target.generation_config.eos_token_id
    is_end = torch.isin(new_tokens, new_tokens.new_tensor([] if ends is None else ends))
    return int(((is_end.cumsum(dim=1) - is_end.long()) == 0).sum())


def count_identical(sequences: torch.Tensor, expected: torch.Tensor) -> int:
    """Return how many rows are the same, also where one of the two has been written further."""
    width = max(sequences.shape[1], expected.shape[1])
    one, other = (torch.nn.functional.pad(ids, (0, width - ids.shape[1]), value=-1) for ids in (sequences, expected))
    return int((one == other).all(dim=1).sum())

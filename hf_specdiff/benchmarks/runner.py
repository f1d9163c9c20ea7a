"""Methods side by side: the same prompts through all of them, in one process and in turn: a drifting machine hits all alike.

Knows how to time a call and what to note of it. Makes no figures of the notes.
"""

import time
from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import asdict
from dataclasses import dataclass
from dataclasses import replace
from typing import Any

import torch

from hf_specdiff.benchmarks.answers import is_right
from hf_specdiff.benchmarks.clocks import PassClock
from hf_specdiff.benchmarks.clocks import PeakMemory
from hf_specdiff.benchmarks.clocks import Recording
from hf_specdiff.benchmarks.clocks import wait
from hf_specdiff.benchmarks.journal import Journal
from hf_specdiff.benchmarks.methods import PLAIN
from hf_specdiff.benchmarks.methods import Method
from hf_specdiff.benchmarks.methods import Models
from hf_specdiff.benchmarks.near_ties import count_near_ties
from hf_specdiff.benchmarks.prefixes import accepted_along
from hf_specdiff.core.own_drafter import is_own_drafter
from hf_specdiff.core.stats import SpeculationStats
from hf_specdiff.training.prompts import Prompt
from hf_specdiff.training.prompts import encode

# Kinds of a journal's records.
WARM_UP, CALL, DETAIL, ALONG, REFUSAL = "warm-up", "call", "detail", "along", "refusal"


@dataclass(frozen=True, slots=True)
class Block:
    """Prompts and methods that are compared with each other.

    Attributes:
        task (`str`): the prompts' name.
        texts (`Sequence`): the prompts, texts or chats.
        methods (`list[Method]`): plain `generate` first.
        max_new_tokens (`int`): the length limit.
        temperature (`float`): 0 for greedy.
        batch_size (`int`): prompts decoded together.
        seed (`int`): of sampling; each batch has a seed of its own, the same for every method.
        num_detailed (`int`): batches that are decoded once more with clocks in the models.
        answers (`list[str]`, *optional*): the number that is right for each prompt, where there is one.
    """

    task: str
    texts: Sequence[Prompt]
    methods: list[Method]
    max_new_tokens: int
    temperature: float = 0.0
    batch_size: int = 1
    seed: int = 0
    num_detailed: int = 2
    answers: list[str] | None = None

    @property
    def name(self) -> str:
        """What tells it from the others of a run."""
        return f"{self.task}, temperature {self.temperature}, batch {self.batch_size}"

    @property
    def num_batches(self) -> int:
        """Batches of prompts."""
        return -(-len(self.texts) // self.batch_size)

    @property
    def steps(self) -> list[tuple[str, int]]:
        """What is done in turn: kinds of records, and numbers of batches."""
        detailed = min(self.num_detailed, self.num_batches)
        # Of sampled texts one by one, what is expected is computed too.
        along = self.num_batches if self.temperature and self.batch_size == 1 else 0
        counts = ((CALL, self.num_batches), (DETAIL, detailed), (ALONG, along))
        return [(kind, number) for kind, count in counts for number in range(count)]

    @property
    def settings(self) -> dict[str, Any]:
        """The arguments of `generate` that all methods share."""
        sampling = {"do_sample": True, "temperature": self.temperature, "top_k": 0, "top_p": 1.0}
        return {"max_new_tokens": self.max_new_tokens, **(sampling if self.temperature else {"do_sample": False})}

    def batches(self, models: Models) -> list[dict[str, torch.Tensor]]:
        """Return ids and masks, padded on the left."""
        tokenizer = models.tokenizer
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token  # padding is masked, so any id serves
        ids = [encode(tokenizer, text) for text in self.texts]
        groups = [ids[i : i + self.batch_size] for i in range(0, len(ids), self.batch_size)]
        padded = [tokenizer.pad({"input_ids": group}, padding_side="left", return_tensors="pt") for group in groups]
        return [{name: batch[name].to(models.device) for name in ("input_ids", "attention_mask")} for batch in padded]

    def answers_of(self, number: int) -> list[str]:
        """Return the right answers of a batch; none where none are known."""
        return (self.answers or [])[number * self.batch_size : (number + 1) * self.batch_size]


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
        rounds (`list[int]`): tokens that each target pass but the first added to a row. Empty for plain decoding and for what
            does not tell.
        drafted (`list[int]`): for our loop, tokens or nodes that each of the rounds verified.
        depths (`list[int]`): for our loop, how far ahead each draft reached.
        shape_and_rule (`list[str]`): for our loop, what ran.
        num_right (`int`, *optional*): answers that end in the right number, where that is known.
        num_near_ties (`int`): greedy outputs that first differ from plain `generate`'s where rounding decides.
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
    num_right: int | None = None
    num_near_ties: int = 0


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
        drafter_seconds (`float`): the drafter's passes, with the embedding and the head that it borrows; of a drafter of the
            user's own, its calls of `draft`.
        rest_seconds (`float`): everything else, from the call to its return.
        loop_seconds (`float`, *optional*): of our loop, without what prepares the call and its output.
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
    loop_seconds: float | None
    num_rounds: int
    num_tokens: int
    first_token_seconds: float | None
    peak_bytes: int | None


@dataclass(slots=True)
class Along:
    """What one method's drafts are expected to bring along one text; see `prefixes`.

    Attributes:
        block (`str`): the block's name.
        method (`str`): the method's.
        batch (`int`): the batch's number.
        expected (`list[float]`): for each place of the text, the tokens of the draft that the target is expected to accept.
        drafted (`list[int]`): for each place, drafted tokens.
    """

    block: str
    method: str
    batch: int
    expected: list[float]
    drafted: list[int]


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
    is_warm = False
    for kind, number in block.steps:
        if kind == DETAIL and models.is_spread:
            continue
        if not journal.select(kind=kind, block=block.name, batch=number):
            if not is_warm:
                # The longest prompt: what is compiled for a static cache of its length serves the others too.
                warm_up(models, block, journal, max(batches, key=lambda batch: batch["input_ids"].shape[1]))
                is_warm = True
            run_step(models, block, journal, kind, number, batches[number])
        on_batch()


def warm_up(models: Models, block: Block, journal: Journal, inputs: Mapping[str, Any]) -> None:
    """Let every method decode a batch, and forget what came of it; arguments as `run_block`.

    Of compiled ones it is noted how long that took. They decode it twice, since some things are compiled when seen again.
    """

    def observe(method: Method) -> float:
        seconds = _run(models, block, method, -1, inputs).seconds
        if method.is_compiled:
            _run(models, block, method, -1, inputs)
        return seconds

    seen = _each(models, block, journal, observe)
    compiled = [method.name for method in block.methods if method.is_compiled and method.name in seen]
    if compiled and not journal.select(kind=WARM_UP, block=block.name):  # those of an interrupted run were the first
        noted = {"kind": WARM_UP, "block": block.name}
        journal.append({**noted, "method": name, "seconds": seen[name]} for name in compiled)


def run_step(models: Models, block: Block, journal: Journal, kind: str, number: int, inputs: Mapping[str, Any]) -> None:
    """Run one batch through a block's methods, and note what came of it.

    Args:
        models (`Models`): who decodes.
        block (`Block`): what is compared.
        journal (`Journal`): gets a record for each method.
        kind (`str`): `CALL`, `DETAIL` or `ALONG`.
        number (`int`): the batch's.
        inputs (`Mapping`): the batch, of `Block.batches`.
    """
    observers: dict[str, Callable[..., list[Any]]] = {CALL: _calls, DETAIL: _details, ALONG: _along}
    observe = observers[kind]
    journal.append({"kind": kind, **asdict(seen)} for seen in observe(models, block, journal, number, inputs))


def _each(models: Models, block: Block, journal: Journal, observe: Callable[[Method], Any], number: int = 0) -> dict[str, Any]:
    """Do something with each of the methods that run, in an order that changes with the batch, and return what came of it.

    A method that raises is noted with the reason, and is out of this block from then on.
    """
    refused = {record["method"] for record in journal.select(kind=REFUSAL, block=block.name)}
    able = [method for method in block.methods if method.name not in refused]
    seen = {}
    # Whoever comes after a heavy method finds the machine in another state, so the turns go round.
    for method in able[number % len(able) :] + able[: number % len(able)]:
        try:
            seen[method.name] = observe(method)
        except Exception as error:  # whatever a loop raises, the others can still be compared
            if method.name == PLAIN:
                raise
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            journal.append([{"kind": REFUSAL, "block": block.name, "method": method.name, "reason": reason}])
    return seen


@dataclass(slots=True)
class _Run:
    """One call's output and what it took."""

    sequences: torch.Tensor
    stats: SpeculationStats | None
    recording: Recording | None
    seconds: float


def _run(
    models: Models, block: Block, method: Method, number: int, inputs: Mapping[str, Any], recording: Recording | None = None
) -> _Run:
    """Decode a batch; each has a seed of its own, the same for all methods."""
    torch.manual_seed(block.seed + number)
    wait(models.device)
    start = time.perf_counter()
    output = method.decode(models, inputs, **block.settings, streamer=recording, return_dict_in_generate=True)
    wait(models.device)
    return _Run(output.sequences, getattr(output, "speculation", None), recording, time.perf_counter() - start)


def _calls(models: Models, block: Block, journal: Journal, number: int, inputs: Mapping[str, Any]) -> list[Call]:
    """Time every method on one batch."""
    is_single = len(inputs["input_ids"]) == 1

    def observe(method: Method) -> _Run:
        # Others' loops tell only a streamer how many tokens came at a time.
        is_silent = method.is_ours or method.name == PLAIN or not is_single
        return _run(models, block, method, number, inputs, None if is_silent else Recording())

    runs = _each(models, block, journal, observe, number)
    return [_call(models, block, name, number, inputs, run, runs[PLAIN].sequences) for name, run in runs.items()]


def _call(
    models: Models, block: Block, name: str, number: int, inputs: Mapping[str, Any], run: _Run, expected: torch.Tensor
) -> Call:
    """Return what is worth noting of a call."""
    stats = run.stats
    # The first piece is that of the pass over the prompt, with which some loops check a first draft already.
    rounds = [] if run.recording is None else run.recording.sizes[1:]
    if stats is not None:
        rounds = [accepted + 1 for row in stats.num_accepted for accepted in row]
    is_compared = not block.temperature and name != PLAIN
    return Call(
        block=block.name,
        method=name,
        batch=number,
        seconds=run.seconds,
        num_tokens=_num_new_tokens(run.sequences, inputs, models),
        num_prompts=len(run.sequences),
        num_identical=0 if block.temperature else count_identical(run.sequences, expected),
        rounds=rounds,
        drafted=[] if stats is None else [count for row in stats.num_drafted for count in row],
        depths=[] if stats is None else [depth for row in stats.draft_depths or stats.num_drafted for depth in row],
        shape_and_rule=[] if stats is None else [stats.draft_shape, stats.acceptance],
        num_near_ties=count_near_ties(models.target, inputs["attention_mask"], run.sequences, expected) if is_compared else 0,
        num_right=_num_right(block, number, run.sequences[:, inputs["input_ids"].shape[1] :], models),
    )


def _num_right(block: Block, number: int, new_tokens: torch.Tensor, models: Models) -> int | None:
    """Return how many answers of a batch end in the right number; `None` where none is known."""
    if block.answers is None:
        return None
    written = models.tokenizer.batch_decode(new_tokens, skip_special_tokens=True)
    return sum(is_right(text, answer) for text, answer in zip(written, block.answers_of(number), strict=True))


def _details(models: Models, block: Block, journal: Journal, number: int, inputs: Mapping[str, Any]) -> list[Detail]:
    """Look into every method's call on one batch, compiled ones left out: clocks in a model would have it compiled anew."""
    eager = replace(block, methods=[method for method in block.methods if not method.is_compiled])
    details = _each(models, eager, journal, lambda method: _detail(models, eager, method, number, inputs), number)
    return list(details.values())


def _detail(models: Models, block: Block, method: Method, number: int, inputs: Mapping[str, Any]) -> Detail:
    """Decode a batch with clocks in the models."""
    lent = [models.target.get_input_embeddings(), models.target.get_output_embeddings()]
    assistant = method.assistant_of(models)
    is_own = is_own_drafter(assistant)  # no pass of a module but a call of `draft`, which the loop itself times
    drafting = [] if assistant is None or is_own else [assistant, *lent]
    clock = PassClock([models.target, *drafting], models.device)
    recording = Recording() if len(inputs["input_ids"]) == 1 else None
    with PeakMemory(models.device) as memory, clock:
        run = _run(models, block, method, number, inputs, recording)
    prefill, *target_passes = clock.passes_of(models.target)
    in_drafter = run.stats.drafter_seconds if is_own and run.stats is not None else sum(clock.passes_of(*drafting))
    return Detail(
        block=block.name,
        method=method.name,
        batch=number,
        seconds=run.seconds,
        prefill_seconds=prefill,
        target_seconds=sum(target_passes),
        drafter_seconds=in_drafter,
        rest_seconds=run.seconds - prefill - sum(target_passes) - in_drafter,
        loop_seconds=None if run.stats is None else run.stats.total_seconds,
        num_rounds=len(target_passes),
        num_tokens=_num_new_tokens(run.sequences, inputs, models),
        first_token_seconds=None if recording is None else recording.pieces[1][0],
        peak_bytes=memory.num_bytes,
    )


def _along(models: Models, block: Block, journal: Journal, number: int, inputs: Mapping[str, Any]) -> list[Along]:
    """Let plain decoding write a text, and every method of ours draft along it."""
    prompt = inputs["input_ids"]
    output = _run(models, block, block.methods[0], number, inputs).sequences
    num_new = _num_new_tokens(output, inputs, models)
    written = output[0, prompt.shape[1] :][:num_new].tolist()
    # Behind the end of a text nothing is drafted.
    is_ended = num_new < block.max_new_tokens

    def observe(method: Method) -> Along | None:
        if not method.is_ours or method.is_compiled:  # what is compiled drafts as it does otherwise
            return None
        torch.manual_seed(block.seed + number)
        found = accepted_along(method, models, prompt, written[: num_new - is_ended], **block.settings)
        return Along(block.name, method.name, number, found.expected, found.drafted)

    return [found for found in _each(models, block, journal, observe).values() if found is not None]


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

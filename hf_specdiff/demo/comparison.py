"""The same prompts through several decoders, interleaved: what the demo measures and shows.

Knows the bundled pair's decoders and how to time them. Knows nothing about the terminal.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from dataclasses import field
from typing import Any

import torch

from hf_specdiff.demo.bundle import load_demo
from hf_specdiff.generate import generate

PLAIN = "plain generate"
MAX_NEW_TOKENS = {"math": 200, "code": 128}

# From the prompt's ids, the length limit and a streamer to the sequences and the tokens of each round after the prefill.
Decoder = Callable[..., tuple[torch.Tensor, list[int]]]


@dataclass(slots=True)
class Tally:
    """What one decoder did over many prompts.

    Attributes:
        seconds (`float`): wall-clock time, prefill included.
        num_tokens (`int`): tokens written.
        round_tokens (`list[int]`): tokens that each target pass after the prefill added.
        num_identical (`int`): outputs equal to plain `generate`'s.
        num_prompts (`int`): prompts seen.
    """

    seconds: float = 0.0
    num_tokens: int = 0
    round_tokens: list[int] = field(default_factory=list)
    num_identical: int = 0
    num_prompts: int = 0

    @property
    def tokens_per_second(self) -> float:
        """Tokens written over wall-clock time."""
        return self.num_tokens / self.seconds if self.seconds else 0.0

    @property
    def tokens_per_round(self) -> float:
        """Mean tokens that a target pass adds; 1 for plain decoding."""
        return sum(self.round_tokens) / len(self.round_tokens) if self.round_tokens else 0.0


class PassCounter:
    """A streamer that writes down how many tokens the target's loop handed over at a time."""

    def __init__(self, streamer: Any | None = None) -> None:
        self.sizes: list[int] = []
        self.streamer = streamer

    def put(self, value: torch.Tensor) -> None:
        """Count a piece and hand it on."""
        self.sizes.append(value.numel())
        if self.streamer is not None:
            self.streamer.put(value)

    def end(self) -> None:
        """Hand the end on."""
        if self.streamer is not None:
            self.streamer.end()


class PassClock:
    """Add up the time that some modules' forward passes take; a pass inside another one is counted once.

    Args:
        modules (`list[torch.nn.Module]`): to time, inside `with`.
    """

    def __init__(self, modules: list[torch.nn.Module]) -> None:
        self.modules = modules
        self.seconds = 0.0
        self._depth = 0
        self._start = 0.0
        self._hooks: list[Any] = []

    def __enter__(self) -> "PassClock":
        for module in self.modules:
            self._hooks.append(module.register_forward_pre_hook(self._begin))
            self._hooks.append(module.register_forward_hook(self._end))
        return self

    def __exit__(self, *error: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _begin(self, *arguments: Any) -> None:
        if self._depth == 0:
            self._start = time.perf_counter()
        self._depth += 1

    def _end(self, *arguments: Any) -> None:
        self._depth -= 1
        if self._depth == 0:
            self.seconds += time.perf_counter() - self._start


@dataclass(frozen=True, slots=True)
class RoundTimes:
    """Where the time of a round goes, in seconds, the mean over many rounds.

    Attributes:
        target_pass (`float`): the target's forward.
        drafter_pass (`float`): the drafter's, with the embedding and the head that it borrows.
        between (`float`): everything else: our code, and the host's preparation of inputs.
    """

    target_pass: float
    drafter_pass: float
    between: float

    @property
    def between_share(self) -> float:
        """The part of a round spent outside the two forward passes."""
        return self.between / (self.target_pass + self.drafter_pass + self.between)


def measure_rounds(kind: str, draft_shape: str, prompts: list[str], max_new_tokens: int) -> RoundTimes:
    """Time the parts of a round of the bundled pair, greedy, on top of the comparison.

    Args:
        kind (`str`): `"features"` or `"tokens"`.
        draft_shape (`str`): `"chain"` or `"tree"` (of the drafter's default size).
        prompts (`list[str]`): texts.
        max_new_tokens (`int`): the length limit.

    Returns:
        `RoundTimes`: means over all rounds, prefills left out.
    """
    target, drafter, tokenizer = load_demo(kind)
    warm_up = tokenizer(prompts[0], return_tensors="pt").input_ids
    # The first call with a target tries whether it takes trees, and that is no part of a round.
    generate(target, warm_up, assistant_model=drafter, draft_shape=draft_shape, do_sample=False, max_new_tokens=4)
    lent = [target.get_input_embeddings(), target.get_output_embeddings()]
    total = prefill = 0.0
    num_rounds = 0
    target_clock, clock = PassClock([target]), PassClock([target, drafter, *lent])
    with target_clock, clock:
        for text in prompts:
            output = generate(
                target,
                tokenizer(text, return_tensors="pt").input_ids,
                assistant_model=drafter,
                draft_shape=draft_shape,
                do_sample=False,
                max_new_tokens=max_new_tokens,
                return_dict_in_generate=True,
            )
            total += output.speculation.total_seconds
            prefill += output.speculation.prefill_seconds
            num_rounds += output.speculation.num_rounds
    drafter_pass = clock.seconds - target_clock.seconds
    between = total - clock.seconds
    return RoundTimes((target_clock.seconds - prefill) / num_rounds, drafter_pass / num_rounds, between / num_rounds)


def demo_decoders() -> tuple[Any, dict[str, Decoder]]:
    """Load the bundled models.

    Returns:
        `tuple`: the tokenizer, and the decoders by name, plain `generate` first.
    """
    target, features, tokenizer = load_demo("features")
    tokens, autoregressive = load_demo("tokens")[1], load_demo("autoregressive")[1]

    def host(assistant: Any | None) -> Decoder:
        def decode(ids: torch.Tensor, max_new_tokens: int, streamer: Any | None = None) -> tuple[torch.Tensor, list[int]]:
            counter = PassCounter(streamer)
            sequences = target.generate(
                ids, do_sample=False, max_new_tokens=max_new_tokens, assistant_model=assistant, streamer=counter
            )
            # The first piece is the prompt; with an assistant the loop hands over one piece per target pass.
            return sequences, counter.sizes[1:]

        return decode

    def ours(drafter: Any, draft_shape: str) -> Decoder:
        def decode(ids: torch.Tensor, max_new_tokens: int, streamer: Any | None = None) -> tuple[torch.Tensor, list[int]]:
            output = generate(
                target,
                ids,
                assistant_model=drafter,
                draft_shape=draft_shape,
                do_sample=False,
                max_new_tokens=max_new_tokens,
                return_dict_in_generate=True,
                streamer=streamer,
            )
            return output.sequences, [accepted[0] + 1 for accepted in output.speculation.num_accepted]

        return decode

    return tokenizer, {
        PLAIN: host(None),
        "transformers, AR assistant": host(autoregressive),
        "transformers, our token drafter": host(tokens),
        "hf_specdiff, token drafter, chain": ours(tokens, "chain"),
        "hf_specdiff, token drafter, tree": ours(tokens, "tree"),
        "hf_specdiff, feature drafter, chain": ours(features, "chain"),
        "hf_specdiff, feature drafter, tree": ours(features, "tree"),
    }


def compare(
    decoders: dict[str, Decoder],
    prompts: list[torch.Tensor],
    max_new_tokens: int,
    on_prompt: Callable[[], None] = lambda: None,
) -> dict[str, Tally]:
    """Run every prompt through every decoder, in turn, so that a drifting machine hits all alike.

    Args:
        decoders (`dict[str, Decoder]`): by name, plain `generate` first.
        prompts (`list[torch.Tensor]`): ids, each `(1, L)` int64.
        max_new_tokens (`int`): the length limit.
        on_prompt (`Callable`): called after each prompt.

    Returns:
        `dict[str, Tally]`: by name.
    """
    tallies = {name: Tally() for name in decoders}
    for decode in decoders.values():
        decode(prompts[0], max_new_tokens)  # warm-up: the first call of a process allocates and selects kernels
    for ids in prompts:
        expected: torch.Tensor | None = None
        for name, decode in decoders.items():
            start = time.perf_counter()
            sequences, round_tokens = decode(ids, max_new_tokens)
            tally = tallies[name]
            tally.seconds += time.perf_counter() - start
            tally.num_tokens += sequences.shape[1] - ids.shape[1]
            tally.round_tokens += round_tokens
            expected = sequences if expected is None else expected
            tally.num_identical += int(torch.equal(sequences, expected))
            tally.num_prompts += 1
        on_prompt()
    return tallies

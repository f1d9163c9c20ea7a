"""What a language model reads of the text round by round, held against passes over the whole text without any cache."""

from itertools import pairwise
from typing import Any

import pytest
import torch

import hf_specdiff
from hf_specdiff.core.masked_target import additive
from hf_specdiff.diffusion import context
from hf_specdiff.diffusion.context import NUM_TRIALS
from hf_specdiff.diffusion.context import ContextChoice
from hf_specdiff.diffusion.context import LanguageModelDrafter
from tests.conftest import make_target
from tests.conftest import plain_text
from tests.conftest import shared_target
from tests.diffusion.test_trials import MASK
from tests.diffusion.test_trials import make_body

PROMPTS = torch.tensor([[0, 0, 1, 5, 9, 4, 7, 7, 3], [1, 8, 8, 3, 2, 6, 11, 5, 5], [0, 0, 0, 0, 0, 1, 9, 9, 4]])
PADDED = {"input_ids": PROMPTS, "attention_mask": (PROMPTS != 0).long(), "pad_token_id": 0, "eos_token_id": 13}
SINGLE = {"input_ids": PROMPTS[1:2], "eos_token_id": 13}
GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 24}
SCHEMES: dict[str, dict[str, Any]] = {
    "chain": {"draft_shape": "chain", "gamma": 5},
    "steps": {"draft_shape": "chain", "gamma": 5, "num_denoising_steps": 3},
    "tree": {"draft_shape": "tree", "tree_budget": 8},
    "samples": {"draft_shape": "samples", "num_drafts": 3, "acceptance": "self_selection"},
}
KINDS = {"full": {}, "blocks": {"attention": "block_causal", "block_length": 4}}


class Watched:
    """Compares every pass of a drafter with one over the whole text, then hands over mostly right logits instead.

    Text is read in pieces, one for each round: with "prefix" a piece sees itself and the earlier ones.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, plain: torch.Tensor, *, is_prefix: bool) -> None:
        self.plain, self.is_prefix = plain, is_prefix
        self.pieces: dict[int, list[int]] = {}  # by row: where each piece ends
        self.largest, self.num_kept = 0.0, 0
        original = LanguageModelDrafter.window_logits

        def window_logits(drafter: Any, window: torch.Tensor, text: Any, features: Any) -> torch.Tensor:
            assert drafter.way == ("prefix" if is_prefix else "exact")
            logits = original(drafter, window, text, features)
            for row in range(text.num_rows):
                reference = self.reference(drafter.network, text, row, window[row])
                self.largest = max(self.largest, float((logits[row, :, :31] - reference[:, :31]).abs().max()))
            self.num_kept = max(self.num_kept, *drafter.rows.ends)
            return self.told(logits, text)

        monkeypatch.setattr(LanguageModelDrafter, "window_logits", window_logits)

    def reference(self, network: Any, text: Any, row: int, window: torch.Tensor) -> torch.Tensor:
        """Return the window's logits `(G, V)` of a pass of the body alone."""
        ids = text.row(row)[0].tolist()
        padding = 0 if text.prompt_mask is None else int((text.prompt_mask[row] == 0).sum())
        ids = [MASK if token == MASK else token for token in ids[padding:-1]]
        size, count = len(ids) + len(window), len(ids)
        seen = torch.ones(size, size, dtype=torch.bool)
        if self.is_prefix:
            ends = self.pieces.setdefault(text.rows[row], [])
            if not ends or ends[-1] < count:
                ends.append(count)
            for start, end in zip([0, *ends], ends, strict=False):
                seen[start:end, end:] = False
        if network.block_length is not None:
            blocks = torch.arange(size) // network.block_length
            seen &= blocks[None] <= blocks[:, None]
        body_ids = torch.cat([torch.tensor(ids, dtype=torch.long), window])[None]
        logits = network.body(input_ids=body_ids, attention_mask=additive(seen[None], torch.float32), use_cache=False).logits[0]
        return logits[count + 1 + network.logit_offset : size + network.logit_offset]

    def told(self, logits: torch.Tensor, text: Any) -> torch.Tensor:
        logits = logits.clone()
        for row, (place, length) in enumerate(zip(text.rows, text.lengths, strict=True)):
            for index in range(logits.shape[1]):
                at = length + index
                if at < self.plain.shape[1] and (at + place) % 5:
                    logits[row, index, self.plain[place, at]] += 30
        return logits


# What a scheme adds is seen in the batch, whose rows grow unevenly; what a single row leaves out, with chains.
CASES = [("chain", 0, "one"), ("chain", 0, "three"), *((scheme, -1, "three") for scheme in SCHEMES)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cache", ["exact", "prefix"])
@pytest.mark.parametrize(("scheme", "offset", "rows"), CASES)
def test_every_pass_is_one_over_the_whole_text_and_greedy_text_is_the_targets(
    scheme: str, cache: str, kind: str, offset: int, rows: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, inputs = shared_target(), {"one": SINGLE, "three": PADDED}[rows]
    settings = {**inputs, **GREEDY}
    more = {name: value for name, value in inputs.items() if name != "input_ids"}
    plain = plain_text(target, inputs["input_ids"], max_new_tokens=GREEDY["max_new_tokens"], **more)
    drafter = hf_specdiff.DiffusionDrafter(
        make_body(), mask_token_id=MASK, block_size=7, logit_offset=offset, context_cache=cache, target=target, **KINDS[kind]
    )
    watched = Watched(monkeypatch, plain, is_prefix=cache == "prefix")
    output = hf_specdiff.generate(target, assistant_model=drafter, return_dict_in_generate=True, **SCHEMES[scheme], **settings)
    assert torch.equal(output.sequences, plain)
    assert watched.largest < 1e-4
    assert output.speculation.tokens_per_round > 1.5  # drafts were accepted, so texts grew unevenly
    # "exact" keeps nothing of a text that sees everything, and of one in blocks those that are whole.
    assert watched.num_kept == 0 if (cache, kind) == ("exact", "full") else watched.num_kept >= 8


def test_a_kept_text_is_read_anew_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(context, "REFRESH_EVERY", 10)
    target = make_target()
    drafter = hf_specdiff.DiffusionDrafter(make_body(), mask_token_id=MASK, block_size=4, context_cache="prefix", target=target)
    sizes = []
    original = LanguageModelDrafter.window_logits

    def window_logits(self: Any, window: torch.Tensor, text: Any, features: Any) -> torch.Tensor:
        sizes.append((text.lengths[0], text.lengths[0] - 1 - self.rows.ends[0]))
        return original(self, window, text, features)

    monkeypatch.setattr(LanguageModelDrafter, "window_logits", window_logits)
    settings = {**SINGLE, "do_sample": False, "max_new_tokens": 25}
    output = hf_specdiff.generate(target, assistant_model=drafter, draft_shape="chain", gamma=3, **settings)
    assert torch.equal(output, target.generate(**settings))
    whole = [length for length, new in sizes if new == length - 1]
    assert len(whole) >= 3
    assert all(later - earlier >= 10 for earlier, later in pairwise(whole))


def test_auto_takes_what_brought_more_tokens_a_second_for_each_doubling_of_the_text() -> None:
    choice = ContextChoice()
    for way, seconds in (("exact", 2.0), ("prefix", 1.0)):
        for _ in range(NUM_TRIALS):
            assert choice.pick(100) == way
            choice.add(100, way, 3, seconds)
    assert choice.pick(100) == choice.pick(64) == "prefix"
    assert choice.pick(200) == "exact"  # not tried there yet
    for _ in range(20):
        choice.add(100, "prefix", 1, 1.0)  # it has come to bring fewer
    assert choice.pick(100) == "exact"


def test_auto_changes_its_way_and_never_the_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """Time is counted in passes' tokens here: what is read anew every round costs more."""
    target, body = make_target(), make_body()
    drafter = hf_specdiff.DiffusionDrafter(body, mask_token_id=MASK, block_size=4, target=target)
    clock, ways = [0.0], []
    body.register_forward_pre_hook(
        lambda module, args, kwargs: clock.__setitem__(0, clock[0] + kwargs["input_ids"].numel()), with_kwargs=True
    )
    monkeypatch.setattr(context.time, "perf_counter", lambda: clock[0])
    original = LanguageModelDrafter.window_logits

    def window_logits(self: Any, *args: Any) -> torch.Tensor:
        ways.append(self.way)
        return original(self, *args)

    monkeypatch.setattr(LanguageModelDrafter, "window_logits", window_logits)
    inputs = {"input_ids": PROMPTS[1:2].repeat(1, 8), "eos_token_id": None, "do_sample": False, "max_new_tokens": 40}
    output = hf_specdiff.generate(target, assistant_model=drafter, draft_shape="chain", gamma=3, **inputs)
    assert torch.equal(output, target.generate(**inputs))
    assert ways[:NUM_TRIALS] == ["exact"] * NUM_TRIALS
    assert ways[NUM_TRIALS:][-5:] == ["prefix"] * 5

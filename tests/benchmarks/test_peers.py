"""z-lab's own loop as a method: the same weights, the same greedy tokens, as many of them a round."""

import importlib.util
from typing import Any

import pytest
import torch

from hf_specdiff import SpecDiffDrafter
from hf_specdiff.benchmarks import standard
from hf_specdiff.benchmarks.clocks import Recording
from hf_specdiff.benchmarks.figures import rows_of
from hf_specdiff.benchmarks.journal import Journal
from hf_specdiff.benchmarks.methods import PLAIN
from hf_specdiff.benchmarks.methods import Method
from hf_specdiff.benchmarks.methods import Models
from hf_specdiff.benchmarks.methods import ours
from hf_specdiff.benchmarks.peers import peer_methods
from hf_specdiff.benchmarks.runner import CALL
from hf_specdiff.benchmarks.runner import Block
from hf_specdiff.benchmarks.runner import run_block
from hf_specdiff.demo.bundle import PAIR
from tests.conftest import make_drafter
from tests.conftest import make_target

from .conftest import prompts

LIMIT, WINDOW = 40, 16  # of tokens; slots of the bundled drafter's pass
GREEDY = {"max_new_tokens": 20, "do_sample": False}


@pytest.fixture
def tiny() -> Models:
    """A pair, and two drafters that are nothing for the loop: one that reads tokens, one with a mask embedding of its own."""
    drafters = {
        "mine": make_drafter([0, 2]),
        "tokens": make_drafter(),
        "masked": make_drafter([0, 2], has_mask_embedding=True),
    }
    return Models(make_target(), None, drafters)


@pytest.mark.parametrize("seed", range(3))
def test_greedy_tokens_are_those_of_plain_generate(seed: int, tiny: Models) -> None:
    (method,) = peer_methods(tiny, ("mine",))
    torch.manual_seed(seed)
    inputs = {"input_ids": torch.randint(3, 29, (1, 7))}
    plain = Method(PLAIN, {}).decode(tiny, inputs, **GREEDY)
    recording = Recording()
    output = method.decode(tiny, inputs, **GREEDY, streamer=recording)
    assert torch.equal(output.sequences, plain)
    assert recording.pieces[0][1] == inputs["input_ids"][0].tolist()
    assert recording.sizes[0] == 1  # the prompt's own next token
    assert sum(recording.sizes) == plain.shape[1] - 7
    assert not tiny.target._forward_pre_hooks


def test_sampling_settings_reach_the_loop(tiny: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}

    def watch(*arguments: Any, **settings: Any) -> torch.Tensor:
        given.update(settings, limit=arguments[3], ends=arguments[4])
        return arguments[2]

    monkeypatch.setattr("dflash.model.dflash_generate", watch)
    (method,) = peer_methods(tiny, ("mine",))
    inputs = {"input_ids": torch.tensor([[1, 5]])}
    method.decode(tiny, inputs, max_new_tokens=9, do_sample=True, temperature=0.7, top_k=0, top_p=1.0)
    assert given == {"temperature": 0.7, "top_p": 1.0, "top_k": 0, "limit": 9, "ends": [2]}
    method.decode(tiny, inputs, max_new_tokens=9, do_sample=False)
    assert given["temperature"] == 0.0


def test_without_the_package_there_is_no_such_method(tiny: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    assert [method.assistant for method in peer_methods(tiny, tiny.drafters)] == ["mine", "masked"]
    methods = len(standard.methods_for(tiny, 0.0))
    find = importlib.util.find_spec
    monkeypatch.setattr("hf_specdiff.benchmarks.peers.find_spec", lambda name: None if name == "dflash" else find(name))
    assert peer_methods(tiny, tiny.drafters) == []
    assert len(standard.methods_for(tiny, 0.0)) == methods - 2


def test_what_the_loop_cannot_do_is_said(models: Models) -> None:
    with_mask = Models(models.target, models.tokenizer, {"masked": make_drafter([0, 2], has_mask_embedding=True)})
    methods = [Method(PLAIN, {}), *peer_methods(with_mask, ("masked",))]
    block = Block("math", prompts(1), methods, max_new_tokens=4, num_detailed=0)
    journal = Journal()
    run_block(with_mask, block, journal)
    assert "`has_mask_embedding` must be False" in rows_of(block, with_mask, journal)[1]["refusal"]
    (method,) = peer_methods(models, ("features",))
    with pytest.raises(ValueError, match="`batch_size` must be 1 in z-lab's loop, got 2"):
        method.decode(models, {"input_ids": torch.zeros(2, 3, dtype=torch.long)}, **GREEDY)


def whole_rounds(rounds: list[int]) -> list[int]:
    """Return the rounds with room for a whole window; near the end of a text theirs is longer than ours by one."""
    starts = [1 + sum(rounds[:place]) for place in range(len(rounds))]
    return [count for start, count in zip(starts, rounds, strict=True) if start + WINDOW <= LIMIT]


def test_tokens_per_round_are_ours(models: Models) -> None:
    """The bundled drafter without its head: our chain of a whole window against their loop, with clocks in their network."""
    trunk = SpecDiffDrafter.from_pretrained(PAIR / "features", markov_rank=0).float().eval()
    models = Models(models.target, models.tokenizer, {"features": trunk})
    chain = ours("features", "chain", draft_shape="chain", prompt_lookup_num_tokens=0)
    peers = peer_methods(models, ("features",))
    block = Block("math", prompts(2), [Method(PLAIN, {}), *peers, chain], max_new_tokens=LIMIT, num_detailed=1)
    journal = Journal()
    run_block(models, block, journal)
    _, theirs, own = rows_of(block, models, journal)
    assert theirs["identical"] is own["identical"] is True
    assert theirs["loop"] == "dflash"
    calls: dict[str, list[list[int]]] = {
        name: [whole_rounds(record["rounds"]) for record in journal.select(kind=CALL, method=name)]
        for name in (peers[0].name, chain.name)
    }
    assert calls[peers[0].name] == calls[chain.name]
    assert sum(map(sum, calls[chain.name])) > 2 * sum(map(len, calls[chain.name])) > 0
    assert min(theirs["drafter_seconds"], theirs["target_seconds"], theirs["first_token_seconds"]) > 0

"""What `hf-specdiff demo` tells of the speeds that it measured."""

import pytest

from hf_specdiff.benchmarks.journal import Journal
from hf_specdiff.benchmarks.methods import PLAIN
from hf_specdiff.benchmarks.methods import Method
from hf_specdiff.benchmarks.runner import CALL
from hf_specdiff.benchmarks.runner import Block
from hf_specdiff.commands.demo import with_medians


def test_one_slow_call_does_not_decide_a_ratio() -> None:
    """Plain takes 1 s a prompt and the other 0.25 s, but for one call that the machine was busy during."""
    block = Block("math", ["a", "b", "c", "d", "e"], [Method(PLAIN, {}), Method("fast", {})], 8)
    journal = Journal()
    for prompt in range(5):
        for method, seconds in ((PLAIN, 1.0), ("fast", 30.0 if prompt == 2 else 0.25)):
            journal.append([{"kind": CALL, "block": block.name, "method": method, "num_tokens": 100, "seconds": seconds}])
    rows = with_medians([{"method": PLAIN}, {"method": "fast"}], block, journal)
    assert rows[0]["ratio_to_plain"] == 1.0
    assert rows[1]["ratio_to_plain"] == pytest.approx(4.0)
    assert rows[1]["tokens_per_second"] == pytest.approx(400.0)


def test_ratios_are_paired_by_prompt() -> None:
    """Both are slower on some prompts: each prompt's own ratio is 2, whatever the order of the speeds."""
    block = Block("math", ["a", "b", "c"], [Method(PLAIN, {}), Method("fast", {})], 8)
    journal = Journal()
    for seconds in (1.0, 9.0, 3.0):
        for method, factor in ((PLAIN, 1.0), ("fast", 0.5)):
            journal.append(
                [{"kind": CALL, "block": block.name, "method": method, "num_tokens": 10, "seconds": factor * seconds}]
            )
    rows = with_medians([{"method": "fast"}], block, journal)
    assert rows[0]["ratio_to_plain"] == pytest.approx(2.0)

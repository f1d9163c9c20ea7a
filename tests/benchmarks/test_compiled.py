"""What `hf-specdiff bench --compile` adds: compiled plain decoding as one more baseline, ours compiled beside ours eager."""

from pathlib import Path

import pytest
import torch
from transformers import CompileConfig

from hf_specdiff.benchmarks import methods
from hf_specdiff.benchmarks import standard
from hf_specdiff.benchmarks.methods import PLAIN
from hf_specdiff.benchmarks.methods import PLAIN_COMPILED
from hf_specdiff.benchmarks.methods import Method
from hf_specdiff.benchmarks.methods import Models
from hf_specdiff.benchmarks.methods import our_methods
from hf_specdiff.benchmarks.methods import with_compiled
from hf_specdiff.demo.bundle import load_demo
from tests.conftest import make_drafter
from tests.conftest import make_target

from .conftest import prompts
from .conftest import traced_only


@pytest.fixture
def tiny() -> Models:
    tokenizer = load_demo("tokens")[2]
    sizes = {"vocab_size": len(tokenizer), "pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
    target = make_target(num_hidden_layers=1, initializer_range=0.05, **sizes)
    return Models(target, tokenizer, {"mine": make_drafter([0], num_hidden_layers=1, mask_token_id=5, **sizes)})


def test_chains_and_trees_of_a_fixed_size_stand_beside_themselves() -> None:
    found = with_compiled([Method(PLAIN, {}), *our_methods("mine", 0.0)])
    assert [method.name for method in found[:6]] == [
        PLAIN, PLAIN_COMPILED, "mine, chain", "mine, chain, compiled", "mine, tree of 15", "mine, tree of 15, compiled"
    ]  # fmt: skip
    compiled = [method.name for method in found if method.is_compiled]
    assert compiled == [PLAIN_COMPILED, "mine, chain, compiled", "mine, tree of 15, compiled", "mine, tree of 32, compiled"]


def test_compiled_methods_run_and_their_first_calls_are_noted(
    tiny: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch._dynamo.reset()
    monkeypatch.setattr(methods, "compile_config", traced_only)
    extent = standard.Extent({"math": prompts(2)}, {"math": 8}, (0.0,), words=("mine, chain",), compiles=True)
    record = standard.benchmark(tiny, extent, tmp_path / "out", {}, "command")
    rows = {row["method"]: row for row in record["rows"]}
    assert list(rows) == [PLAIN, PLAIN_COMPILED, "mine, chain", "mine, chain, compiled"]
    assert all(row["identical"] for row in rows.values())
    assert {name for name, row in rows.items() if "first_call_seconds" in row} == {PLAIN_COMPILED, "mine, chain, compiled"}
    ours = rows["mine, chain, compiled"]
    assert ours["ratio_to_eager"] == pytest.approx(ours["tokens_per_second"] / rows["mine, chain"]["tokens_per_second"])
    assert ours["ratio_to_compiled_plain"] == pytest.approx(
        ours["tokens_per_second"] / rows[PLAIN_COMPILED]["tokens_per_second"]
    )
    assert "ratio_to_eager" not in rows["mine, chain"]
    assert "target_seconds" in rows["mine, chain"]
    assert "target_seconds" not in ours  # a clock in the model would have it compiled anew
    table = (tmp_path / "out" / "table.md").read_text()
    assert "ratio to itself uncompiled" in table
    assert f"{ours['ratio_to_eager']:.2f}x" in table


def test_a_compiler_that_is_missing_is_the_reason_in_the_table(
    tiny: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(graph: object, inputs: object) -> object:
        raise RuntimeError("no such compiler: c++")

    def without_compiler() -> CompileConfig:
        config = CompileConfig(backend=broken, mode=None)
        config._compile_all_devices = True
        return config

    torch._dynamo.reset()
    monkeypatch.setattr(methods, "compile_config", without_compiler)
    extent = standard.Extent({"math": prompts(1)}, {"math": 4}, (0.0,), words=("mine, chain",), compiles=True)
    rows = standard.benchmark(tiny, extent, tmp_path / "out", {}, "command")["rows"]
    assert [row["method"] for row in rows if "refusal" in row] == [PLAIN_COMPILED, "mine, chain, compiled"]
    assert "`compile_config` must name a compiler that works here" in rows[-1]["refusal"]
    assert "cannot run: `compile_config`" in (tmp_path / "out" / "table.md").read_text()

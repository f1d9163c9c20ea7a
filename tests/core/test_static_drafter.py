"""A drafter whose passes are compiled drafts what it drafts otherwise, in passes of one width."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CompileConfig
from transformers import LlamaForCausalLM

import hf_specdiff
from hf_specdiff import SpecDiffDrafter
from hf_specdiff.core import measuring
from hf_specdiff.core.profiling import isolated_profiles
from hf_specdiff.core.static_drafter import StaticPasses
from tests.conftest import make_drafter as drafter_of_layers
from tests.conftest import make_target as target_of_layers

SHAPES: dict[str, dict[str, Any]] = {
    "chain": {"draft_shape": "chain"},
    "tree": {"draft_shape": "tree", "tree_budget": 9},
    "copies": {"draft_shape": "tree", "tree_budget": 9, "prompt_lookup_num_tokens": 8},
}


def make_target() -> LlamaForCausalLM:
    return target_of_layers(num_hidden_layers=1)  # each is traced


def make_drafter(layers: list[int] | None = None, **more: Any) -> SpecDiffDrafter:
    return drafter_of_layers(layers, **({"num_hidden_layers": 1} | more))


class Traced:
    """Stands in for a compiler: runs what was traced, and counts the graphs and their runs."""

    def __init__(self) -> None:
        self.num_graphs = self.num_runs = 0
        self.config = CompileConfig(backend=self.compile, mode=None)
        self.config._compile_all_devices = True  # the host compiles on a CPU for tests only
        self.settings = {"cache_implementation": "static", "compile_config": self.config}

    def __deepcopy__(self, memo: object) -> "Traced":
        return self  # the host copies the config, and this is the backend in it

    def compile(self, graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., Any]:
        self.num_graphs += 1

        def run(*arguments: Any) -> Any:
            self.num_runs += 1
            return graph(*arguments)

        return run


@pytest.fixture
def traced() -> Traced:
    torch._dynamo.reset()
    return Traced()


def call(target: LlamaForCausalLM, drafter: SpecDiffDrafter, ids: torch.Tensor, **settings: Any) -> Any:
    fixed = {"do_sample": False, "max_new_tokens": 24, "return_dict_in_generate": True}
    return hf_specdiff.generate(target, ids, assistant_model=drafter, **(fixed | settings))


def early(output: Any) -> list[list[int]]:
    """Return what rounds accepted before the window met the length limit, where a compiled one stays as wide as it is."""
    rounds: list[list[int]] = []
    written = 1
    while written + 6 <= 24 and len(rounds) < len(output.speculation.num_accepted):
        rounds.append(output.speculation.num_accepted[len(rounds)])
        written += max(rounds[-1]) + 1
    return rounds


@pytest.mark.parametrize(("layers", "shape"), [(None, "chain"), ([0], "chain"), ([0], "tree"), ([0], "copies")])
def test_it_drafts_the_same_and_compiles_nothing_after_the_first_call(
    layers: list[int] | None, shape: str, prompt: torch.Tensor, traced: Traced
) -> None:
    target, drafter = make_target(), make_drafter(layers, seed=3)
    num_graphs = []
    for length in (7, 1, 5):  # the first pass of a prompt of one token is no longer than a usual one
        text = prompt[:, :length]
        eager = call(target, drafter, text, **SHAPES[shape], eos_token_id=None)
        num_runs = traced.num_runs
        ours = call(target, drafter, text, **SHAPES[shape], **traced.settings, eos_token_id=None)
        assert torch.equal(ours.sequences, eager.sequences)
        assert early(ours) == early(eager)
        # Both models' passes but the prompt's, and the drafter's where nothing is drafted.
        assert traced.num_runs - num_runs >= 2 * len(ours.speculation.num_accepted) - 2
        num_graphs.append(traced.num_graphs)
    assert num_graphs == [2, 2, 2]  # one for each model


def test_rows_that_end_leave_the_others_as_they_are(traced: Traced) -> None:
    target, drafter = make_target(), make_drafter([0], seed=3)
    ids = torch.tensor([[0, 0, 1, 5, 9], [1, 4, 4, 8, 2], [0, 1, 7, 3, 3], [1, 9, 12, 6, 20]])
    mask = (ids != 0).long()
    free = target.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=24, eos_token_id=None)
    ends = {"eos_token_id": free[1, 12].item(), "pad_token_id": 0, "attention_mask": mask, **SHAPES["chain"]}
    eager = call(target, drafter, ids, **ends)
    ours = call(target, drafter, ids, **ends, **traced.settings)
    assert torch.equal(ours.sequences, eager.sequences)
    assert early(ours) == early(eager)
    assert len({len(row) for row in ours.speculation.num_accepted}) > 1  # a row ended before the others
    assert traced.num_graphs == 2


def test_a_head_that_knows_the_token_before_reads_compiled_states(prompt: torch.Tensor, traced: Traced) -> None:
    target, drafter = make_target(), make_drafter([0], seed=3, markov_rank=4)
    for shape in ("chain", "tree"):
        eager = call(target, drafter, prompt, **SHAPES[shape], eos_token_id=None)
        ours = call(target, drafter, prompt, **SHAPES[shape], **traced.settings, eos_token_id=None)
        assert torch.equal(ours.sequences, eager.sequences)
        assert early(ours) == early(eager)


WINDOWS = {"sliding_window": 4, "use_sliding_window": True, "layer_types": ["sliding_attention"]}


@pytest.mark.parametrize("more", [WINDOWS, {"attn_implementation": "eager"}])
def test_which_networks_stay_as_they_are(
    more: dict[str, Any], prompt: torch.Tensor, traced: Traced, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Windows count cached positions, which a static cache does not tell."""
    made: list[StaticPasses] = []
    init = StaticPasses.__init__
    monkeypatch.setattr(StaticPasses, "__init__", lambda self, *args: made.append(self) or init(self, *args))
    target, drafter = make_target(), make_drafter([0], seed=3, **more)
    eager = call(target, drafter, prompt, **SHAPES["chain"])
    ours = call(target, drafter, prompt, **SHAPES["chain"], **traced.settings)
    assert torch.equal(ours.sequences, eager.sequences)
    assert bool(made) == ("sliding_window" not in more)


def test_sampling_by_every_rule_runs_compiled(prompt: torch.Tensor, traced: Traced) -> None:
    target, drafter = make_target(), make_drafter([0], seed=3)
    for more in ({"draft_shape": "chain"}, {"draft_shape": "tree", "tree_budget": 5, "acceptance": "ratio"}):
        torch.manual_seed(0)
        ours = call(target, drafter, prompt, **more, **traced.settings, do_sample=True, eos_token_id=None)
        assert ours.sequences.shape == (1, prompt.shape[1] + 24)


def test_the_cache_is_used_again(prompt: torch.Tensor, traced: Traced, monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []
    init = StaticPasses.__init__

    def watched(self: StaticPasses, *arguments: Any) -> None:
        init(self, *arguments)
        taken.append(self.cache)

    monkeypatch.setattr(StaticPasses, "__init__", watched)
    target, drafter = make_target(), make_drafter([0], seed=3)
    for _ in range(2):
        call(target, drafter, prompt, **SHAPES["chain"], **traced.settings)
    assert taken[0] is taken[1]


def test_sizes_that_follow_the_machine_go_by_what_compiled_passes_cost(
    prompt: torch.Tensor, traced: Traced, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """They are compiled before they are measured, their profile is kept apart, and the text is the same whatever they cost."""
    monkeypatch.setattr(measuring, "MOST_STEPS", 1)
    target, drafter = make_target(), make_drafter([0], seed=3)
    plain = target.generate(prompt, do_sample=False, max_new_tokens=24)
    sizes = {"draft_shape": "chain", "gamma": "auto"}
    num_graphs = []
    with isolated_profiles(tmp_path):
        assert torch.equal(call(target, drafter, prompt, **sizes).sequences, plain)
        assert traced.num_graphs == 0
        for _ in range(2):
            assert torch.equal(call(target, drafter, prompt, **sizes, **traced.settings).sequences, plain)
            num_graphs.append(traced.num_graphs)
    assert num_graphs[0] == num_graphs[1] > 0
    assert len(list(tmp_path.rglob("*.json"))) == 2

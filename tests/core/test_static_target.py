"""A static cache gives the tokens of plain decoding, in passes of a few widths that are compiled once."""

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers import CompileConfig
from transformers import Gemma2Config
from transformers import LlamaForCausalLM
from transformers import Qwen3Config
from transformers import StaticCache
from transformers.utils import logging

import hf_specdiff
from hf_specdiff import SpecDiffDrafter
from hf_specdiff.core.static_target import SLOTS
from hf_specdiff.core.static_target import StaticTarget
from hf_specdiff.core.static_target import widths_of
from tests.conftest import SPECIAL_IDS
from tests.conftest import VOCAB_SIZE
from tests.conftest import make_drafter
from tests.conftest import make_target
from tests.core.oracle import drafter_for
from tests.core.tiny_models import make_model

SHAPES = {
    "chain": {"draft_shape": "chain"},
    "tree": {"draft_shape": "tree", "tree_budget": 9},
    "samples": {"draft_shape": "samples", "num_drafts": 3},
}
STATIC = {"cache_implementation": "static", "do_sample": False, "max_new_tokens": 24}


@pytest.mark.parametrize("shape", SHAPES)
def test_greedy_tokens_equal_plain_generates(
    tiny_target: LlamaForCausalLM, drafter: SpecDiffDrafter, prompt: torch.Tensor, shape: str
) -> None:
    plain = tiny_target.generate(prompt, do_sample=False, max_new_tokens=24)
    for _ in range(2):  # the second call finds the first one's cache
        ours = hf_specdiff.generate(tiny_target, prompt, assistant_model=drafter, **STATIC, **SHAPES[shape])
        assert torch.equal(ours, plain)


@pytest.mark.parametrize("shape", ["chain", "tree"])
def test_rows_of_a_batch_keep_their_places_when_others_end(drafter: SpecDiffDrafter, shape: str) -> None:
    target = make_target()
    ids = torch.tensor([[0, 0, 1, 5, 9], [1, 4, 4, 8, 2], [0, 1, 7, 3, 3], [1, 9, 12, 6, 20]])
    mask = (ids != 0).long()
    free = target.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=24, eos_token_id=None)
    ends = {"eos_token_id": free[1, 12].item(), "pad_token_id": 0}
    plain = target.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=24, **ends)
    ours = hf_specdiff.generate(
        target,
        ids,
        attention_mask=mask,
        assistant_model=drafter,
        **STATIC,
        **ends,
        **SHAPES[shape],
        return_dict_in_generate=True,
    )
    assert torch.equal(ours.sequences, plain)
    assert len({len(row) for row in ours.speculation.num_accepted}) > 1  # a row ended before the others


def test_a_cache_is_used_again_unless_the_caller_has_it(prompt: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    monkeypatch.setattr(
        "hf_specdiff.core.static_target.StaticCache", lambda **kwargs: made.append(StaticCache(**kwargs)) or made[-1]
    )
    target, drafter = make_target(), make_drafter()
    for _ in range(3):
        hf_specdiff.generate(target, prompt, assistant_model=drafter, **STATIC)
    assert len(made) == 1
    assert made[0].layers[0].max_cache_len == SLOTS
    taken = hf_specdiff.generate(target, prompt, assistant_model=drafter, **STATIC, return_dict_in_generate=True)
    assert taken.past_key_values is made[0]
    hf_specdiff.generate(target, prompt, assistant_model=drafter, **STATIC)
    assert len(made) == 2
    # The caller's holds the text without its last token, as plain generate leaves it.
    assert int(taken.past_key_values.get_seq_length()) == taken.sequences.shape[1] - 1


def test_a_call_can_announce_longer_ones(prompt: torch.Tensor) -> None:
    settings = {**STATIC, "max_cache_len": SLOTS, "return_dict_in_generate": True}
    ours = hf_specdiff.generate(make_target(), prompt, assistant_model=make_drafter(), **settings)
    assert ours.past_key_values.layers[0].max_cache_len == 2 * SLOTS  # a pass of its own behind the longest text


def test_passes_are_compiled_once_for_each_width(prompt: torch.Tensor) -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    target, drafter = make_target(num_hidden_layers=1), make_drafter([0], num_hidden_layers=1)  # each layer is traced
    config = CompileConfig(backend="eager", mode=None)
    config._compile_all_devices = True  # the host compiles on a CPU for tests only
    graphs = []
    for length in (7, 5, 6):
        text = prompt[:, :length]
        plain = target.generate(text, do_sample=False, max_new_tokens=24)
        for shape in ("chain", "tree"):
            ours = hf_specdiff.generate(target, text, assistant_model=drafter, **STATIC, **SHAPES[shape], compile_config=config)
            assert torch.equal(ours, plain)
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert graphs[0] > 0
    assert graphs == graphs[:1] * 3


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "disabled"])
def test_it_compiles_only_where_plain_generate_would(prompt: torch.Tensor, name: str) -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    more = {} if name == "LlamaForCausalLM" else {"disable_compile": True, "compile_config": CompileConfig(backend="eager")}
    hf_specdiff.generate(make_target(), prompt, assistant_model=make_drafter(), **STATIC, **more)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 0


def test_a_compiler_that_is_missing_is_named(prompt: torch.Tensor) -> None:
    def broken(graph: object, inputs: object) -> object:
        raise RuntimeError("no such compiler: c++")

    config = CompileConfig(backend=broken, mode=None)
    config._compile_all_devices = True
    words = r"`compile_config` must name a compiler that works here.*no such compiler: c\+\+ Install.*disable_compile=True"
    with pytest.raises(ValueError, match=words):
        hf_specdiff.generate(make_target(), prompt, assistant_model=make_drafter(), **STATIC, compile_config=config)


def test_a_model_that_breaks_the_graph_is_told_what_to_leave_out(prompt: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    target, drafter = make_target(num_hidden_layers=1), make_drafter(num_hidden_layers=1)
    forward = target.model.norm.forward

    def broken(states: torch.Tensor) -> torch.Tensor:
        torch._dynamo.graph_break("a kernel of its own")
        return forward(states)

    monkeypatch.setattr(target.model.norm, "forward", broken)
    whole, parts = (CompileConfig(backend="eager", mode=None, fullgraph=fullgraph) for fullgraph in (True, False))
    whole._compile_all_devices = parts._compile_all_devices = True
    with pytest.raises(ValueError, match=r"`fullgraph` must be False.*a kernel of its own.*Leave it out, or pass disable_comp"):
        hf_specdiff.generate(target, prompt, assistant_model=drafter, **STATIC, compile_config=whole)
    plain = target.generate(prompt, do_sample=False, max_new_tokens=24)
    ours = hf_specdiff.generate(target, prompt, assistant_model=drafter, **STATIC, compile_config=parts)
    assert torch.equal(ours, plain)


def test_a_filled_static_cache_of_the_callers_is_refused(tiny_target: LlamaForCausalLM, prompt: torch.Tensor) -> None:
    cache = StaticCache(config=tiny_target.config, max_cache_len=64)
    tiny_target(prompt, past_key_values=cache)
    settings = {"assistant_model": make_drafter(), "past_key_values": cache, "max_new_tokens": 4}
    with pytest.raises(ValueError, match=r"`past_key_values` must be a dynamic cache, got StaticCache. Leave it out"):
        hf_specdiff.generate(tiny_target, prompt, **settings)
    with pytest.raises(ValueError, match="past_key_values"):  # the host's own words
        hf_specdiff.generate(tiny_target, prompt, **settings, cache_implementation="static")


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the log says of caches that take another's place."""
    logger, written = logging.get_logger("hf_specdiff.core.targets"), []
    type(logger).warning_once.cache_clear()
    monkeypatch.setattr(logger, "warning", written.append)
    return written


def test_models_with_windows_get_a_dynamic_cache_and_are_told_once(prompt: torch.Tensor, told: list[str]) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "head_dim": 8}
    config = Gemma2Config(vocab_size=VOCAB_SIZE, num_key_value_heads=1, sliding_window=8, **sizes, **SPECIAL_IDS)
    target = AutoModelForCausalLM.from_config(config).eval()
    plain = target.generate(prompt, do_sample=False, max_new_tokens=24)
    for _ in range(2):
        ours = hf_specdiff.generate(target, prompt, assistant_model=make_drafter(), **STATIC)
        assert torch.equal(ours, plain)
    assert told == [
        "A dynamic cache takes the place of the static one that was asked for: Gemma2ForCausalLM has layers with a window "
        "(sliding_attention)."
    ]


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [
        ("qwen3_next", "keeps a running state"),
        ("llama4_text", "layers with a window (chunked_attention)"),
        ("phi3", "prepares its inputs in a way of its own"),  # for rotary embeddings that change with the length
    ],
)
def test_states_chunks_and_inputs_of_ones_own_get_a_dynamic_cache_too(model_type: str, reason: str, told: list[str]) -> None:
    """Drafts go past the chunks, which are shorter than the text."""
    target, ids = make_model(model_type), torch.arange(3, 15)[None]
    plain = target.generate(ids, do_sample=False, max_new_tokens=24)
    ours = hf_specdiff.generate(target, ids, assistant_model=drafter_for(target), draft_shape="chain", **STATIC)
    assert torch.equal(ours, plain)
    assert len(told) == 1
    assert reason in told[0]


def test_sampling_runs_under_every_shape(prompt: torch.Tensor) -> None:
    torch.manual_seed(0)
    target = AutoModelForCausalLM.from_config(
        Qwen3Config(
            vocab_size=VOCAB_SIZE,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=8,
            **SPECIAL_IDS,
        )
    ).eval()
    settings = {**STATIC, "do_sample": True, "eos_token_id": None}
    for more in (
        {"num_denoising_steps": 2},
        {"draft_shape": "tree", "acceptance": "ratio"},
        {"draft_shape": "samples", "acceptance": "self_selection"},
    ):
        ids = hf_specdiff.generate(target, prompt, assistant_model=make_drafter(), **settings, **more)
        assert ids.shape == (1, prompt.shape[1] + 24)


def test_texts_longer_than_a_kept_cache_get_a_longer_one(prompt: torch.Tensor) -> None:
    target, drafter = make_target(), make_drafter()
    for max_new_tokens in (10, 300, 10):
        plain = target.generate(prompt, do_sample=False, max_new_tokens=max_new_tokens, eos_token_id=None)
        ours = hf_specdiff.generate(
            target, prompt, assistant_model=drafter, **{**STATIC, "max_new_tokens": max_new_tokens, "eos_token_id": None}
        )
        assert torch.equal(ours, plain)


def test_widths() -> None:
    assert widths_of(15, is_adaptive=False) == [16]
    assert widths_of(40, is_adaptive=True) == [1, 8, 16, 32, 41]
    assert StaticTarget.takes_trees_and_batches


@pytest.mark.parametrize("size", [1, 40])
def test_drafters_of_ones_own_get_a_dynamic_cache(tiny_target: LlamaForCausalLM, prompt: torch.Tensor, size: int) -> None:
    """How much they draft is known to nobody before."""
    plain = tiny_target.generate(prompt, do_sample=False, max_new_tokens=24)

    class Knowing:
        target_layer_ids = None

        def draft(self, text: hf_specdiff.Text, features: object) -> hf_specdiff.Draft:
            start = text.lengths[0]
            return hf_specdiff.Draft(plain[:, start : start + size], None, has_prefix_law=True)

    assert torch.equal(hf_specdiff.generate(tiny_target, prompt, assistant_model=Knowing(), **STATIC), plain)

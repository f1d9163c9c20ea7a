"""Trees and batches through the whole loop: greedy rows are those of plain decoding, one by one."""

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers import BloomConfig
from transformers import DynamicCache
from transformers import Gemma3TextConfig
from transformers import GenerationConfig
from transformers import GPT2Config
from transformers import GPTNeoConfig
from transformers import Lfm2Config
from transformers import LlamaForCausalLM
from transformers import MistralConfig
from transformers import MptConfig
from transformers import Qwen3Config
from transformers import RepetitionPenaltyLogitsProcessor
from transformers.generation import BaseStreamer

import hf_specdiff
from hf_specdiff import SpecDiffDrafter
from hf_specdiff.core.draft import DraftTree
from hf_specdiff.core.target import Target
from hf_specdiff.core.text import Text
from hf_specdiff.core.trial import why_not_masked
from tests.conftest import SPECIAL_IDS
from tests.conftest import VOCAB_SIZE
from tests.conftest import make_drafter
from tests.conftest import make_target
from tests.conftest import plain_text
from tests.conftest import shared_target

SHAPES = {
    "chain": {"draft_shape": "chain"},
    "samples": {"draft_shape": "samples", "num_drafts": 4},
    "self_selection": {"draft_shape": "samples", "num_drafts": 4, "acceptance": "self_selection"},
    "tree": {"draft_shape": "tree", "tree_budget": 12},
    "auto": {},
}
CPU = torch.device("cpu")
SMALL = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "initializer_range": 0.6,
    **SPECIAL_IDS,
}
TYPES = {"layer_types": ["sliding_attention", "full_attention"]}
ARCHITECTURES = [
    GPT2Config(vocab_size=VOCAB_SIZE, n_embd=16, n_layer=2, n_head=2, n_positions=64, initializer_range=0.6, **SPECIAL_IDS),
    Qwen3Config(**SMALL),
    MistralConfig(**SMALL, sliding_window=6),
    Gemma3TextConfig(**SMALL, **TYPES, sliding_window=6, query_pre_attn_scalar=8),
]


def batch_of(lengths: list[int], seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Return prompts of different lengths, padded on the left, and their mask."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.zeros(len(lengths), max(lengths), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        ids[row, -length:] = torch.randint(3, 29, (length,), generator=generator)
        mask[row, -length:] = 1
    return ids, mask


def make_model(config: object) -> torch.nn.Module:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("shape", [name for name in SHAPES if name != "auto"])
@pytest.mark.parametrize("lengths", [[5], [4, 7, 1, 6]], ids=["one", "batch"])
def test_greedy_rows_equal_plain_generate(shape: str, lengths: list[int], drafter: SpecDiffDrafter) -> None:
    for seed in range(2):
        target = shared_target(seed)
        ids, mask = batch_of(lengths, seed)
        settings = {"max_new_tokens": 24, "attention_mask": mask}
        expected = plain_text(target, ids, **settings)
        result = hf_specdiff.generate(target, ids, assistant_model=drafter, do_sample=False, **settings, **SHAPES[shape])
        assert torch.equal(result, expected)


@pytest.mark.parametrize("config", ARCHITECTURES, ids=lambda config: config.model_type)
def test_other_architectures(config: object) -> None:
    """Learned positions, and sliding windows shorter than the text, alone and mixed with full attention."""
    target, drafter = make_model(config), make_drafter()
    for lengths in ([9], [3, 10, 6]):
        ids, mask = batch_of(lengths)
        settings = {"do_sample": False, "max_new_tokens": 20, "attention_mask": mask}
        expected = target.generate(ids, **settings)
        for shape in ("chain", "samples", "tree"):
            result = hf_specdiff.generate(target, ids, assistant_model=drafter, **settings, **SHAPES[shape])
            assert torch.equal(result, expected), shape


def test_rows_that_end_early_are_padded_and_leave_the_batch(drafter: SpecDiffDrafter) -> None:
    target = shared_target(2)
    ids, mask = batch_of([4, 7, 2, 6, 5], 3)
    settings = {"do_sample": False, "max_new_tokens": 30, "attention_mask": mask}
    free = target.generate(ids, **settings, eos_token_id=-1)[:, ids.shape[1] :]
    # An end token that some rows write early, some late.
    firsts = {token: [row.tolist().index(token) if token in row else 30 for row in free] for token in range(3, 29)}
    eos = max(firsts, key=lambda token: len(set(firsts[token])))
    assert len(set(firsts[eos])) >= 3
    expected = target.generate(ids, **{**settings, "eos_token_id": eos, "pad_token_id": 0})
    settings |= {"eos_token_id": eos, "pad_token_id": 0}
    for shape in SHAPES.values():
        result = hf_specdiff.generate(target, ids, assistant_model=drafter, **settings, **shape, return_dict_in_generate=True)
        assert torch.equal(result.sequences, expected)
    rows_per_round = [len(row) for row in result.speculation.num_accepted]
    assert rows_per_round == sorted(rows_per_round, reverse=True)
    assert rows_per_round[0] > rows_per_round[-1]


def test_several_sequences_of_one_prompt(drafter: SpecDiffDrafter, prompt: torch.Tensor) -> None:
    target = shared_target()
    torch.manual_seed(0)
    settings = {"do_sample": True, "max_new_tokens": 8, "num_return_sequences": 3}
    result = hf_specdiff.generate(target, prompt, assistant_model=drafter, **settings)
    assert result.shape[0] == 3
    assert torch.equal(result[:, : prompt.shape[1]], prompt.expand(3, -1))
    assert len({tuple(row) for row in result.tolist()}) > 1


@pytest.mark.parametrize("shape", ["chain", "tree"])
def test_processors_see_each_rows_own_prefix(shape: str, drafter: SpecDiffDrafter) -> None:
    target = shared_target(1)
    ids, mask = batch_of([4, 7, 3], 1)
    settings = {"do_sample": False, "max_new_tokens": 20, "attention_mask": mask}
    settings |= {"repetition_penalty": 1.5, "min_new_tokens": 9}
    expected = target.generate(ids, **settings)
    assert torch.equal(hf_specdiff.generate(target, ids, assistant_model=drafter, **settings, **SHAPES[shape]), expected)


@pytest.mark.parametrize("shape", SHAPES)
def test_scores_and_logits_are_those_of_plain_generate(shape: str, drafter: SpecDiffDrafter) -> None:
    target = shared_target(0, eos_token_id=None)
    drafter = make_drafter(drafter.config.target_layer_ids, eos_token_id=None)
    ids, mask = batch_of([4, 6], 1)
    settings = {
        "do_sample": False,
        "max_new_tokens": 12,
        "attention_mask": mask,
        "repetition_penalty": 1.3,
        "return_dict_in_generate": True,
        "output_scores": True,
        "output_logits": True,
    }
    expected = target.generate(ids, **settings)
    result = hf_specdiff.generate(target, ids, assistant_model=drafter, **settings, **SHAPES[shape])
    for name in ("scores", "logits"):
        torch.testing.assert_close(torch.stack(result[name]), torch.stack(expected[name]), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("more", [{}, {"do_sample": True, "top_k": 1}, {"cache_implementation": "static"}], ids=str)
def test_rows_that_have_ended_have_plain_generates_scores(more: dict, drafter: SpecDiffDrafter) -> None:
    """The host goes on computing them, behind padding, until the last row has ended."""
    target = make_target(0, eos_token_id=None)
    drafter = make_drafter(drafter.config.target_layer_ids, eos_token_id=None)
    ids, mask = batch_of([4, 6, 5], 1)
    settings = {"do_sample": False, "max_new_tokens": 16, "attention_mask": mask, "repetition_penalty": 1.3, "pad_token_id": 0}
    free = target.generate(ids, **settings)[:, ids.shape[1] :]
    end = next(token for token in free[1, 4:].tolist() if token not in free[0, :9].tolist())
    settings |= {"eos_token_id": end, "return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    settings |= {"output_hidden_states": True, **more}
    expected = target.generate(ids, **settings)
    ends = (expected.sequences[:, ids.shape[1] :] == end).any(dim=1)
    assert ends.sum() > 0
    for shape in ({"draft_shape": "chain"}, {"draft_shape": "tree"}):
        result = hf_specdiff.generate(target, ids, assistant_model=drafter, **settings, **shape)
        assert torch.equal(result.sequences, expected.sequences)
        for name in ("scores", "logits"):
            torch.testing.assert_close(torch.stack(result[name]), torch.stack(expected[name]), atol=1e-4, rtol=1e-4)
        for ours, plain in zip(result.hidden_states[1:], expected.hidden_states[1:], strict=True):
            torch.testing.assert_close(torch.stack(ours), torch.stack(plain), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("shape", ["chain", "tree"])
@pytest.mark.parametrize("lengths", [[5], [4, 6]], ids=["one", "batch"])
def test_hidden_states_are_those_of_plain_generate(lengths: list[int], shape: str, drafter: SpecDiffDrafter) -> None:
    target = shared_target(0, eos_token_id=None)
    drafter = make_drafter(drafter.config.target_layer_ids, eos_token_id=None)
    ids, mask = batch_of(lengths, 1)
    settings = {"do_sample": False, "max_new_tokens": 12, "attention_mask": mask, "return_dict_in_generate": True}
    settings["output_hidden_states"] = True
    expected = target.generate(ids, **settings)
    result = hf_specdiff.generate(target, ids, assistant_model=drafter, **settings, **SHAPES[shape])
    assert torch.equal(result.sequences, expected.sequences)
    assert len(result.hidden_states) == len(expected.hidden_states)
    is_text = mask.bool()
    for step, (ours, plain) in enumerate(zip(result.hidden_states, expected.hidden_states, strict=True)):
        for our_layer, plain_layer in zip(ours, plain, strict=True):
            assert our_layer.shape == plain_layer.shape
            if step == 0:
                our_layer, plain_layer = our_layer[is_text], plain_layer[is_text]
            torch.testing.assert_close(our_layer, plain_layer, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("shape", ["samples", "tree"])
def test_cache_after_tree_rounds_equals_a_clean_forward(shape: str, drafter: SpecDiffDrafter, prompt: torch.Tensor) -> None:
    """The accepted path's keys and values were moved, nothing was computed twice."""
    target = shared_target(0, eos_token_id=None)
    drafter = make_drafter(drafter.config.target_layer_ids, eos_token_id=None)
    settings = {"do_sample": False, "max_new_tokens": 25, "return_dict_in_generate": True, "draft_temperature": 3.0}
    wide = {**SHAPES[shape], "tree_budget": 200, "num_drafts": 60}
    result = hf_specdiff.generate(target, prompt, assistant_model=drafter, **settings, **wide)
    assert max(count for row in result.speculation.num_accepted for count in row) >= 2
    with torch.no_grad():
        clean = target(result.sequences[:, :-1]).past_key_values
    for ours_layer, clean_layer in zip(result.past_key_values.layers, clean.layers, strict=True):
        torch.testing.assert_close(ours_layer.keys, clean_layer.keys, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(ours_layer.values, clean_layer.values, atol=1e-5, rtol=1e-4)


def test_only_rows_on_the_path_are_processed(monkeypatch: pytest.MonkeyPatch, prompt: torch.Tensor) -> None:
    calls = []
    process = RepetitionPenaltyLogitsProcessor.__call__

    def counting(self: object, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        calls.append(scores.shape[0])
        return process(self, input_ids, scores)

    monkeypatch.setattr(RepetitionPenaltyLogitsProcessor, "__call__", counting)
    target, drafter = shared_target(0, eos_token_id=None), make_drafter(eos_token_id=None)
    settings = {"do_sample": False, "max_new_tokens": 20, "repetition_penalty": 1.2, "return_dict_in_generate": True}
    result = hf_specdiff.generate(target, prompt, assistant_model=drafter, **settings, draft_shape="tree", tree_budget=30)
    # One for each node that is reached, the last of which gave the bonus token.
    assert sum(calls) <= 20 + result.speculation.num_rounds
    assert set(calls) == {1}


def test_a_model_that_reads_the_text_in_order_is_found_out(prompt: torch.Tensor) -> None:
    sizes = {"vocab_size": VOCAB_SIZE, "hidden_size": 16, "n_layer": 2, "n_head": 2, "initializer_range": 0.6}
    alibi = make_model(BloomConfig(**sizes, **SPECIAL_IDS))
    convolving = make_model(Lfm2Config(**SMALL, layer_types=["conv", "full_attention"]))
    for target, words in ((alibi, "Bloom"), (convolving, "conv")):
        assert words in why_not_masked(target, CPU)
        with pytest.raises(ValueError, match="`draft_shape` must be 'chain' here"):
            hf_specdiff.generate(target, prompt, assistant_model=make_drafter(), max_new_tokens=5, draft_shape="tree")
        result = hf_specdiff.generate(
            target, prompt, assistant_model=make_drafter(), max_new_tokens=9, do_sample=False, return_dict_in_generate=True
        )
        assert result.speculation.draft_shape == "chain"
        assert torch.equal(result.sequences, target.generate(prompt, do_sample=False, max_new_tokens=9))


def test_models_are_asked_once() -> None:
    target, passes = make_target(5), []
    target.register_forward_hook(lambda *arguments: passes.append(1))
    assert why_not_masked(target, CPU) is None
    num_passes = len(passes)
    assert num_passes > 0
    assert why_not_masked(target, CPU) is None
    assert len(passes) == num_passes
    target.set_attn_implementation("eager")
    assert why_not_masked(target, CPU) is None
    assert len(passes) == 2 * num_passes


class Silent(BaseStreamer):
    """Take tokens and say nothing."""

    def put(self, value: torch.Tensor) -> None:
        """Take tokens."""

    def end(self) -> None:
        """End."""


def test_what_a_batch_cannot_have_is_refused(tiny_target: LlamaForCausalLM, token_drafter: SpecDiffDrafter) -> None:
    ids, mask = batch_of([3, 5])
    cases = [
        ({"streamer": Silent()}, "`streamer` must be None"),
        ({"attention_mask": mask.flip(1)}, "pad on the left"),
        ({"prefix_allowed_tokens_fn": lambda row, ids: [5]}, "one row at a time"),
    ]
    for kwargs, words in cases:
        settings = {"attention_mask": mask, "max_new_tokens": 4, **kwargs}
        with pytest.raises(ValueError, match=words):
            hf_specdiff.generate(tiny_target, ids, assistant_model=token_drafter, **settings)


def test_one_draft_drawn_from_samples_is_a_chain(tiny_target: LlamaForCausalLM, token_drafter: SpecDiffDrafter) -> None:
    ids, _ = batch_of([6])
    settings = {"do_sample": False, "max_new_tokens": 12, "return_dict_in_generate": True, "num_drafts": 1}
    result = hf_specdiff.generate(tiny_target, ids, assistant_model=token_drafter, **settings, draft_shape="samples")
    assert {count for row in result.speculation.num_drafted[:-6] for count in row} <= {1, 2, 3, 4, 5}
    assert result.speculation.draft_shape == "samples"


def test_speculation_says_what_was_picked(
    tiny_target: LlamaForCausalLM, token_drafter: SpecDiffDrafter, prompt: torch.Tensor
) -> None:
    def picked(**kwargs: object) -> tuple[str, str]:
        settings = {"max_new_tokens": 4, "return_dict_in_generate": True, **kwargs}
        stats = hf_specdiff.generate(tiny_target, prompt, assistant_model=token_drafter, **settings).speculation
        return stats.draft_shape, stats.acceptance

    assert picked(do_sample=False) == ("tree", "match")
    assert picked(do_sample=True) == ("tree", "ratio")
    assert picked(do_sample=True, acceptance="block") == ("chain", "block")
    assert picked(do_sample=True, draft_shape="samples") == ("samples", "match")
    assert picked(do_sample=True, acceptance="self_selection") == ("samples", "self_selection")
    assert picked(do_sample=True, num_denoising_steps=2) == ("chain", "match")
    assert picked(do_sample=True, draft_temperature=0) == ("chain", "match")


def test_windows_that_a_model_measures_by_slots_are_found_out() -> None:
    """GPT-Neo cuts its local layers' window inside them, by the cache's slots: trees would see another window."""
    sizes = {"vocab_size": VOCAB_SIZE, "hidden_size": 16, "num_layers": 2, "num_heads": 2, "max_position_embeddings": 64}
    kinds = {"attention_types": [[["global", "local"], 1]], "window_size": 8, "initializer_range": 0.6}
    target = make_model(GPTNeoConfig(**sizes, **kinds, **SPECIAL_IDS))
    assert "window" in why_not_masked(target, CPU)
    ids, _ = batch_of([20])
    result = hf_specdiff.generate(target, ids, assistant_model=make_drafter(), do_sample=False, max_new_tokens=20)
    assert torch.equal(result, target.generate(ids, do_sample=False, max_new_tokens=20))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_alibi_is_found_out_in_low_precision_too(dtype: torch.dtype) -> None:
    config = MptConfig(vocab_size=VOCAB_SIZE, d_model=16, n_heads=2, n_layers=2, initializer_range=0.02, **SPECIAL_IDS)
    sizes = {"vocab_size": VOCAB_SIZE, "hidden_size": 16, "n_layer": 2, "n_head": 2, "initializer_range": 0.3}
    for model in (make_model(config), make_model(BloomConfig(**sizes, **SPECIAL_IDS)), make_model(Qwen3Config(**SMALL))):
        reason = why_not_masked(model.to(dtype), CPU)
        assert (reason is None) == (model.config.model_type == "qwen3"), reason


@pytest.mark.parametrize("shape", ["chain", "tree"])
@pytest.mark.parametrize("is_whole", [False, True])
def test_a_batch_goes_on_from_a_filled_cache(is_whole: bool, shape: str, drafter: SpecDiffDrafter) -> None:
    target = shared_target(0, eos_token_id=None)
    drafter = make_drafter(drafter.config.target_layer_ids, eos_token_id=None)
    ids, mask = batch_of([30, 34], 4)
    turns = []
    for call in (
        target.generate,
        lambda text, **kwargs: hf_specdiff.generate(target, text, assistant_model=drafter, **kwargs),
    ):
        with torch.no_grad():
            cache = target(ids[:, :-4], attention_mask=mask[:, :-4]).past_key_values
        settings = {"do_sample": False, "max_new_tokens": 12, "attention_mask": mask, "past_key_values": cache}
        settings |= SHAPES[shape] if call != target.generate else {}
        text = ids if is_whole else ids[:, -4:]
        turns.append(call(text, **settings)[:, text.shape[1] :])
    assert torch.equal(turns[0], turns[1])


@pytest.mark.parametrize("shape", SHAPES)
def test_positions_of_the_calls_own_are_gone_on_from(shape: str, token_drafter: SpecDiffDrafter, prompt: torch.Tensor) -> None:
    target = shared_target()
    settings = {"do_sample": False, "max_new_tokens": 15, "position_ids": torch.tensor([[0, 1, 2, 30, 31, 32, 33]])}
    expected = target.generate(prompt, **settings)
    assert not torch.equal(expected, target.generate(prompt, do_sample=False, max_new_tokens=15))
    result = hf_specdiff.generate(target, prompt, assistant_model=token_drafter, **settings, **SHAPES[shape])
    assert torch.equal(result, expected)


def test_self_selection_meets_the_same_obstacles_as_samples(token_drafter: SpecDiffDrafter, prompt: torch.Tensor) -> None:
    settings = {"assistant_model": token_drafter, "max_new_tokens": 5, "acceptance": "self_selection"}
    for kwargs in ({"draft_temperature": 0}, {"num_denoising_steps": 2}):
        with pytest.raises(ValueError, match="`draft_shape` must be 'chain' here"):
            hf_specdiff.generate(shared_target(), prompt, **settings, **kwargs)


@pytest.mark.parametrize("order", ["confidence", "left_to_right"])
def test_several_denoising_steps_in_a_batch(order: str, drafter: SpecDiffDrafter) -> None:
    target = shared_target(1)
    ids, mask = batch_of([4, 7, 1, 6], 1)
    settings = {"do_sample": False, "max_new_tokens": 20, "attention_mask": mask}
    steps = {"num_denoising_steps": 2, "reveal_order": order}
    result = hf_specdiff.generate(target, ids, assistant_model=drafter, **settings, **steps)
    assert torch.equal(result, target.generate(ids, **settings))


def test_a_cache_of_the_callers_own_with_sliding_layers_is_used(token_drafter: SpecDiffDrafter, prompt: torch.Tensor) -> None:
    target = make_model(MistralConfig(**SMALL, sliding_window=6))
    cache = DynamicCache(config=target.config)
    settings = {"do_sample": False, "max_new_tokens": 10, "return_dict_in_generate": True}
    result = hf_specdiff.generate(target, prompt, assistant_model=token_drafter, past_key_values=cache, **settings)
    assert result.past_key_values is cache
    assert cache.get_seq_length() == result.sequences.shape[1] - 1
    assert result.speculation.draft_shape == "chain"


def test_statistics_of_trees_count_depths_not_nodes(token_drafter: SpecDiffDrafter, prompt: torch.Tensor) -> None:
    settings = {"do_sample": False, "max_new_tokens": 20, "return_dict_in_generate": True, **SHAPES["tree"]}
    stats = hf_specdiff.generate(shared_target(), prompt, assistant_model=token_drafter, **settings).speculation
    assert max(count for row in stats.num_drafted for count in row) == 12
    assert len(stats.acceptance_per_position) <= 5
    assert all(0 <= share <= 1 for share in stats.acceptance_per_position)


def test_a_target_with_the_hosts_masks_refuses_trees_and_batches() -> None:
    """Its masks would let branches see each other, and its cache has one end."""
    model = make_target()
    target = Target(model, GenerationConfig(), {"past_key_values": DynamicCache(), "use_cache": True}, None)
    ids, _ = batch_of([4, 4])
    with pytest.raises(ValueError, match="MaskedTarget"):
        target.prefill(Text.of_prompt(ids))
    with pytest.raises(ValueError, match="MaskedTarget"):
        target.verify(Text.of_prompt(ids[:1]), DraftTree(torch.tensor([[5, 6]]), [[0, 0]]))

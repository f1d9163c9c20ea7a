"""What `hf_specdiff.generate` promises: plain decoding's tokens and manners, through ways 1 and 3."""

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers import GPT2Config
from transformers import Lfm2Config
from transformers import LlamaForCausalLM
from transformers import LogitsProcessor
from transformers import LogitsProcessorList
from transformers import MistralConfig
from transformers import Qwen3Config
from transformers import StoppingCriteria

import hf_specdiff
from hf_specdiff import SpecDiffCandidateGenerator
from hf_specdiff import SpecDiffDrafter
from hf_specdiff.core.cache import RaggedCache
from hf_specdiff.core.conditioning import make_drafter as put_around
from hf_specdiff.core.draft import Draft
from hf_specdiff.core.features import Features
from hf_specdiff.core.speculation import SpeculationConfig
from hf_specdiff.core.text import Text
from tests.conftest import MASK_TOKEN_ID
from tests.conftest import SPECIAL_IDS
from tests.conftest import VOCAB_SIZE
from tests.conftest import make_drafter
from tests.conftest import plain_text
from tests.conftest import shared_target


class PerfectDrafter:
    """Drafts windows of five tokens that the target will write, up to a chosen mistake; reads states if it is told to.

    Args:
        text (`torch.Tensor` of shape `(1, L)`, int64): what the target will write.
        num_right (`int`): tokens of a window before the mistake.
        target_layer_ids (`list[int]`, *optional*): layers to read; the states must be those of the tokens in between.
    """

    def __init__(self, text: torch.Tensor, num_right: int, target_layer_ids: list[int] | None = None) -> None:
        self.text = text
        self.num_right = num_right
        self.target_layer_ids = target_layer_ids
        self.num_seen = 0

    def draft(self, text: Text, features: Features | None) -> Draft:
        assert (features is None) == (self.target_layer_ids is None)
        if features is not None:
            self.num_seen += features.states.shape[1]
            assert self.num_seen == text.lengths[0] - 1
        length = text.lengths[0]
        tokens = self.text[0, length : length + 5].clone()
        tokens = torch.nn.functional.pad(tokens, (0, 5 - len(tokens)), value=3)
        tokens[self.num_right :] = (tokens[self.num_right :] + 1) % 29
        return Draft(tokens[None], None, has_prefix_law=True)


def features_of(states: torch.Tensor | None) -> Features | None:
    return None if states is None else Features(states, [states.shape[1]] * states.shape[0])


def plain(target: LlamaForCausalLM, prompt: torch.Tensor, **kwargs: object) -> torch.Tensor:
    return target.generate(prompt, do_sample=False, **kwargs)


def ours(
    target: LlamaForCausalLM, prompt: torch.Tensor, drafter: SpecDiffDrafter | PerfectDrafter, **kwargs: object
) -> torch.Tensor:
    settings = {"do_sample": False, "draft_shape": "chain", **kwargs}
    return hf_specdiff.generate(target, prompt, assistant_model=drafter, **settings)


@pytest.mark.parametrize(
    ("gamma", "order", "steps"),
    [(gamma, "confidence", 1) for gamma in (1, 3, 5)]  # in one step all are revealed
    + [(gamma, order, steps) for gamma, steps in ((3, 2), (3, 3), (5, 2), (5, 5)) for order in ("confidence", "left_to_right")],
)
def test_greedy_tokens_equal_plain_generate(drafter: SpecDiffDrafter, gamma: int, order: str, steps: int) -> None:
    for seed in range(2):
        target = shared_target(seed, eos_token_id=None)
        prompt = torch.randint(3, 29, (1, 4 + seed), generator=torch.Generator().manual_seed(seed))
        settings = {"gamma": gamma, "num_denoising_steps": steps, "reveal_order": order}
        drafter_without_eos = make_drafter(drafter.config.target_layer_ids, eos_token_id=None)
        expected = plain_text(target, prompt, max_new_tokens=30)
        assert torch.equal(ours(target, prompt, drafter_without_eos, max_new_tokens=30, **settings), expected)


@pytest.mark.parametrize("layers", [None, [0, 2]], ids=["tokens", "features"])
@pytest.mark.parametrize("num_right", [0, 2, 5])
@pytest.mark.parametrize("limit", range(1, 14))
def test_length_limits_cut_a_window(layers: list[int] | None, prompt: torch.Tensor, limit: int, num_right: int) -> None:
    target = shared_target(eos_token_id=None)
    expected = plain_text(target, prompt, max_new_tokens=limit)
    text = plain_text(target, prompt, max_new_tokens=40)
    for limits in ({"max_new_tokens": limit}, {"max_length": prompt.shape[1] + limit}):
        assert torch.equal(ours(target, prompt, PerfectDrafter(text, num_right, layers), **limits), expected)


@pytest.mark.parametrize("position", range(8))
def test_eos_inside_a_window_ends_the_text(prompt: torch.Tensor, position: int) -> None:
    target = shared_target(eos_token_id=None)
    text = plain_text(target, prompt, max_new_tokens=30)
    drafter = PerfectDrafter(text, 5)
    eos = int(text[0, prompt.shape[1] + position])
    expected = plain(target, prompt, max_new_tokens=30, eos_token_id=eos, pad_token_id=0)
    assert torch.equal(ours(target, prompt, drafter, max_new_tokens=30, eos_token_id=eos, pad_token_id=0), expected)


class StopAtLength(StoppingCriteria):
    """A user's own criterion, true once the text has some length; remembers every length it was asked about."""

    def __init__(self, length: int) -> None:
        self.length = length
        self.asked: list[int] = []
        self.num_scores: list[int | None] = []

    def __call__(self, input_ids: torch.Tensor, scores: tuple | None, **kwargs: object) -> torch.Tensor:
        self.asked.append(input_ids.shape[1])
        self.num_scores.append(None if scores is None else len(scores))
        return torch.full((input_ids.shape[0],), input_ids.shape[1] >= self.length)


@pytest.mark.parametrize("with_scores", [False, True])
@pytest.mark.parametrize("extra", range(1, 9))
def test_a_stopping_criterion_inside_a_window_is_asked_as_in_plain_generate(
    prompt: torch.Tensor, extra: int, with_scores: bool
) -> None:
    target = shared_target(eos_token_id=None)
    drafter = PerfectDrafter(plain_text(target, prompt, max_new_tokens=40), 5)
    criteria = [StopAtLength(prompt.shape[1] + extra) for _ in range(2)]
    settings = {"max_new_tokens": 30, "return_dict_in_generate": with_scores, "output_scores": with_scores}
    expected = plain(target, prompt, stopping_criteria=[criteria[0]], **settings)
    result = ours(target, prompt, drafter, stopping_criteria=[criteria[1]], **settings)
    if with_scores:
        expected, result = expected.sequences, result.sequences
    assert torch.equal(result, expected)
    assert criteria[1].asked == criteria[0].asked
    assert criteria[1].num_scores == criteria[0].num_scores


def test_prompts_of_one_token_and_repeated_calls(tiny_target: LlamaForCausalLM, drafter: SpecDiffDrafter) -> None:
    for token in (1, 7, 12, 7):
        prompt = torch.tensor([[token]])
        expected = plain(tiny_target, prompt, max_new_tokens=20)
        for _ in range(2):
            assert torch.equal(ours(tiny_target, prompt, drafter, max_new_tokens=20), expected)


def pad_left(prompt: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    padded = torch.cat([torch.zeros(1, count, dtype=torch.long), prompt], dim=1)
    return padded, (torch.arange(padded.shape[1]) >= count).long()[None]


def test_left_padding_changes_nothing(tiny_target: LlamaForCausalLM, drafter: SpecDiffDrafter, prompt: torch.Tensor) -> None:
    padded, mask = pad_left(prompt, 3)
    without = ours(tiny_target, prompt, drafter, max_new_tokens=20)
    result = ours(tiny_target, padded, drafter, attention_mask=mask, max_new_tokens=20)
    assert torch.equal(result, plain(tiny_target, padded, attention_mask=mask, max_new_tokens=20))
    assert torch.equal(result[:, 3:], without)


@pytest.mark.parametrize("layers", [None, [0, 2]])
def test_the_drafter_does_not_see_padding(layers: list[int] | None, prompt: torch.Tensor) -> None:
    """Round by round the window's logits are those without padding; a drafter that saw it would draft something else."""
    padded, mask = pad_left(prompt, 3)
    features = None if layers is None else torch.randn(1, 6, 32, generator=torch.Generator().manual_seed(0))
    window = torch.tensor([[3] + [MASK_TOKEN_ID] * 5])
    logits = []
    for ids, key_mask, states in (
        (prompt, None, features),
        (padded, mask, None if features is None else torch.nn.functional.pad(features, (0, 0, 3, 0), value=7.0)),
    ):
        put = put_around(
            make_drafter(layers), shared_target(), SpeculationConfig(5, draft_temperature=0.0), LogitsProcessorList()
        )
        put.rows = RaggedCache(put.cache, 1)
        text = Text.of_prompt(ids, key_mask)
        with torch.no_grad():
            put.window_logits(window, text, features_of(states))
            logits.append(put.window_logits(window, text, None))
    torch.testing.assert_close(logits[0], logits[1], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("is_padded", [False, True])
@pytest.mark.parametrize("is_whole", [False, True])
@pytest.mark.parametrize("shape", ["chain", "tree"])
def test_a_filled_cache_is_gone_on_from(
    drafter: SpecDiffDrafter, prompt: torch.Tensor, shape: str, is_whole: bool, is_padded: bool
) -> None:
    """A second turn that passes the first one's cache, with the whole text or with the new tokens alone."""
    target = shared_target(eos_token_id=None)
    drafter = make_drafter(drafter.config.target_layer_ids, eos_token_id=None)
    first, mask = pad_left(prompt, 2 if is_padded else 0)
    turns = []
    for call in (plain, lambda model, ids, **kwargs: ours(model, ids, drafter, draft_shape=shape, **kwargs)):
        output = call(target, first, attention_mask=mask, max_new_tokens=6, return_dict_in_generate=True)
        text = torch.cat([output.sequences, torch.tensor([[4, 9]])], dim=1)
        full_mask = torch.nn.functional.pad(mask, (0, 8), value=1)
        ids = text if is_whole else text[:, output.past_key_values.get_seq_length() :]
        more = call(target, ids, attention_mask=full_mask, past_key_values=output.past_key_values, max_new_tokens=9)
        turns.append(more[:, ids.shape[1] :])
    assert torch.equal(turns[0], turns[1])


def test_token_types_go_on_with_the_last_ones(drafter: SpecDiffDrafter, prompt: torch.Tensor) -> None:
    torch.manual_seed(0)
    config = GPT2Config(
        n_embd=16, n_head=2, n_layer=3, n_positions=128, vocab_size=VOCAB_SIZE, initializer_range=0.6, **SPECIAL_IDS
    )
    target = AutoModelForCausalLM.from_config(config).eval()
    types = torch.tensor([[3, 3, 3, 3, 3, 3, 4]])
    expected = plain(target, prompt, token_type_ids=types, max_new_tokens=20)
    for shape in ("chain", "tree"):
        result = ours(target, prompt, drafter, token_type_ids=types, max_new_tokens=20, draft_shape=shape)
        assert torch.equal(result, expected)


def test_a_drafter_that_holds_this_file_as_its_generate_stays_a_drafter(
    token_drafter: SpecDiffDrafter, prompt: torch.Tensor
) -> None:
    """As the host calls it where a Hub repository holds drafter and strategy in one."""
    expected = token_drafter.generate(input_ids=prompt, max_new_tokens=4).sequences
    assert torch.equal(hf_specdiff.generate(token_drafter, input_ids=prompt, max_new_tokens=4).sequences, expected)


def test_way_one_with_left_padding(tiny_target: LlamaForCausalLM, token_drafter: SpecDiffDrafter, prompt: torch.Tensor) -> None:
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), prompt], dim=1)
    mask = (torch.arange(padded.shape[1]) >= 3).long()[None]
    expected = plain(tiny_target, padded, attention_mask=mask, max_new_tokens=20)
    assert torch.equal(
        plain(tiny_target, padded, attention_mask=mask, max_new_tokens=20, assistant_model=token_drafter), expected
    )


def test_way_one_greedy_equals_plain_generate(token_drafter: SpecDiffDrafter) -> None:
    for seed in range(4):
        target = shared_target(seed)
        prompt = torch.randint(3, 29, (1, 1 + 2 * seed), generator=torch.Generator().manual_seed(seed))
        expected = plain(target, prompt, max_new_tokens=25)
        assert torch.equal(plain(target, prompt, max_new_tokens=25, assistant_model=token_drafter), expected)


def test_the_hosts_dflash_loop_runs_a_feature_drafter(
    tiny_target: LlamaForCausalLM, feature_drafter: SpecDiffDrafter, prompt: torch.Tensor
) -> None:
    expected = plain(tiny_target, prompt, max_new_tokens=25)
    result = plain(tiny_target, prompt, max_new_tokens=25, assistant_model=feature_drafter, speculation_type="dflash")
    assert torch.equal(result, expected)


def test_way_one_refuses_a_feature_drafter(
    tiny_target: LlamaForCausalLM, feature_drafter: SpecDiffDrafter, prompt: torch.Tensor
) -> None:
    with pytest.raises(ValueError, match=r"hf_specdiff\.generate"):
        plain(tiny_target, prompt, max_new_tokens=5, assistant_model=feature_drafter)


class LoopWithOurCandidates(LlamaForCausalLM):
    """The host's own assisted loop, handed our candidate generator: how anyone who owns a loop uses it."""

    def _get_candidate_generator(self, generation_config: object, assistant_model: object, **kwargs: object) -> object:
        return SpecDiffCandidateGenerator(
            assistant_model,
            generation_config,
            logits_processor=kwargs["logits_processor"],
            model_kwargs=kwargs["model_kwargs"],
            target=self,
        )


def test_the_hosts_loop_runs_our_candidate_generator(
    tiny_target: LlamaForCausalLM, drafter: SpecDiffDrafter, prompt: torch.Tensor
) -> None:
    target = LoopWithOurCandidates(tiny_target.config).eval()
    target.load_state_dict(tiny_target.state_dict())
    expected = plain(tiny_target, prompt, max_new_tokens=25, repetition_penalty=1.3)
    assert torch.equal(plain(target, prompt, max_new_tokens=25, repetition_penalty=1.3, assistant_model=drafter), expected)


def test_scores_and_logits_are_those_of_plain_generate(
    tiny_target: LlamaForCausalLM, drafter: SpecDiffDrafter, prompt: torch.Tensor
) -> None:
    settings = {
        "max_new_tokens": 17,
        "repetition_penalty": 1.2,
        "return_dict_in_generate": True,
        "output_scores": True,
        "output_logits": True,
    }
    expected = plain(tiny_target, prompt, **settings)
    result = ours(tiny_target, prompt, drafter, **settings)
    assert torch.equal(result.sequences, expected.sequences)
    for name in ("scores", "logits"):
        assert len(result[name]) == len(expected[name])
        torch.testing.assert_close(torch.stack(result[name]), torch.stack(expected[name]), atol=1e-4, rtol=1e-4)
    assert len(result.scores) == result.sequences.shape[1] - prompt.shape[1]


@pytest.mark.parametrize("layers", [None, [0, 2]], ids=["tokens", "features"])
def test_cache_after_rounds_equals_a_clean_forward(layers: list[int] | None, prompt: torch.Tensor) -> None:
    """Whatever was accepted and rejected on the way, the keys and values left are those of the text without its last token."""
    target = shared_target(eos_token_id=None)
    text = plain_text(target, prompt, max_new_tokens=40)
    for num_right in (0, 1, 3, 5):
        drafter = PerfectDrafter(text, num_right, layers)
        result = ours(target, prompt, drafter, max_new_tokens=21, return_dict_in_generate=True)
        assert {count for row in result.speculation.num_accepted[:-1] for count in row} == {num_right}
        with torch.no_grad():
            clean = target(result.sequences[:, :-1]).past_key_values
        assert result.past_key_values.get_seq_length() == result.sequences.shape[1] - 1
        for ours_layer, clean_layer in zip(result.past_key_values.layers, clean.layers, strict=True):
            torch.testing.assert_close(ours_layer.keys, clean_layer.keys, atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(ours_layer.values, clean_layer.values, atol=1e-5, rtol=1e-4)


def test_drafter_cache_gives_the_logits_of_an_uncached_pass(prompt: torch.Tensor) -> None:
    """Context taken in piece by piece, windows rolled back: the same window logits as all at once."""
    target, speculation = shared_target(), SpeculationConfig(5, draft_temperature=0.0)
    for layers in (None, [0, 2]):
        network = make_drafter(layers)
        text = torch.randint(3, 29, (1, 20), generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            states = target(text, output_hidden_states=True).hidden_states
        features = None if layers is None else torch.cat([states[i + 1] for i in layers], dim=-1)
        pieces = put_around(network, target, speculation, LogitsProcessorList())
        done = 0
        for length in (5, 6, 11, 20):
            new = None if features is None else features[:, done : length - 1]
            stepwise = pieces.draft(Text.of_prompt(text[:, :length]), features_of(new))
            whole = put_around(network, target, speculation, LogitsProcessorList())
            everything = None if features is None else features[:, : length - 1]
            at_once = whole.draft(Text.of_prompt(text[:, :length]), features_of(everything))
            assert torch.equal(stepwise.tokens, at_once.tokens)
            done = length - 1
            for kept, fresh in zip(pieces.cache.layers, whole.cache.layers, strict=True):
                torch.testing.assert_close(kept.keys, fresh.keys, atol=1e-5, rtol=1e-4)


class Recorder:
    """A streamer that keeps what it is given."""

    def __init__(self) -> None:
        self.pieces: list[list[int]] = []
        self.has_ended = False

    def put(self, value: torch.Tensor) -> None:
        self.pieces.append(value.flatten().tolist())

    def end(self) -> None:
        self.has_ended = True


def test_streamer_gets_what_plain_generate_gives_it(
    tiny_target: LlamaForCausalLM, drafter: SpecDiffDrafter, prompt: torch.Tensor
) -> None:
    recorders = [Recorder(), Recorder()]
    plain(tiny_target, prompt, max_new_tokens=20, streamer=recorders[0])
    ours(tiny_target, prompt, drafter, max_new_tokens=20, streamer=recorders[1])
    assert recorders[1].pieces == recorders[0].pieces
    assert recorders[1].has_ended


class BanAfterRepeat(LogitsProcessor):
    """A user's own processor that reads the prefix: the last token may not come again."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return scores.scatter(1, input_ids[:, -1:], -torch.inf)


@pytest.mark.parametrize(
    "settings",
    [
        {"repetition_penalty": 1.5},
        {"no_repeat_ngram_size": 2},
        {"min_new_tokens": 12},
        {"suppress_tokens": [3, 4, 5, 6, 7, 8, 9]},
        {"bad_words_ids": [[5], [7, 3]]},
        {"logits_processor": [BanAfterRepeat()]},
        {"forced_eos_token_id": 2},
        {"exponential_decay_length_penalty": (4, 1.3)},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_processors_see_the_true_prefix(drafter: SpecDiffDrafter, prompt: torch.Tensor, settings: dict) -> None:
    """Drafts that are right up to the third or the last token, so that rows deep in the window need their own prefix."""
    for seed in range(2):
        target = shared_target(seed)
        expected = plain(target, prompt, max_new_tokens=24, **settings)
        assert torch.equal(ours(target, prompt, drafter, max_new_tokens=24, **settings), expected)
        for num_right in (3, 5):
            perfect = PerfectDrafter(expected, num_right)
            assert torch.equal(ours(target, prompt, perfect, max_new_tokens=24, **settings), expected)


@pytest.mark.parametrize(
    "config",
    [
        Qwen3Config(head_dim=8, use_sliding_window=True, sliding_window=8, max_window_layers=1),
        MistralConfig(head_dim=8, sliding_window=8),
        GPT2Config(n_embd=16, n_head=2, n_layer=3, n_positions=128),
        Lfm2Config(num_hidden_layers=3, layer_types=["conv", "full_attention", "conv"], conv_L_cache=3),
    ],
    ids=["qwen3-sliding-layers", "mistral-sliding", "gpt2-learned-positions", "lfm2-convolutions"],
)
def test_greedy_equality_on_other_architectures(drafter: SpecDiffDrafter, prompt: torch.Tensor, config: object) -> None:
    torch.manual_seed(0)
    shape = {"vocab_size": VOCAB_SIZE, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, **SPECIAL_IDS}
    if config.model_type == "gpt2":
        shape = {"vocab_size": VOCAB_SIZE, **SPECIAL_IDS}
    else:
        shape |= {"num_attention_heads": 2, "num_key_value_heads": 1}
        if config.model_type == "qwen3":
            shape["layer_types"] = None  # to be made anew for three layers
    config = type(config)(**{**config.to_diff_dict(), **shape, "initializer_range": 0.6})
    target = AutoModelForCausalLM.from_config(config).eval()
    expected = plain(target, prompt, max_new_tokens=30)
    assert torch.equal(ours(target, prompt, drafter, max_new_tokens=30), expected)


def test_drafter_defaults_come_from_its_generation_config(tiny_target: LlamaForCausalLM, prompt: torch.Tensor) -> None:
    drafter = make_drafter()
    drafter.generation_config.gamma = 2
    settings = {"max_new_tokens": 12, "return_dict_in_generate": True}
    assert max(ours(tiny_target, prompt, drafter, **settings).speculation.num_drafted) == [2]
    assert max(ours(tiny_target, prompt, drafter, gamma=4, **settings).speculation.num_drafted) == [4]


def test_statistics_add_up(tiny_target: LlamaForCausalLM, drafter: SpecDiffDrafter, prompt: torch.Tensor) -> None:
    result = ours(tiny_target, prompt, drafter, max_new_tokens=25, return_dict_in_generate=True)
    stats, num_new = result.speculation, result.sequences.shape[1] - prompt.shape[1]
    # The prefill wrote the first token, the rounds all others.
    assert stats.num_rounds * stats.tokens_per_round == pytest.approx(num_new - 1)
    assert stats.num_drafted_tokens == sum(map(sum, stats.num_drafted))
    assert len(stats.acceptance_per_position) == max(map(max, stats.num_drafted))
    assert 0 <= stats.acceptance_rate <= 1
    parts = (stats.prefill_seconds, stats.drafter_seconds, stats.target_seconds, stats.other_seconds)
    assert all(seconds > 0 for seconds in parts)
    assert sum(parts) == pytest.approx(stats.total_seconds)


def test_stop_strings_need_the_tokenizer(drafter: SpecDiffDrafter) -> None:
    with pytest.raises(ValueError, match="`tokenizer` must be given"):
        ours(shared_target(), torch.tensor([[1, 5]]), drafter, max_new_tokens=5, stop_strings=["a"])

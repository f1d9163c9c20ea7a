"""The whole promise, through the whole loop: sampled text has the law of plain `generate`, under every kind of processor.

Every random choice of a call goes through `torch.multinomial`, and in the host's own loop through `torch.rand_like` of what it
compares the numbers with. Replacing both by an oracle that replays a script of choices and multiplies their probabilities lets
a test walk through all runs of a call, so its output law is exact, not sampled.
"""

from collections import Counter
from collections.abc import Callable
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
from transformers import GenerationConfig
from transformers import LlamaConfig
from transformers import LlamaForCausalLM
from transformers import LogitsProcessor
from transformers import LogitsProcessorList

import hf_specdiff
from hf_specdiff import Profile
from hf_specdiff import SpecDiffCandidateGenerator
from hf_specdiff import SpecDiffDrafter
from hf_specdiff.core import drafters
from hf_specdiff.core import shapes
from hf_specdiff.core.costs import Calibration
from hf_specdiff.core.draft import Draft
from hf_specdiff.core.draft import DraftTree
from hf_specdiff.core.draft import Outcome
from hf_specdiff.core.draft import SampledChildren
from hf_specdiff.core.features import Features
from hf_specdiff.core.rules import make_rule
from hf_specdiff.core.sampling import Scores
from hf_specdiff.core.sampling import draw
from hf_specdiff.core.sampling import draw_from_scores
from hf_specdiff.core.stateful_target import Snapshot
from hf_specdiff.core.text import Text
from hf_specdiff.core.tree import merge_drafts
from tests.conftest import make_drafter
from tests.core.tiny_models import make_model

Ids = tuple[int, ...]
# Plain decoding works in float32, so that is how closely the two laws can agree.
TOLERANCE = 2e-6
PROMPT = torch.tensor([[1, 2]])


class Oracle:
    """A stand-in for torch's random numbers that replays choices, and takes the first possible one where the script ends."""

    def __init__(self, script: list[int]) -> None:
        self.script = script
        self.choices: list[tuple[int, list[int]]] = []
        self.probability = 1.0

    def __call__(self, probs: torch.Tensor, num_samples: int = 1) -> torch.Tensor:
        assert num_samples == 1
        rows = probs if probs.dim() == 2 else probs[None]
        return torch.tensor([[self._choose(row / row.sum())] for row in rows.double()])

    def accept(self, ratios: torch.Tensor) -> torch.Tensor:
        """Stand in for `torch.rand_like`: a number that is no more than a ratio accepts, one that exceeds it rejects."""
        numbers = []
        for ratio in ratios.double().flatten().tolist():
            rejection = 1 - min(ratio, 1.0)
            law = torch.tensor([1 - rejection, rejection if rejection > TOLERANCE / 4 else 0.0])  # not for rounding's sake
            numbers.append(2.0 * self._choose(law))
        return torch.tensor(numbers).view(ratios.shape)

    def _choose(self, law: torch.Tensor) -> int:
        possible = law.nonzero().flatten().tolist()
        step = len(self.choices)
        choice: int = self.script[step] if step < len(self.script) else possible[0]
        self.choices.append((choice, possible))
        self.probability *= float(law[choice])
        return choice


def all_runs(call: Callable[[], torch.Tensor], monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Ids, float]]:
    """Yield output and probability of every possible run of a call."""
    script: list[int] | None = []
    while script is not None:
        oracle = Oracle(script)
        with monkeypatch.context() as patch:
            patch.setattr(torch, "multinomial", oracle)
            patch.setattr(torch, "rand_like", oracle.accept)
            text = tuple(call()[0].tolist())
        yield text, oracle.probability
        script = None
        for step in reversed(range(len(oracle.choices))):
            choice, possible = oracle.choices[step]
            later = [other for other in possible if other > choice]
            if later:
                script = [taken for taken, _ in oracle.choices[:step]] + later[:1]
                break


def law_of(call: Callable[[], torch.Tensor], monkeypatch: pytest.MonkeyPatch) -> Counter:
    law: Counter = Counter()
    for text, probability in all_runs(call, monkeypatch):
        law[text] += probability
    assert sum(law.values()) == pytest.approx(1.0, abs=1e-5)
    return law


def distance(one: Counter, other: Counter) -> float:
    return 0.5 * sum(abs(one[text] - other[text]) for text in one.keys() | other.keys())


@pytest.fixture(scope="module")
def target() -> LlamaForCausalLM:
    """Vocabulary 4, of which the mask (3) is never drafted; an end token (0) that does come."""
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=4,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.5,
        bos_token_id=1,
        eos_token_id=0,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def plain_law(target: LlamaForCausalLM) -> Callable[[dict], Counter]:
    """Return the law of plain `generate` under given settings; many tests compare with the same one."""
    known: dict[str, Counter] = {}

    def law(settings: dict) -> Counter:
        name = repr(sorted(settings.items()))
        if name not in known:
            with pytest.MonkeyPatch.context() as patch:
                known[name] = law_of(lambda: target.generate(PROMPT, **settings), patch)
        return known[name]

    return law


def drafter_for(layers: list[int] | None, model: Any | None = None) -> SpecDiffDrafter:
    return make_drafter(
        layers,
        seed=5,
        hidden_size=16 if model is None else model.config.hidden_size,
        vocab_size=4,
        mask_token_id=3,
        block_size=4,
        intermediate_size=16,
        initializer_range=0.6,
        bos_token_id=1,
        eos_token_id=0,
        pad_token_id=0,
    )


# Those that read no prefix are asked of a whole window at once, the others token by token.
PROCESSORS = {
    "none": {"top_k": 0},
    "warpers": {"top_k": 3, "temperature": 0.6, "top_p": 0.9},
    "repetition_penalty": {"top_k": 0, "repetition_penalty": 1.7},
    "all": {"top_k": 3, "temperature": 1.4, "top_p": 0.9, "repetition_penalty": 1.2},
}
SCHEMES = {
    "ratio": {"acceptance": "ratio"},
    "block": {"acceptance": "block"},
    "match": {"acceptance": "match", "draft_shape": "chain"},
    "auto-chain": {"draft_shape": "chain"},
    "hot-drafts": {"acceptance": "block", "draft_temperature": 2.0},
    "argmax-drafts": {"acceptance": "ratio", "draft_temperature": 0},
}
BY_MATCH = "two-steps-by-confidence-match"
STEPPED = {
    "two-steps-in-order-ratio": {"num_denoising_steps": 2, "reveal_order": "left_to_right", "acceptance": "ratio"},
    "two-steps-in-order-block": {"num_denoising_steps": 2, "reveal_order": "left_to_right", "acceptance": "block"},
    BY_MATCH: {"num_denoising_steps": 2, "reveal_order": "confidence", "acceptance": "match"},
    "two-steps-by-confidence-argmax": {
        "num_denoising_steps": 2,
        "reveal_order": "confidence",
        "acceptance": "ratio",
        "draft_temperature": 0,
    },
}

PROFILE = Profile([1, 65], [0.010, 0.100], drafter_seconds=0.0005)
MANY = {
    "samples-match": {"draft_shape": "samples", "acceptance": "match", "num_drafts": 2, "gamma": 2},
    "samples-self-selection": {"draft_shape": "samples", "acceptance": "self_selection", "num_drafts": 2, "gamma": 2},
    "tree-match": {"draft_shape": "tree", "acceptance": "match", "tree_budget": 4},
    "tree-ratio": {"draft_shape": "tree", "acceptance": "ratio", "tree_budget": 4, "gamma": 2},
    "hot-tree-ratio": {"draft_shape": "tree", "acceptance": "ratio", "tree_budget": 5, "gamma": 2, "draft_temperature": 3.0},
    "auto": {"gamma": 2, "tree_budget": 3},
    # Sizes that follow a profile and what was accepted so far; never what was just drawn.
    "adaptive-tree-ratio": {"draft_shape": "tree", "acceptance": "ratio", "tree_budget": "auto", "profile": PROFILE},
    "adaptive-tree-match": {"draft_shape": "tree", "acceptance": "match", "tree_budget": "auto", "profile": PROFILE},
    "adaptive-chain-ratio": {"draft_shape": "chain", "acceptance": "ratio", "gamma": "auto", "profile": PROFILE},
    "adaptive-chain-block": {"draft_shape": "chain", "acceptance": "block", "gamma": "auto", "profile": PROFILE},
}


@pytest.mark.parametrize(
    ("layers", "processors"),
    [(None, "none"), (None, "warpers"), (None, "all"), ([0, 1], "all")],
    ids=["tokens-none", "tokens-warpers", "tokens-all", "features-all"],
)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_sampling_preserves_the_law_of_plain_generate(
    scheme: str,
    processors: str,
    layers: list[int] | None,
    target: LlamaForCausalLM,
    plain_law: Callable[[dict], Counter],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings = {"max_new_tokens": 3, "do_sample": True, **PROCESSORS[processors]}
    drafter = drafter_for(layers)
    plain = plain_law(settings)
    ours = law_of(
        lambda: hf_specdiff.generate(target, PROMPT, assistant_model=drafter, **settings, **SCHEMES[scheme]), monkeypatch
    )
    assert distance(plain, ours) < TOLERANCE


@pytest.mark.parametrize(
    ("scheme", "processors", "length"),
    # Match draws a target token for every row, so its runs are many: a text shorter by one has to do, and takes a fifth.
    [(scheme, name, 4) for scheme in STEPPED if scheme != BY_MATCH for name in ("none", "repetition_penalty")]
    + [(BY_MATCH, "repetition_penalty", 3), pytest.param(BY_MATCH, "repetition_penalty", 4, marks=pytest.mark.slow)],
)
def test_several_denoising_steps_preserve_the_law(
    scheme: str,
    processors: str,
    length: int,
    target: LlamaForCausalLM,
    plain_law: Callable[[dict], Counter],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings = {"max_new_tokens": length, "do_sample": True, **PROCESSORS[processors], "top_k": 2}
    drafter = drafter_for(None)
    plain = plain_law(settings)
    ours = law_of(
        lambda: hf_specdiff.generate(target, PROMPT, assistant_model=drafter, gamma=2, **settings, **STEPPED[scheme]),
        monkeypatch,
    )
    assert distance(plain, ours) < TOLERANCE


@pytest.mark.parametrize("scheme", ["ratio", "block", "auto-chain", "hot-drafts", "argmax-drafts"])
def test_windows_of_two_tokens_preserve_the_law(
    scheme: str, target: LlamaForCausalLM, plain_law: Callable[[dict], Counter], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Long enough for two drafted tokens and a bonus token in one round."""
    settings = {"max_new_tokens": 4, "do_sample": True, "top_k": 2, "repetition_penalty": 1.3}
    drafter = drafter_for(None)
    plain = plain_law(settings)
    ours = law_of(
        lambda: hf_specdiff.generate(target, PROMPT, assistant_model=drafter, **settings, **SCHEMES[scheme]), monkeypatch
    )
    assert distance(plain, ours) < TOLERANCE


PROCESSED = {"temperature": 0.7, "repetition_penalty": 1.3}


# Joint samples have many runs: three tokens, of which drafts reach one, and once four, some of them certain.
PAIRS = {
    "tokens-plain": (None, {}, 3),
    "tokens-processed": (None, {**PROCESSED, "top_p": 0.7}, 4),
    "features-processed": ([0, 1], PROCESSED, 3),
}


@pytest.mark.parametrize(
    ("scheme", "layers", "processors", "length"),
    # "auto" picks one of the others; sizes that follow a profile have a test of their own below, with processors.
    [
        pytest.param(scheme, *pair, id=f"{scheme}-{name}")
        for scheme in MANY
        for name, pair in PAIRS.items()
        if name == "tokens-plain" or not scheme.startswith(("auto", "adaptive"))
    ],
)
def test_many_drafts_preserve_the_law(
    scheme: str,
    layers: list[int] | None,
    processors: dict,
    length: int,
    target: LlamaForCausalLM,
    plain_law: Callable[[dict], Counter],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings = {"max_new_tokens": length if "samples" in scheme else 4, "do_sample": True, "top_k": 2, **processors}
    drafter = drafter_for(layers)
    plain = plain_law(settings)
    ours = law_of(
        lambda: hf_specdiff.generate(target, PROMPT, assistant_model=drafter, **settings, **MANY[scheme]), monkeypatch
    )
    assert distance(plain, ours) < TOLERANCE


@pytest.mark.parametrize(
    "scheme",
    [
        {"draft_shape": "chain", "acceptance": "block"},
        {"draft_shape": "tree", "acceptance": "ratio", "tree_budget": 2},
        {"draft_shape": "tree", "acceptance": "match", "tree_budget": 2},
    ],
    ids=["chain-block", "tree-ratio", "tree-match"],
)
def test_rows_of_a_batch_keep_their_joint_law(
    scheme: dict, target: LlamaForCausalLM, plain_joint_law: Counter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows accept and end at their own pace, one of them padded, and stay as independent as in plain generate."""
    drafter = drafter_for(None)

    def ours(ids: torch.Tensor, **kwargs: object) -> torch.Tensor:
        return hf_specdiff.generate(target, ids, assistant_model=drafter, **scheme, **kwargs)

    assert distance(plain_joint_law, law_of(lambda: of_two_rows(ours), monkeypatch)) < TOLERANCE


def of_two_rows(call: Callable[..., torch.Tensor]) -> torch.Tensor:
    """Return what a call writes for two prompts, one behind the other."""
    ids, mask = torch.tensor([[0, 1], [1, 2]]), torch.tensor([[0, 1], [1, 1]])
    result = call(ids, attention_mask=mask, max_new_tokens=3, do_sample=True, top_k=2, temperature=1.3)
    return torch.nn.functional.pad(result, (0, ids.shape[1] + 3 - result.shape[1])).flatten()[None]


@pytest.fixture(scope="module")
def plain_joint_law(target: LlamaForCausalLM) -> Counter:
    with pytest.MonkeyPatch.context() as patch:
        return law_of(lambda: of_two_rows(target.generate), patch)


class Grammar(LogitsProcessor):
    """Token 2 never follows token 1; whoever asks what follows a text in which it does, or one that has ended, is in error."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        (text,) = input_ids[:, PROMPT.shape[1] :].tolist()
        if 0 in text or (1, 2) in pairwise(text):
            raise KeyError(f"{text} is no text of this grammar")
        scores = scores.clone()
        if text[-1:] == [1]:
            scores[:, 2] = -torch.inf
        return scores


class OnlyNan(Grammar):
    """The same, but for the answer: all tokens are forbidden."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        try:
            return super().__call__(input_ids, scores)
        except KeyError:
            return torch.full_like(scores, -torch.inf)


STRICT = {
    **{name: SCHEMES[name] for name in ("ratio", "block", "argmax-drafts")},
    "two-steps-in-order-block": {**STEPPED["two-steps-in-order-block"], "gamma": 2},
    "two-steps-by-confidence-match": {**STEPPED[BY_MATCH], "gamma": 2},
    **{name: MANY[name] for name in ("samples-match", "samples-self-selection", "tree-match", "tree-ratio")},
    "adaptive-chain-block": MANY["adaptive-chain-block"],
}


GRAMMARS = {"raises": Grammar(), "nan": OnlyNan()}


@pytest.mark.parametrize(
    ("grammar", "scheme"), [*(("raises", name) for name in STRICT), *(("nan", name) for name in ("ratio", "tree-ratio"))]
)
def test_processors_that_fail_on_drafted_texts_end_the_draft_and_nothing_else(
    grammar: str,
    scheme: str,
    target: LlamaForCausalLM,
    plain_law: Callable[[dict], Counter],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Out of order and in trees drafts leave the grammar; behind an end token all of them would."""
    top_k = 3 if "samples" in scheme else 0  # joint samples have many runs
    settings = {"max_new_tokens": 3, "do_sample": True, "top_k": top_k, "logits_processor": [GRAMMARS[grammar]]}
    plain = plain_law(settings)
    assert any(len(text) < PROMPT.shape[1] + 3 for text in plain)
    ours = law_of(
        lambda: hf_specdiff.generate(target, PROMPT, assistant_model=drafter_for(None), **settings, **STRICT[scheme]),
        monkeypatch,
    )
    assert distance(plain, ours) < TOLERANCE


NARROW = {
    "ratio": {"acceptance": "ratio", "draft_shape": "chain"},
    "block": {"acceptance": "block", "draft_shape": "chain"},
    **{name: MANY[name] for name in ("samples-match", "tree-ratio")},
}


@pytest.mark.parametrize("scheme", NARROW)
@pytest.mark.parametrize(("vocab_size", "processors"), [(2, "none"), (3, "all")])
def test_a_drafter_that_knows_fewer_tokens_preserves_the_law(
    vocab_size: int,
    processors: str,
    scheme: str,
    target: LlamaForCausalLM,
    plain_law: Callable[[dict], Counter],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The target writes tokens that the drafter has no embedding for; its mask stands where one of them does."""
    drafter = make_drafter(
        seed=5, vocab_size=vocab_size, mask_token_id=vocab_size, block_size=4, eos_token_id=0, pad_token_id=0
    )
    settings = {"max_new_tokens": 3, "do_sample": True, **PROCESSORS[processors]}
    plain = plain_law(settings)
    assert any(max(text) >= vocab_size for text in plain)
    ours = law_of(
        lambda: hf_specdiff.generate(target, PROMPT, assistant_model=drafter, **settings, **NARROW[scheme]), monkeypatch
    )
    assert distance(plain, ours) < TOLERANCE


def test_children_at_a_temperature_learnt_on_the_way_preserve_the_law(
    target: LlamaForCausalLM, plain_law: Callable[[dict], Counter], monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the second round on they are drawn colder or warmer, by how much was accepted."""
    used, temperatures = set(), (0.3, 2.5)

    def choose(self: shapes.ChildTemperature, outcome: Outcome) -> None:
        used.add(self.value)
        if outcome.target_laws:
            self._value = temperatures[len(outcome.target_laws) % len(temperatures)]

    monkeypatch.setattr(shapes.ChildTemperature, "observe", choose)
    settings = {"max_new_tokens": 5, "do_sample": True, "top_k": 2, **PROCESSED}
    scheme = {"draft_shape": "tree", "acceptance": "ratio", "tree_budget": 3, "gamma": 2}
    drafter, plain = drafter_for(None), plain_law(settings)
    ours = law_of(lambda: hf_specdiff.generate(target, PROMPT, assistant_model=drafter, **settings, **scheme), monkeypatch)
    assert used == {1.0, *temperatures}
    assert distance(plain, ours) < TOLERANCE


@pytest.mark.parametrize(
    "scheme", ["adaptive-tree-ratio", "adaptive-tree-match", "adaptive-chain-ratio", "adaptive-chain-block"]
)
def test_sizes_that_hang_on_what_was_accepted_preserve_the_law(
    scheme: str, target: LlamaForCausalLM, plain_law: Callable[[dict], Counter], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A budget that drafts much after one outcome and next to nothing after another."""
    sizes = set()

    def learn(self: Calibration, values: list[float], drawn: list[bool], outcome: list[bool]) -> None:
        self.factors = [0.3 if any(outcome) else 3.0] * len(self.factors)
        sizes.add((len(values), any(outcome)))

    monkeypatch.setattr(Calibration, "learn", learn)
    settings = {"max_new_tokens": 4, "do_sample": True, "top_k": 2, **PROCESSED}
    drafter, plain = drafter_for(None), plain_law(settings)
    ours = law_of(
        lambda: hf_specdiff.generate(target, PROMPT, assistant_model=drafter, **settings, **MANY[scheme]), monkeypatch
    )
    assert len({size for size, _ in sizes}) > 1
    assert {accepted for _, accepted in sizes} == {True, False}
    assert distance(plain, ours) < TOLERANCE


def test_control_children_drawn_from_another_law_are_seen(
    target: LlamaForCausalLM, plain_law: Callable[[dict], Counter], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shapes, "draw", lambda laws: draw(laws.square()))
    settings = {"max_new_tokens": 4, "do_sample": True, "top_k": 3, "top_p": 0.9}
    drafter, plain = drafter_for(None), plain_law(settings)
    ours = law_of(
        lambda: hf_specdiff.generate(target, PROMPT, assistant_model=drafter, **settings, **MANY["tree-ratio"]), monkeypatch
    )
    assert distance(plain, ours) > 1e-3


class GuessingDrafter:
    """A user's own drafter: drafts from laws that depend on the text's length; knows no network.

    Args:
        shape (`str`): "chain"; "tree", whose second child of the anchor is drawn; or "samples", two of them.
        power (`float`): 1, or it does not tell the truth about what it drew from.
    """

    target_layer_ids = None

    def __init__(self, shape: str, power: float = 1.0) -> None:
        self.shape = shape
        self.power = power

    def draft(self, text: Text, features: Features | None) -> Draft | DraftTree:
        generator = torch.Generator().manual_seed(text.lengths[0])
        probs = torch.randn(1, 2, 4, generator=generator).softmax(-1)
        if self.shape == "chain":
            return Draft(draw(probs), self._told(probs), has_prefix_law=True)
        if self.shape == "samples":  # of two tokens each: fewer runs
            probs = probs * (torch.arange(4) % 3 > 0)
            tokens, parents, drafts = merge_drafts(draw(probs.expand(2, -1, -1)).tolist())
            return DraftTree(torch.tensor([tokens]), [parents], [drafts])
        best = int(probs[0, 0].argmax())
        law = probs[:, 0].clone()
        law[0, best] = 0
        law /= law.sum()
        drawn = int(draw(law))
        sampled = SampledChildren(self._told(law), [{0: 0}], [{0: 2}])
        return DraftTree(torch.tensor([[best, drawn, 1, 2]]), [[0, 0, 1, 2]], sampled=sampled)

    def _told(self, probs: torch.Tensor) -> torch.Tensor:
        told = probs**self.power
        return told / told.sum(-1, keepdim=True)


@pytest.mark.parametrize(
    ("shape", "rule"),
    [
        ("chain", "match"),
        ("chain", "ratio"),
        ("chain", "block"),
        ("chain", None),
        ("tree", "match"),
        ("tree", "ratio"),
        ("tree", None),
        ("samples", "match"),
        ("samples", "self_selection"),
    ],
)
def test_your_own_drafter_preserves_the_law(
    shape: str,
    rule: str | None,
    target: LlamaForCausalLM,
    plain_law: Callable[[dict], Counter],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Put your drafter in the place of this one: it may propose past the length limit, and it may be as wrong as it likes."""
    settings = {"max_new_tokens": 3, "do_sample": True, "top_k": 2}
    scheme = {"assistant_model": GuessingDrafter(shape), "acceptance": rule, **({"draft_shape": shape} if rule else {})}
    ours = law_of(lambda: hf_specdiff.generate(target, PROMPT, **scheme, **settings), monkeypatch)
    assert distance(plain_law(settings), ours) < TOLERANCE


@pytest.mark.parametrize("shape", ["chain", "tree"])
def test_control_a_drafter_that_lies_about_its_law_is_seen(
    shape: str, target: LlamaForCausalLM, plain_law: Callable[[dict], Counter], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"max_new_tokens": 3, "do_sample": True, "top_k": 2}
    liar = GuessingDrafter(shape, power=2.0)
    for rule, is_seen in (("match", False), ("ratio", True)):  # the match does not ask
        ours = law_of(
            lambda rule=rule: hf_specdiff.generate(target, PROMPT, assistant_model=liar, acceptance=rule, **settings),
            monkeypatch,
        )
        assert (distance(plain_law(settings), ours) > 1e-3) == is_seen


def test_a_rule_that_needs_a_prefix_law_refuses_drafts_without_one() -> None:
    draft = Draft(torch.tensor([[1, 2]]), torch.full((1, 2, 4), 0.25), has_prefix_law=False)
    scores = Scores(LogitsProcessorList(), Text.of_prompt(PROMPT), draft.tokens, torch.zeros(1, 3, 4))
    for name in ("ratio", "block"):
        with pytest.raises(ValueError, match="prefix law"):
            make_rule(name, do_sample=True)(draft, scores)
    generator = SpecDiffCandidateGenerator(
        drafter_for(None), GenerationConfig(do_sample=True), speculation={"num_denoising_steps": 2, "acceptance": "match"}
    )
    assert generator.get_candidates(PROMPT)[1] is None


def sharpened(scores: torch.Tensor, temperature: float) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Draw as `draw_from_scores` does, and tell another law."""
    tokens, probs = draw_from_scores(scores, temperature)
    return tokens, None if probs is None else probs.square() / probs.square().sum(-1, keepdim=True)


def test_control_a_wrong_rule_is_seen(
    target: LlamaForCausalLM, plain_law: Callable[[dict], Counter], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same check must fail where the draft's law is not the one its tokens were drawn from."""
    monkeypatch.setattr(drafters, "draw_from_scores", sharpened)
    settings = {"max_new_tokens": 3, "do_sample": True, "top_k": 0}
    drafter = drafter_for(None)
    plain = plain_law(settings)
    for rule in ("ratio", "block"):
        ours = law_of(
            lambda rule=rule: hf_specdiff.generate(
                target, PROMPT, assistant_model=drafter, draft_shape="chain", acceptance=rule, **settings
            ),
            monkeypatch,
        )
        assert distance(plain, ours) > 1e-3


def test_control_rules_that_would_break_the_law_are_refused(target: LlamaForCausalLM) -> None:
    for rule in ("ratio", "block"):
        with pytest.raises(ValueError, match="would not have the target's law"):
            hf_specdiff.generate(
                target,
                PROMPT,
                assistant_model=drafter_for(None),
                do_sample=True,
                max_new_tokens=4,
                num_denoising_steps=2,
                acceptance=rule,
            )


@pytest.mark.parametrize("draft_temperature", [None, 0])
def test_way_one_sampling_has_the_law_of_plain_generate(
    draft_temperature: float | None,
    target: LlamaForCausalLM,
    plain_law: Callable[[dict], Counter],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The host's own loop, with its own ratio test; the control tells it another law than the draft was drawn from."""
    settings = {"max_new_tokens": 3, "do_sample": True, "top_k": 3, "repetition_penalty": 1.2}
    drafter = drafter_for(None)
    drafter.generation_config.draft_temperature = draft_temperature

    def ours() -> Counter:
        return law_of(lambda: target.generate(PROMPT, assistant_model=drafter, **settings), monkeypatch)

    assert distance(plain_law(settings), ours()) < TOLERANCE
    if draft_temperature is None:
        monkeypatch.setattr(drafters, "draw_from_scores", sharpened)
        assert distance(plain_law(settings), ours()) > 1e-3


@pytest.fixture(scope="module")
def hybrid() -> Any:
    """Layers of attention and of a delta rule, whose state runs on; vocabulary and end token as `target`'s."""
    return make_model("qwen3_5_text", vocab_size=4, eos_token_id=0)


@pytest.mark.parametrize(("rule", "layers"), [("match", None), ("block", [0, 3])])
def test_replays_preserve_the_law(rule: str, layers: list[int] | None, hybrid: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """All that may differ is rounding between kernels for several tokens and those for one; the control differs by more."""
    settings = {"max_new_tokens": 3, "do_sample": True, "top_k": 2}
    plain = law_of(lambda: hybrid.generate(PROMPT, **settings), monkeypatch)

    def ours() -> Counter:
        drafting = {"draft_shape": "chain", "acceptance": rule, "gamma": 2}
        drafter = drafter_for(layers, hybrid)
        return law_of(
            lambda: hf_specdiff.generate(hybrid, PROMPT, assistant_model=drafter, **drafting, **settings), monkeypatch
        )

    assert distance(plain, ours()) < 10 * TOLERANCE
    if rule == "match":
        monkeypatch.setattr(Snapshot, "put_back", lambda self, num_tokens: self.cache.layers[3].crop(-num_tokens))
        assert distance(plain, ours()) > 1e-3

"""The whole promise, through the whole loop: sampled text has the law of plain `generate`, under every kind of processor.

Every random choice of a call goes through `torch.multinomial`. Replacing it by an oracle that replays a script of choices and
multiplies their probabilities lets a test walk through all runs of a call, so its output law is exact, not sampled.
"""

from collections import Counter
from collections.abc import Callable
from collections.abc import Iterator

import pytest
import torch
from transformers import LlamaConfig
from transformers import LlamaForCausalLM

import hf_specdiff
from hf_specdiff import SpecDiffDrafter

from .conftest import make_drafter

Text = tuple[int, ...]
# Plain decoding works in float32, so that is how closely the two laws can agree.
TOLERANCE = 2e-6
PROMPT = torch.tensor([[1, 2]])


class Oracle:
    """A stand-in for `torch.multinomial` that replays choices, and takes the first possible one where the script ends."""

    def __init__(self, script: list[int]) -> None:
        self.script = script
        self.choices: list[tuple[int, list[int]]] = []
        self.probability = 1.0

    def __call__(self, probs: torch.Tensor, num_samples: int = 1) -> torch.Tensor:
        assert num_samples == 1
        rows = probs if probs.dim() == 2 else probs[None]
        picked = []
        for row in rows.double():
            law = row / row.sum()
            possible = law.nonzero().flatten().tolist()
            step = len(self.choices)
            choice = self.script[step] if step < len(self.script) else possible[0]
            self.choices.append((choice, possible))
            self.probability *= float(law[choice])
            picked.append([choice])
        return torch.tensor(picked)


def all_runs(call: Callable[[], torch.Tensor], monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Text, float]]:
    """Yield output and probability of every possible run of a call."""
    script: list[int] | None = []
    while script is not None:
        oracle = Oracle(script)
        with monkeypatch.context() as patch:
            patch.setattr(torch, "multinomial", oracle)
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


def drafter_for(layers: list[int] | None) -> SpecDiffDrafter:
    return make_drafter(
        layers,
        seed=5,
        vocab_size=4,
        mask_token_id=3,
        block_size=4,
        intermediate_size=16,
        initializer_range=0.6,
        bos_token_id=1,
        eos_token_id=0,
        pad_token_id=0,
    )


PROCESSORS = {
    "none": {"top_k": 0},
    "temperature": {"top_k": 0, "temperature": 0.6},
    "top_k": {"top_k": 2},
    "top_p": {"top_k": 0, "top_p": 0.7},
    "repetition_penalty": {"top_k": 0, "repetition_penalty": 1.7},
    "all": {"top_k": 3, "temperature": 1.4, "top_p": 0.9, "repetition_penalty": 1.2},
}
SCHEMES = {
    "ratio": {"acceptance": "ratio"},
    "block": {"acceptance": "block"},
    "match": {"acceptance": "match"},
    "auto": {},
    "hot-drafts": {"acceptance": "block", "draft_temperature": 2.0},
    "argmax-drafts": {"acceptance": "ratio", "draft_temperature": 0},
}
STEPPED = {
    "two-steps-in-order-ratio": {"num_denoising_steps": 2, "reveal_order": "left_to_right", "acceptance": "ratio"},
    "two-steps-in-order-block": {"num_denoising_steps": 2, "reveal_order": "left_to_right", "acceptance": "block"},
    "two-steps-by-confidence-match": {"num_denoising_steps": 2, "reveal_order": "confidence", "acceptance": "match"},
    "two-steps-by-confidence-argmax": {
        "num_denoising_steps": 2,
        "reveal_order": "confidence",
        "acceptance": "ratio",
        "draft_temperature": 0,
    },
}


@pytest.mark.parametrize("layers", [None, [0, 1]], ids=["tokens", "features"])
@pytest.mark.parametrize("processors", PROCESSORS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_sampling_preserves_the_law_of_plain_generate(
    scheme: str, processors: str, layers: list[int] | None, target: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    if layers is not None and processors not in ("none", "all"):
        processors = "all"
    settings = {"max_new_tokens": 3, "do_sample": True, **PROCESSORS[processors]}
    drafter = drafter_for(layers)
    plain = law_of(lambda: target.generate(PROMPT, **settings), monkeypatch)
    ours = law_of(
        lambda: hf_specdiff.generate(target, PROMPT, assistant_model=drafter, **settings, **SCHEMES[scheme]), monkeypatch
    )
    assert distance(plain, ours) < TOLERANCE


@pytest.mark.parametrize("processors", ["none", "repetition_penalty"])
@pytest.mark.parametrize("scheme", STEPPED)
def test_several_denoising_steps_preserve_the_law(
    scheme: str, processors: str, target: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"max_new_tokens": 4, "do_sample": True, **PROCESSORS[processors], "top_k": 2}
    drafter = drafter_for(None)
    plain = law_of(lambda: target.generate(PROMPT, **settings), monkeypatch)
    ours = law_of(
        lambda: hf_specdiff.generate(target, PROMPT, assistant_model=drafter, gamma=2, **settings, **STEPPED[scheme]),
        monkeypatch,
    )
    assert distance(plain, ours) < TOLERANCE


def test_control_a_wrong_rule_is_seen(target: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same check must fail where the draft's law is not the one its tokens were drawn from."""
    from hf_specdiff import drafters
    from hf_specdiff.sampling import draw_from_scores

    def sharpened(scores: torch.Tensor, temperature: float) -> tuple[torch.Tensor, torch.Tensor | None]:
        tokens, probs = draw_from_scores(scores, temperature)
        return tokens, None if probs is None else probs.square() / probs.square().sum(-1, keepdim=True)

    monkeypatch.setattr(drafters, "draw_from_scores", sharpened)
    settings = {"max_new_tokens": 3, "do_sample": True, "top_k": 0}
    drafter = drafter_for(None)
    plain = law_of(lambda: target.generate(PROMPT, **settings), monkeypatch)
    for rule in ("ratio", "block"):
        ours = law_of(
            lambda rule=rule: hf_specdiff.generate(target, PROMPT, assistant_model=drafter, acceptance=rule, **settings),
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
    draft_temperature: float | None, target: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The host's own loop draws uniforms, which cannot be enumerated, so this one is sampled.

    3,000 texts of 3 tokens against the exact law, Pearson's statistic over the texts with an expected count of 5 or more. The
    limit is mean plus 6 standard deviations of the chi-square law: a false alarm is rarer than one in a million. The control,
    the same texts against the law at another temperature, must exceed it.
    """
    settings = {"max_new_tokens": 3, "do_sample": True, "top_k": 3, "repetition_penalty": 1.2}
    drafter = drafter_for(None)
    drafter.generation_config.draft_temperature = draft_temperature
    exact = law_of(lambda: target.generate(PROMPT, **settings), monkeypatch)
    other = law_of(lambda: target.generate(PROMPT, temperature=1.5, **settings), monkeypatch)
    torch.manual_seed(0)
    total = 3_000
    counts = Counter(tuple(target.generate(PROMPT, assistant_model=drafter, **settings)[0].tolist()) for _ in range(total))

    def excess(law: Counter) -> float:
        texts = [text for text in law if law[text] * total >= 5]
        statistic = sum((counts[text] - total * law[text]) ** 2 / (total * law[text]) for text in texts)
        return (statistic - len(texts)) / (2 * len(texts)) ** 0.5

    assert excess(exact) < 6
    assert excess(other) > 6

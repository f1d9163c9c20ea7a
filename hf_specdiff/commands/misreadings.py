"""Is a drafter read as it was trained: other readings of one field are tried, and the one that brings clearly more is named.

A misread drafter changes no text, only speed: that is why nothing else points it out. Knows what formats and their readers
disagree about.
"""

import math
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import LogitsProcessorList

from hf_specdiff.benchmarks.methods import Models
from hf_specdiff.core.conditioning import make_drafter
from hf_specdiff.core.features import Features
from hf_specdiff.core.speculation import resolve_speculation
from hf_specdiff.core.text import Text
from hf_specdiff.training.feature_cache import features_of
from hf_specdiff.training.prompts import Prompt
from hf_specdiff.training.prompts import encode

# Most readings are hopeless, and slow for it: a few tokens tell which are worth the whole trial.
FIRST_TOKENS = 24
NUM_FINALISTS = 3
# By how much another reading must win to be pointed out, on how many tokens of a prompt that is found out, and what it must
# bring at least: a drafter that accepts next to nothing says nothing about how it is read.
CLEARLY = 1.15
TRIAL_TOKENS = 96
LEAST_TOKENS_PER_ROUND = 1.3


@dataclass(frozen=True, slots=True)
class Reading:
    """Another value for one field of a drafter's configuration.

    Attributes:
        field (`str`): of `SpecDiffConfig`.
        value: to be tried.
        reason (`str`): how the configured one came to be wrong.
    """

    field: str
    value: Any
    reason: str


def readings_that_fit_better(models: Models, prompts: Mapping[str, Sequence[Prompt]]) -> list[str]:
    """Try a drafter with one field read otherwise: layers, anchor, causality, scale and mask.

    The target writes one answer, and the readings draft along it: a reading costs drafter passes alone. A mask id that is no
    neighbour of the configured one and no special id of the tokenizer is not found.

    Args:
        models (`Models`): the target and one drafter, named "drafter", which is left as it was.
        prompts (`Mapping[str, Sequence]`): texts or chats by task; the first of all is answered.

    Returns:
        `list[str]`: a warning that names the best reading if it brings clearly more than the configured one; nothing for
        drafters that read tokens alone.
    """
    drafter = models.drafters["drafter"]
    if drafter.config.target_layer_ids is None:
        return []
    first = next(iter(prompts.values()))[0]
    answer = Answer(models, encode(models.tokenizer, first), TRIAL_TOKENS)

    def rate(num_tokens: int) -> float:
        rounds = answer.rounds(num_tokens)
        return sum(rounds) / max(len(rounds), 1)

    def ranked(readings: list[Reading], num_tokens: int) -> list[tuple[float, Reading]]:
        found = []
        for reading in readings:
            with read_as(drafter, reading):
                found.append((rate(num_tokens), reading))
        return sorted(found, key=lambda pair: -pair[0])

    finalists = [reading for _, reading in ranked(other_readings(models), FIRST_TOKENS)[:NUM_FINALISTS]]
    best_rate, best = ranked(finalists, TRIAL_TOKENS)[0]
    configured = rate(TRIAL_TOKENS)
    if best_rate < max(CLEARLY * configured, LEAST_TOKENS_PER_ROUND):
        return []
    own = getattr(drafter.config, best.field)
    figures = f"{best.value} brings {best_rate:.2f} tokens per round where {own} brings {configured:.2f}"
    return [f"{best.field}: {figures}: {best.reason}."]


class Answer:
    """What the target writes greedily after a prompt, to be drafted along.

    Args:
        models (`Models`): the target and one feature-conditioned drafter, named "drafter".
        prompt (`list[int]`): token ids.
        max_new_tokens (`int`): tokens to write.
    """

    def __init__(self, models: Models, prompt: list[int], max_new_tokens: int) -> None:
        self.target, self.drafter = models.target, models.drafters["drafter"]
        ids = torch.tensor([prompt], device=models.device)
        self.ids = self.target.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_new_tokens, do_sample=False
        )
        self.start = len(prompt) + 1  # the first token comes with the prompt
        self.features: dict[tuple[int, ...], torch.Tensor] = {}

    @torch.no_grad()
    def rounds(self, num_tokens: int) -> list[int]:
        """Return how many tokens each round of whole chains, drafted without a head, adds within the first ones of the answer.

        Args:
            num_tokens (`int`): of the answer.

        Returns:
            `list[int]`: at least 1 each.
        """
        config = self.drafter.config
        layers = tuple(config.target_layer_ids)
        if layers not in self.features:
            self.features[layers] = features_of(self.target, self.ids, list(layers))
        settings = {"draft_shape": "chain", "gamma": config.max_gamma}
        speculation = resolve_speculation(settings, self.drafter, do_sample=False)
        drafter = make_drafter(self.drafter, self.target, speculation, LogitsProcessorList())
        drafter.knows_token_before = False  # a head makes up for some of what is misread
        written = self.ids[0, : self.start - 1 + num_tokens].tolist()
        text, num_seen, rounds = Text.of_prompt(self.ids[:, : self.start]), 0, []
        while (length := text.lengths[0]) < len(written):
            states = self.features[layers][:, num_seen : length - 1]  # the anchor's are not known yet
            num_seen = length - 1
            draft = drafter.draft(text, Features(states, [states.shape[1]]))
            pairs = list(zip(draft.tokens[0].tolist(), written[length:], strict=False))
            accepted = next((place for place, (own, other) in enumerate(pairs) if own != other), len(pairs))
            added = written[length : length + accepted + 1]
            text = text.extended([added])
            rounds.append(len(added))
        return rounds


def other_readings(models: Models) -> list[Reading]:
    """Return what is worth a try.

    Args:
        models (`Models`): the target, its tokenizer and one feature-conditioned drafter, named "drafter".

    Returns:
        `list[Reading]`: none of them the configured one.
    """
    config = models.drafters["drafter"].config
    return [*_layers(config, models.target), _anchor(config), *_causality(config), *_scale(config), *_masks(config, models)]


@contextmanager
def read_as(drafter: Any, reading: Reading) -> Iterator[None]:
    """Read one field otherwise for as long as the context lasts.

    Args:
        drafter (`SpecDiffDrafter`): feature-conditioned.
        reading (`Reading`): the field and its value.
    """
    own = getattr(drafter.config, reading.field)
    try:
        _set(drafter, reading.field, reading.value)
        yield
    finally:
        _set(drafter, reading.field, own)


def _set(drafter: Any, field: str, value: Any) -> None:
    setattr(drafter.config, field, value)
    if field == "causal_layers":  # layers were told when they were made
        for index, layer in enumerate(drafter.layers):
            layer.self_attn.is_causal_window = drafter.config.is_causal_layer(index)


def _layers(config: Any, target: Any) -> list[Reading]:
    num_layers = target.config.get_text_config().num_hidden_layers
    reason = "the ids are probably one off (here they are counted from 0, and id i reads hidden_states[i + 1])"
    shifted = [[layer + shift for layer in config.target_layer_ids] for shift in (-1, 1)]
    return [Reading("target_layer_ids", ids, reason) for ids in shifted if min(ids) >= -1 and max(ids) < num_layers]


def _anchor(config: Any) -> Reading:
    reason = "the drafts are one slot off (DSpark's anchor predicts, DFlash's does not)"
    return Reading("predicts_from_anchor", not config.predicts_from_anchor, reason)


def _causality(config: Any) -> list[Reading]:
    """Return the other two of: no layer is causal, all are, those that slide."""
    layers = range(config.num_hidden_layers)
    own = [config.is_causal_layer(layer) for layer in layers]
    values = ([False for _ in layers], [True for _ in layers], [config.layer_window(layer) is not None for layer in layers])
    reason = "the layers were trained with another causality (JetSpec's are causal, DFlash's are not)"
    found: list[Reading] = []
    for value in values:
        if value != own and all(value != reading.value for reading in found):
            found.append(Reading("causal_layers", value, reason))
    return found


def _scale(config: Any) -> list[Reading]:
    """Return 1 and the square root of the width, which Gemma's embeddings are multiplied with."""
    reason = "the embeddings were scaled otherwise in training (some families multiply them with the root of the width)"
    scales = [scale for scale in (1.0, math.sqrt(config.hidden_size)) if not math.isclose(scale, config.input_embedding_scale)]
    return [Reading("input_embedding_scale", scale, reason) for scale in scales]


def _masks(config: Any, models: Models) -> list[Reading]:
    """Return special ids of the tokenizer, the row behind its tokens, and the neighbours of the configured id."""
    own, tokenizer = config.mask_token_id, models.tokenizer
    named = [getattr(tokenizer, name, None) for name in ("mask_token_id", "unk_token_id", "pad_token_id")]
    near = [len(tokenizer), *([] if own is None else [own - 1, own + 1])]
    ids = dict.fromkeys(mask for mask in [*named, *near] if mask not in (None, own) and 0 <= mask < config.vocab_size)
    reason = "that is probably the mask that the drafter was trained with"
    return [Reading("mask_token_id", mask, reason) for mask in ids]

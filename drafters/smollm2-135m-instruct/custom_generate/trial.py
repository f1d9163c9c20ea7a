"""Whether a model can be verified as the loop does it: found by trying, once for each model.

Letters: B batch, n tokens of a text, V vocabulary. Knows how the host decodes one token after the other; knows no drafter.
"""

import re
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from transformers import DynamicCache
from transformers import GenerationConfig
from transformers import GenerationMixin

from .draft import Draft
from .draft import DraftTree
from .masked_target import CHUNKED
from .masked_target import FULL
from .masked_target import SLIDING
from .masked_target import MaskedTarget
from .masked_target import layer_kinds
from .stateful_target import chain_target_class
from .stateful_target import is_stateful
from .target import Target
from .text import Text

# Tokens of the prompt, and of the text behind it that is decoded one by one: the anchor and three that are drafted.
PROMPT_LENGTH, NUM_STEPS = 6, 4
# Padding in front of the second row, where that is asked about.
NUM_PADDING = 2
# How far logits may lie apart, as a share of the largest: what no rounding exceeds, in full float32 and in anything less; and
# what of that a mask is allowed to add.
ROUNDING_BOUNDS = {True: 1e-3, False: 0.125}
NOISE_MARGIN = 8.0
# A logit beyond it was forbidden by the model, not computed.
LARGEST_LOGIT = 1e4
# Settings that are the size of a window, by their last words; a pattern of layers or their number is not one.
WINDOW_NAME = re.compile(r"window(_size|_len|_length)?$")
# For each model that was asked: the state it was in, and the answers.
_ANSWERS: WeakKeyDictionary[Any, tuple[Any, dict[Any, Any]]] = WeakKeyDictionary()


def why_not_chained(model: Any, device: torch.device) -> str | None:
    """Return why a chain cannot be verified in one pass, or `None` if it can; found by trying, once for each model.

    The host decodes a few tokens one by one, with its own preparation of inputs. The target verifies the same tokens: first the
    anchor under a draft that is wrong and taken back, then the rest as one draft. All logits must be the same but for rounding,
    which has a fixed bound.

    Sees: models that look ahead inside a pass, that keep no cache, or that do not take tokens back (CPM-Ant, ProphetNet, XLM,
    OpenAI GPT, Gemma 3 with `use_bidirectional_attention`); dropout, where the model is in training mode. Does not see: what
    begins only in longer texts (windows, chunks, choices among many keys, rotary frequencies that change), which the
    configuration must tell, and what hangs on inputs other than tokens. Nor choices of the host that break ties by the shapes
    of tensors: Doge's kept keys, and DeepSeek v3.2's and AXK2's with few indexer heads, tie exactly where tokens repeat, and
    plain decoding itself then writes one text alone and another in a batch.

    Args:
        model (`transformers.PreTrainedModel`): the target.
        device (`torch.device`): of the call's inputs.

    Returns:
        `str`, *optional*: the reason.
    """
    answer = _noise_of_chain(model, device)
    return answer if isinstance(answer, str) else None


def why_not_masked(model: Any, device: torch.device, *, has_padding: bool = False) -> str | None:
    """Return why a model cannot verify with masks of our own, or `None` if it can; found by trying, once for each model.

    Two rows of a batch are decoded one by one by the host, and verified with a tree that has siblings in the way; then they
    accept differently, and go on from where each stands. All logits must be the same, as closely as those of a chain are.

    Sees: masks that are not read, positions that follow the cache's slots, rows that are not kept apart, and with `has_padding`
    positions and masks of padded rows. Does not see: what `why_not_chained` does not see. GIT's padded rows are an example of a
    quirk of the host's: they differ from the same rows alone, in plain decoding too.

    Args:
        model (`transformers.PreTrainedModel`): the target.
        device (`torch.device`): of the call's inputs.
        has_padding (`bool`): whether prompts are padded.

    Returns:
        `str`, *optional*: the reason.
    """
    if is_stateful(model):
        return f"{type(model).__name__} keeps a running state, which reads one text in order"
    noise = _noise_of_chain(model, device)
    if isinstance(noise, str):
        return noise
    reason: str | None = _remembered(model, device, "config", lambda: _why_not_by_config(model))
    if reason is None:
        question = ("masks", has_padding)
        reason = _remembered(model, device, question, lambda: _why_not_by_trying(model, device, noise, has_padding=has_padding))
    return reason


def _remembered(model: Any, device: torch.device, question: Any, answer: Callable[[], Any]) -> Any:
    """Return the answer to a question about a model, asked again only if the model is in another state."""
    state = (model.config._attn_implementation, model.dtype, model.training, device)
    asked_in, answers = _ANSWERS.get(model, (None, {}))
    if asked_in != state:
        answers = {}
        _ANSWERS[model] = (state, answers)
    if question not in answers:
        answers[question] = answer()
    return answers[question]


def _noise_of_chain(model: Any, device: torch.device) -> float | str:
    """Return how far a chain's logits lie from those of single tokens, or why that is more than rounding."""
    return _remembered(model, device, "chain", lambda: _try_chain(model, device))


@torch.no_grad()
def _try_chain(model: Any, device: torch.device) -> float | str:
    name = type(model).__name__
    prompt, tokens = _trial_text(model, device, num_rows=1)
    try:
        plain = _decode_plainly(model, prompt, None, tokens)
        target = chain_target_class(model)(model, *_prepared(model, prompt, None), None)
        chained = _decode_by_chains(target, prompt, tokens)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a model's own code raises
        return f"{name} does not verify several tokens in one pass ({type(error).__name__}: {_first_sentence(error)})"
    noise, largest = _distance(chained, plain), _largest(plain)
    if not noise <= _bound(plain.dtype) * largest:
        state = "in training mode " if model.training else ""
        return f"{name} {state}gives other logits to tokens that it reads in one pass than one by one"
    return noise


@torch.no_grad()
def _why_not_by_trying(model: Any, device: torch.device, noise: float, *, has_padding: bool) -> str | None:
    name = type(model).__name__
    prompt, tokens = _trial_text(model, device, num_rows=2)
    mask = torch.ones_like(prompt)
    mask[1, : NUM_PADDING if has_padding else 0] = 0
    try:
        plain = _decode_plainly(model, prompt, mask, tokens)
        target = MaskedTarget(model, *_prepared(model, prompt, mask), None)
        masked = _decode_by_trees(target, Text.of_prompt(prompt, mask), tokens)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a model's own code raises
        return f"{name} does not take a mask over draft trees ({type(error).__name__}: {_first_sentence(error)})"
    largest = _largest(plain)
    rounding = max(1e-5, 8 * torch.finfo(plain.dtype).eps) * largest
    allowed = max(rounding, min(NOISE_MARGIN * noise, _bound(plain.dtype) * largest))
    if not _distance(masked, plain) <= allowed:
        rows = "in padded rows " if has_padding else ""
        return f"{name} gives other logits {rows}under a mask over draft trees"
    return None


def _why_not_by_config(model: Any) -> str | None:
    """Return what a model's configuration says against masks of our own."""
    config, name = model.config.get_text_config(), type(model).__name__
    if model.config._attn_implementation not in ("eager", "sdpa"):
        return f"{name} with attention implementation {model.config._attn_implementation!r} reads no mask of ours; use 'sdpa'"
    unknown = [kind for kind in layer_kinds(config) if kind not in (FULL, SLIDING, CHUNKED)]
    if unknown:
        return f"{name} has layers of the kind {unknown[0]!r}, for which we know no mask over draft trees"
    attention = getattr(config, "attn_config", None)
    if getattr(config, "alibi", False) or getattr(attention, "alibi", False):
        return f"{name} places tokens by their order (ALiBi)"
    # A window that the model measures inside its layers, by slots of the cache and not by places in the text.
    windows = {key for key, value in config.to_dict().items() if type(value) is int and WINDOW_NAME.search(key)}
    strange = sorted(windows - {"sliding_window"})
    if strange or getattr(config, "attention_types", None):
        return f"{name} has a window of its own kind (`{(strange or ['attention_types'])[0]}`)"
    sizes = {layer.sliding_window for layer in DynamicCache(config=config).layers if getattr(layer, "is_sliding", False)}
    if not sizes <= {getattr(config, key, None) for key in ("sliding_window", "attention_chunk_size")}:
        return f"{name} has windows of several sizes ({sorted(sizes)})"
    return None


def _trial_text(model: Any, device: torch.device, num_rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return prompts `(B, PROMPT_LENGTH)` and the tokens behind them `(B, NUM_STEPS)`, as different as may be."""
    count, vocab_size = PROMPT_LENGTH + NUM_STEPS, model.config.get_text_config().vocab_size
    step = 7 if vocab_size % 7 else 5
    ids = (torch.arange(num_rows * count, device=device) * step + 3).view(num_rows, count) % vocab_size
    return ids[:, :PROMPT_LENGTH], ids[:, PROMPT_LENGTH:]


def _prepared(model: Any, prompt: torch.Tensor, mask: torch.Tensor | None) -> tuple[GenerationConfig, dict[str, Any]]:
    """Return the settings and inputs that the host's `generate` would hand to its loop."""

    def hand_back(
        model: Any, input_ids: Any, logits_processor: Any, stopping_criteria: Any, generation_config: Any, **model_kwargs: Any
    ) -> tuple[GenerationConfig, dict[str, Any]]:
        return generation_config, model_kwargs

    result: Any = GenerationMixin.generate(
        model,
        prompt,
        attention_mask=torch.ones_like(prompt) if mask is None else mask,
        custom_generate=hand_back,
        max_new_tokens=NUM_STEPS + 1,
        use_cache=True,
        cache_implementation="dynamic",
        num_beams=1,
        num_return_sequences=1,
        pad_token_id=0,
        output_hidden_states=False,
    )
    config, model_kwargs = result
    return config, model_kwargs


def _decode_plainly(model: Any, prompt: torch.Tensor, mask: torch.Tensor | None, tokens: torch.Tensor) -> torch.Tensor:
    """Return the logits after each of some tokens `(B, n)`, decoded by the host one by one: `(B, n, V)`."""
    config, kwargs = _prepared(model, prompt, mask)
    outputs = model._prefill(prompt, config, kwargs)
    rows = []
    for end in range(1, tokens.shape[1] + 1):
        kwargs = model._update_model_kwargs_for_generation(outputs, kwargs, is_encoder_decoder=False)
        text = torch.cat([prompt, tokens[:, :end]], dim=1)
        inputs = model.prepare_inputs_for_generation(text, next_sequence_length=1, is_first_iteration=False, **kwargs)
        outputs = model(**inputs, return_dict=True)
        rows.append(outputs.logits[:, -1].to(prompt.device))  # a target's head may lie apart
    return torch.stack(rows, dim=1)


def _decode_by_chains(target: Target, prompt: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Return the logits after each of some tokens `(1, n)`, verified in two rounds: `(1, n, V)`."""
    text = Text.of_prompt(prompt)
    target.prefill(text)
    target.commit([[0]], 0)
    text = text.extended(tokens[:, :1].tolist())
    # The prompt's tokens are other ones than those that follow.
    wrong = Draft(prompt[:, 1:4], None, has_prefix_law=True)
    first = target.verify(text, wrong)[:, :1].clone()
    target.commit([[0]], wrong.num_tokens)
    text = text.extended(tokens[:, 1:2].tolist())
    rest = target.verify(text, Draft(tokens[:, 2:], None, has_prefix_law=True))
    return torch.cat([first, rest], dim=1)


def _decode_by_trees(target: MaskedTarget, text: Text, tokens: torch.Tensor) -> torch.Tensor:
    """Return the logits after each of some tokens `(2, 4)`, verified in a round that rows accept differently and one more."""
    target.prefill(text)
    target.commit([[0], [0]], 0)
    text = text.extended(tokens[:, :1].tolist())
    # Nine siblings in the way, and the true path under the last of ten children.
    wrong = tokens.flip(0).repeat(1, 3)[:, :9]
    tree = DraftTree(torch.cat([wrong, tokens[:, 1:3]], dim=1), [[0] * 10 + [10]] * 2)
    path = [0, 10, 11]
    first = target.verify(text, tree)[:, path].clone()
    target.commit([path, [0]], tree.num_tokens)
    text = text.extended([tokens[0, 1:].tolist(), tokens[1, 1:2].tolist()])
    rest = target.verify(text, Draft(torch.stack([wrong[0, :2], tokens[1, 2:]]), None, has_prefix_law=True))
    return torch.stack([torch.cat([first[0], rest[0, :1]]), torch.cat([first[1, :1], rest[1]])])


def _bound(dtype: torch.dtype) -> float:
    """Return what no rounding exceeds, as a share of the largest logit."""
    is_full = dtype in (torch.float32, torch.float64) and torch.get_float32_matmul_precision() == "highest"
    return ROUNDING_BOUNDS[is_full]


def _largest(logits: torch.Tensor) -> float:
    return float(_computed(logits).abs().max())


def _distance(logits: torch.Tensor, others: torch.Tensor) -> float:
    return float((_computed(logits) - _computed(others)).abs().max())


def _computed(logits: torch.Tensor) -> torch.Tensor:
    """Return logits with those that a model forbids set to 0; NaN stays."""
    logits = logits.float()
    return logits.masked_fill(logits.abs() >= LARGEST_LOGIT, 0.0)


def _first_sentence(error: Exception) -> str:
    return str(error).strip().split(". ")[0].split("\n")[0][:160]

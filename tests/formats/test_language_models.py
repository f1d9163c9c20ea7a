"""Diffusion language models in their families' layouts: native bodies against the families' rules written out, and refusals."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM
from transformers.utils import logging

import hf_specdiff
from hf_specdiff.diffusion.drafter import DiffusionDrafter
from hf_specdiff.diffusion.trials import Reading
from hf_specdiff.diffusion.trials import text_of
from tests.conftest import make_target
from tests.conftest import plain_text
from tests.conftest import shared_target
from tests.diffusion.families import FAMILIES
from tests.diffusion.families import VOCAB
from tests.diffusion.references import seen_by
from tests.diffusion.test_trials import MASK
from tests.diffusion.test_trials import trained_body

TEXT = [1, 5, 9, 4, 7, 7, 3, 12, 30, 8, 11]
GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 16}
BATCH = torch.tensor([[0, 0, *TEXT[:-2]], TEXT, [0, 0, 0, 0, 0, 1, 9, 9, 4, 2, 6]])
LIKELIEST: dict[str, Any] = {"do_sample": True, "top_k": 1}
SCHEMES: dict[str, list[dict[str, Any]]] = {
    "exact": [
        {"draft_shape": "chain", "gamma": 4, "num_denoising_steps": 2},
        {"draft_shape": "samples", "num_drafts": 3, "acceptance": "self_selection", **LIKELIEST},
    ],
    "prefix": [
        {"draft_shape": "tree", "tree_budget": 9},
        {"draft_shape": "chain", "gamma": 4, "acceptance": "ratio", **LIKELIEST},
    ],
}


@pytest.fixture
def target() -> LlamaForCausalLM:
    return shared_target()


def load(folder: Path, name: str, target: Any = None, **more: Any) -> DiffusionDrafter:
    return hf_specdiff.load_drafter(folder, target, **{"block_size": 6, **FAMILIES[name].settings, **more})


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_a_native_body_gives_the_logits_of_its_familys_rule(name: str, tmp_path: Path) -> None:
    family = FAMILIES[name]
    tensors = family.write(tmp_path)
    drafter = load(tmp_path, name)
    mask = family.mask_token_id
    assert drafter.config.mask_token_id == mask
    window = [*TEXT[-1:], mask, mask, 6, mask]
    ids = TEXT[:-1] + window
    own = drafter(torch.tensor([ids]), window_size=len(window)).logits[0]
    reference = family.logits(tensors, ids, seen_by(len(ids), family.attention, family.block_length))
    rows = reference[len(TEXT) + family.logit_offset :][: len(window) - 1]
    is_word = torch.arange(VOCAB) != mask
    assert (own[:, is_word].double() - rows[:, is_word]).abs().max() <= 1e-5
    assert bool((own[:, mask] == -torch.inf).all())
    # A control: the neighbouring rows are others by far.
    other = reference[len(TEXT) + (0 if family.logit_offset else -1) :][: len(window) - 1]
    assert (own[:, is_word].double() - other[:, is_word]).abs().max() > 0.1


@pytest.mark.parametrize("context_cache", ["exact", "prefix"])
@pytest.mark.parametrize("name", FAMILIES)
def test_texts_of_padded_batches_are_the_targets(
    name: str, context_cache: str, tmp_path: Path, target: LlamaForCausalLM
) -> None:
    """The target has 31 tokens, the bodies 40: what lies beyond, and the mask, is never drafted.

    The sampled call may take no token but the likeliest, so that its text is known too.
    """
    FAMILIES[name].write(tmp_path)
    drafter = load(tmp_path, name, target, context_cache=context_cache)
    mask = (BATCH != 0).long()
    plain = plain_text(target, BATCH, attention_mask=mask, max_new_tokens=12, pad_token_id=0)
    for scheme in SCHEMES[context_cache]:
        settings = {"do_sample": False, **scheme, "attention_mask": mask, "max_new_tokens": 12, "pad_token_id": 0}
        assert torch.equal(hf_specdiff.generate(target, BATCH, assistant_model=drafter, **settings), plain)


def test_a_head_beside_a_tied_embedding_is_read(tmp_path: Path) -> None:
    """Conversions ship a head of their own under `tie_word_embeddings`: what the tensors say counts."""
    FAMILIES["a2d-qwen2"].write(tmp_path)
    body = load(tmp_path, "a2d-qwen2").body
    assert not torch.equal(body.lm_head.weight, body.model.embed_tokens.weight)


def test_a_familys_mask_and_block_length_hold_where_the_files_name_none(tmp_path: Path) -> None:
    FAMILIES["sdar"].write(tmp_path, mask_token_id=None)
    with pytest.raises(ValueError, match=r"`mask_token_id` must be a row of the body's embedding, 0 to 39, got 151669"):
        load(tmp_path, "sdar")
    assert load(tmp_path, "sdar", mask_token_id=30).block_length == 4


def test_without_a_mask_id_there_is_no_drafter(tmp_path: Path) -> None:
    FAMILIES["a2d-qwen3"].write(tmp_path, mask_token_id=None)
    with pytest.raises(ValueError, match="`mask_token_id` must be given"):
        load(tmp_path, "a2d-qwen3")
    words = {"model": {"vocab": {str(i): i for i in range(39)}}, "added_tokens": [{"id": 39, "content": "<|mask|>"}]}
    (tmp_path / "tokenizer.json").write_text(json.dumps(words))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"mask_token": "<|mask|>"}))
    assert load(tmp_path, "a2d-qwen3").config.mask_token_id == 39


def test_what_the_files_leave_open_is_asked_for(tmp_path: Path) -> None:
    FAMILIES["a2d-qwen2"].write(tmp_path)
    with pytest.raises(ValueError, match="`target` or `attention` must be given"):
        hf_specdiff.load_drafter(tmp_path)
    with pytest.raises(ValueError, match="readings that cannot be told apart"):
        hf_specdiff.load_drafter(tmp_path, make_target(eos_token_id=None))
    assert hf_specdiff.load_drafter(tmp_path, attention="block_causal", block_length=8).block_length == 8


def test_what_the_files_leave_open_is_found_out_on_the_targets_text(tmp_path: Path) -> None:
    """A conversion with the rows of a causal model, which the package's own ones do not have; its words have other ids."""
    target = make_target(eos_token_id=None)
    turned = torch.arange(30, -1, -1)
    trained_body(turned[text_of(target)], Reading(-1)).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": "a2d-qwen2", "mask_token_id": MASK}))
    drafter = hf_specdiff.load_drafter(tmp_path, target, own_ids=turned.tolist())
    assert (drafter.logit_offset, drafter.block_length) == (-1, None)
    assert hf_specdiff.load_drafter(tmp_path, attention="full").logit_offset == 0


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("dream", {"use_mrope": True}, "`use_mrope`"),
        ("dream", {"rotary_twist": 3}, "`rotary_twist` in config.json must be a field that the reader"),
        ("dream", {"intermediate_size": 12}, "must have the shape"),
        ("dream", {"num_hidden_layers": 3}, "must hold all weights of the format Dream"),
        ("sdar", {"num_hidden_layers": 1}, "must be one that the format SDAR has"),
        ("dream", {"use_sliding_window": True, "max_window_layers": 0}, "must attend to the whole text in every layer"),
        ("llada", {"alibi": True}, "`alibi`"),
        ("llada", {"activation_type": "gelu"}, "`activation_type`"),
        ("mdlm", {"time_conditioning": True}, "`time_conditioning`"),
    ],
)
def test_what_is_not_understood_is_refused(name: str, changes: dict, message: str, tmp_path: Path) -> None:
    FAMILIES[name].write(tmp_path, **changes)
    with pytest.raises(ValueError, match=message):
        load(tmp_path, name)


def write_words(folder: Path, words: list[str], added: dict[int, str]) -> None:
    folder.mkdir(exist_ok=True)
    entries = [{"id": i, "content": word} for i, word in added.items()]
    vocabulary = {"model": {"vocab": {word: i for i, word in enumerate(words)}}, "added_tokens": entries}
    (folder / "tokenizer.json").write_text(json.dumps(vocabulary))


def test_ids_that_mean_something_else_are_never_drafted_and_another_tokenizer_is_refused(
    tmp_path: Path, target: LlamaForCausalLM, caplog: pytest.LogCaptureFixture
) -> None:
    own, theirs = tmp_path / "own", tmp_path / "theirs"
    FAMILIES["dream"].write(own)
    words = [f"w{i}" for i in range(28)]
    write_words(own, words, {28: "<a>", 29: "<b>", 30: "<c>"})
    write_words(theirs, words, {28: "<a>", 29: "<other>"})  # 30: a row of padding
    target.config.name_or_path = target.name_or_path = str(theirs)
    drafter = load(own, "dream", target)
    assert (drafter.own_ids < 0).nonzero().flatten().tolist() == [29, 30]
    logits = drafter(torch.tensor([[*TEXT, 33, 33]]), window_size=3).logits
    assert logits.shape[-1] == 31
    assert (logits == -torch.inf).any(dim=1)[0].nonzero().flatten().tolist() == [29, 30]
    write_words(theirs, [*words[:2], *(f"v{i}" for i in range(26))], {})
    with pytest.raises(ValueError, match=r"got 2 words in common: 7.1% of the target's 28 and 7.1% of its own 28"):
        load(own, "dream", target)


def test_shared_words_under_other_ids_are_translated(
    tmp_path: Path, target: LlamaForCausalLM, caplog: pytest.LogCaptureFixture
) -> None:
    own, theirs = tmp_path / "own", tmp_path / "theirs"
    FAMILIES["dream"].write(own)
    write_words(own, [f"w{i}" for i in range(33)], {34: "<end>"})
    write_words(theirs, ["only here", *(f"w{i}" for i in range(32, 5, -1))], {28: "<end>", 29: "<other>"})
    target.config.name_or_path = target.name_or_path = str(theirs)
    logger = logging.get_logger("hf_specdiff.formats.vocabulary")
    logger.addHandler(caplog.handler)
    try:
        drafter = load(own, "dream", target)
    finally:
        logger.removeHandler(caplog.handler)
    assert "translated through the 27 words that they share, 96% of the target's and 82% of its own" in caplog.text
    assert drafter.own_ids.tolist() == [-1, *range(32, 5, -1), 34, -1, -1]
    prompt = torch.tensor([TEXT])
    written = hf_specdiff.generate(target, prompt, assistant_model=drafter, draft_shape="tree", tree_budget=9, **GREEDY)
    assert torch.equal(written, plain_text(target, prompt, max_new_tokens=16))
    # Saved, and read again beside the tokenizer that its ids now belong to; also for a target with yet other ids.
    drafter.save_pretrained(tmp_path / "saved")
    assert load(tmp_path / "saved", "dream").own_ids.tolist() == drafter.own_ids.tolist()
    (tmp_path / "saved" / "tokenizer.json").write_bytes((theirs / "tokenizer.json").read_bytes())
    assert load(tmp_path / "saved", "dream", target).own_ids.tolist() == drafter.own_ids.tolist()
    write_words(theirs, [f"w{i}" for i in range(5, 33)], {})
    assert load(tmp_path / "saved", "dream", target).own_ids.tolist() == [-1, *range(6, 33), -1, -1, -1]
    (tmp_path / "saved" / "own_ids.safetensors").unlink()
    with pytest.raises(ValueError, match=r"must hold own_ids.safetensors, got none"):
        load(tmp_path / "saved", "dream")


def test_tokenizers_in_other_files_are_read(tmp_path: Path, target: LlamaForCausalLM) -> None:
    own, theirs = tmp_path / "own", tmp_path / "theirs"
    FAMILIES["dream"].write(own)
    words = [f"w{i}" for i in range(28)]
    (own / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (own / "added_tokens.json").write_text(json.dumps({"<mine>": 28}))
    (own / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": {"29": {"content": "<b>"}}}))
    theirs.mkdir()
    listed = [[word, -1.0] for word in words]
    entries = [{"id": 28, "content": "<theirs>"}, {"id": 29, "content": "<b>"}]
    (theirs / "tokenizer.json").write_text(json.dumps({"model": {"vocab": listed}, "added_tokens": entries}))
    target.config.name_or_path = target.name_or_path = str(theirs)
    assert (load(own, "dream", target).own_ids < 0).nonzero().flatten().tolist() == [28]

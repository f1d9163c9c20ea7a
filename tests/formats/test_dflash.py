"""Drafters in z-lab's layout, held against z-lab's own class and loop."""

from pathlib import Path
from typing import Any

import pytest
import torch
from dflash import model as zlab
from safetensors.torch import load_file
from safetensors.torch import save_file
from transformers import PreTrainedModel
from transformers import Qwen3Config

import hf_specdiff
from hf_specdiff.core.configuration_specdiff import SpecDiffConfig
from hf_specdiff.formats import dflash
from hf_specdiff.formats.dflash import default_layer_ids
from hf_specdiff.formats.record import BODY
from hf_specdiff.formats.record import Fields
from tests.conftest import MASK_TOKEN_ID
from tests.conftest import VOCAB_SIZE
from tests.conftest import make_drafter
from tests.conftest import make_target
from tests.formats.rounds import check_greedy
from tests.formats.rounds import our_rounds
from tests.formats.rounds import our_states
from tests.formats.rounds import random_rounds

SECTION = {"mask_token_id": MASK_TOKEN_ID, "target_layer_ids": [0, 2], "block_size": 6}
SLIDING = {"layer_types": ["sliding_attention", "full_attention"], "use_sliding_window": True, "sliding_window": 5}
VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "scale, multiplier, softcap": (
        {},
        {"input_embedding_scale": 3.0, "output_multiplier": 0.5, "final_logit_softcapping": 2.0},
    ),
    "causal": ({"is_causal": True}, {}),
    "sliding, causal": (SLIDING, {}),
    "sliding, bidirectional": ({**SLIDING, "is_causal": False}, {}),
    "all sliding": ({**SLIDING, "layer_types": ["sliding_attention"] * 2}, {}),
    "biases": ({"attention_bias": True}, {}),
    "yarn": ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}}, {}),
    "ids by formula": ({"num_target_layers": 3}, {"target_layer_ids": None}),
}
DFLASH2 = {"conv_kernel_size": 3, "conv_group_size": 4, "selector_rank": 4, "selector_top_k": 5}


def their_drafter(
    top: dict[str, Any], section: dict[str, Any], drafter_class: type = zlab.DFlashDraftModel
) -> zlab.DFlashDraftModel:
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        initializer_range=0.3,
        dflash_config={name: value for name, value in {**SECTION, **section}.items() if value is not None},
        **{"num_target_layers": 3, **top},
    )
    drafter = drafter_class(config).eval()
    for name, parameter in drafter.named_parameters():
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, 1.0, 0.3)  # norms and biases that do something
        elif "conv" in name or "selector" in name:
            torch.nn.init.normal_(parameter, 0.0, 0.3)
    return drafter


def publish(drafter: zlab.DFlashDraftModel, folder: Path) -> None:
    """Save a drafter as z-lab's repositories hold them: codebooks are tensors without a suffix there."""
    drafter.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    save_file(
        {name.replace("codebook.weight", "codebook"): tensor for name, tensor in tensors.items()},
        folder / "model.safetensors",
        {"format": "pt"},
    )


@torch.no_grad()
def their_states(drafter: zlab.DFlashDraftModel, target: Any, rounds: list) -> list[torch.Tensor]:
    """Return their states at the slots that predict, `(1, gamma, D)` for each round."""
    cache, found = zlab._make_cache(drafter.config), []
    scale = float(zlab._draft_value(drafter.config, "input_embedding_scale", 1.0))
    for window, features, start in rounds:
        states = drafter(
            target_hidden=features,
            noise_embedding=zlab._raw_input_embeddings(target, window, scale),
            position_ids=torch.arange(start - features.shape[1], start + window.shape[1])[None],
            past_key_values=cache,
            use_cache=True,
        )
        zlab._crop_to(cache, start)
        found.append(states[:, 1:])
    return found


@pytest.fixture(params=VARIANTS, ids=str)
def variant(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[zlab.DFlashDraftModel, PreTrainedModel, Path]:
    drafter = their_drafter(*VARIANTS[request.param])
    drafter.save_pretrained(tmp_path)
    return drafter, make_target(), tmp_path


def test_logits_are_theirs_over_rounds_with_cache(variant: tuple[zlab.DFlashDraftModel, PreTrainedModel, Path]) -> None:
    theirs, target, folder = variant
    ours = hf_specdiff.load_drafter(folder, target=target)
    rounds = random_rounds(ours)
    for states, logits in zip(their_states(theirs, target, rounds), our_rounds(ours, target, rounds), strict=True):
        torch.testing.assert_close(logits, theirs.compute_logits(states, target.lm_head), atol=1e-5, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("section", [{}, {"output_multiplier": 0.5, "final_logit_softcapping": 2.0}], ids=["plain", "softcap"])
def test_dflash_2_laws_given_the_token_before_are_theirs(section: dict[str, Any], tmp_path: Path) -> None:
    """Convolutions by the states; the selector along their own greedy chain, and each slot's law by their own formula."""
    target, theirs = make_target(), their_drafter(SLIDING, {**DFLASH2, **section}, zlab.DFlash2DraftModel)
    publish(theirs, tmp_path)
    ours = hf_specdiff.load_drafter(tmp_path, target=target)
    rounds = random_rounds(ours)
    pairs = zip(rounds, their_states(theirs, target, rounds), our_states(ours, target, rounds), strict=True)
    for (window, _, _), expected, states in pairs:
        torch.testing.assert_close(states, expected, atol=1e-5, rtol=0)
        logits, previous = ours.window_logits(states, target.lm_head), window[:, 0]
        chain, _, _ = theirs.propose(expected, previous, target.lm_head, 0.0)
        selector = theirs.candidate_selector
        for index, token in enumerate(chain[0].tolist()):
            # A chain of one slot, drawn at temperature 1: what it is drawn from.
            unary = theirs.compute_logits(expected[:, index : index + 1], target.lm_head)
            _, candidates, probs = selector.select(expected[:, index : index + 1], unary, previous, 1.0)
            law, _ = ours.step_logits(logits[:, index], states[:, index], previous)
            full = torch.zeros_like(law).scatter(-1, candidates[:, 0], probs[:, 0])
            torch.testing.assert_close(law.softmax(-1), full, atol=1e-5, rtol=0)
            assert int(law.argmax()) == token
            previous = torch.tensor([token])
    check_greedy(target, ours)


def test_a_mask_embedding_stands_for_the_row_of_the_mask(tmp_path: Path) -> None:
    """Their class reads it from a target whose embedding has it at the mask's row; ours from the drafter's file."""
    target, theirs = make_target(), their_drafter({}, {"input_embedding_scale": 3.0})
    theirs.save_pretrained(tmp_path)
    vector = torch.randn(16, generator=torch.Generator().manual_seed(7))
    tensors = load_file(tmp_path / "model.safetensors") | {"mask_embedding": vector}
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    ours, changed = hf_specdiff.load_drafter(tmp_path, target=target), make_target()
    changed.get_input_embeddings().weight.data[MASK_TOKEN_ID] = vector
    rounds = random_rounds(ours)
    plain = their_states(theirs, target, rounds)
    for states, expected, other in zip(
        our_states(ours, target, rounds), their_states(theirs, changed, rounds), plain, strict=True
    ):
        torch.testing.assert_close(states, expected, atol=1e-5, rtol=0)
        assert (states - other).abs().max() > 1e-2
    check_greedy(target, ours)


def test_greedy_tokens_are_those_of_plain(variant: tuple[zlab.DFlashDraftModel, PreTrainedModel, Path]) -> None:
    _, target, folder = variant
    check_greedy(target, hf_specdiff.load_drafter(folder, target=target))


@pytest.mark.parametrize("name", ["plain", "causal", "sliding, causal", "sliding, bidirectional", "dflash 2"])
def test_accepted_lengths_are_those_of_their_loop(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bundled drafter's weights, which a target accepts, in their layout and with their switches."""
    target, bundled, tokenizer = hf_specdiff.load_demo()
    top = {key: value for key, value in VARIANTS.get(name, ({}, {}))[0].items() if key != "layer_types"}
    if "sliding" in name:
        layer_types = ["sliding_attention"] * bundled.config.num_hidden_layers
        layer_types[0] = "full_attention"
        top |= {"layer_types": layer_types, "sliding_window": 24}
    fields = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "head_dim")
    fields += ("num_key_value_heads", "rms_norm_eps", "rope_parameters", "num_target_layers")
    own = bundled.config
    section = {name: getattr(own, name) for name in ("mask_token_id", "target_layer_ids", "block_size")}
    is_second = name == "dflash 2"
    if is_second:
        section |= DFLASH2
    config = Qwen3Config(**{name: getattr(own, name) for name in fields}, dflash_config=section, **top)
    torch.manual_seed(0)
    theirs = (zlab.DFlash2DraftModel if is_second else zlab.DFlashDraftModel)(config).eval()
    weights = {key: tensor for key, tensor in bundled.state_dict().items() if not key.startswith("markov_head.")}
    theirs.load_state_dict(weights, strict=not is_second)
    for parameter_name, parameter in theirs.named_parameters():
        if "conv" in parameter_name or "selector" in parameter_name:
            torch.nn.init.normal_(parameter, 0.0, 0.02)
        if parameter_name.endswith("base_kernel"):
            parameter.data[:, 0] += 1  # nearly what there was without convolutions
    publish(theirs, tmp_path)
    ours = hf_specdiff.load_drafter(tmp_path, target=target)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)  # their clock waits for a GPU
    for prompt in hf_specdiff.load_prompts("math")[:2]:
        ids = torch.tensor([tokenizer(prompt["prompt"])["input_ids"]])
        their_run = zlab.dflash_generate(theirs, target, ids, 64, None, return_stats=True)
        our_run = hf_specdiff.generate(
            target,
            ids,
            assistant_model=ours,
            draft_shape="chain",
            gamma=15,
            max_new_tokens=64,
            eos_token_id=-1,
            return_dict_in_generate=True,
        )
        assert our_run.sequences.tolist() == their_run.output_ids.tolist()
        assert [row[0] + 1 for row in our_run.speculation.num_accepted] == their_run.acceptance_lengths
        assert our_run.speculation.tokens_per_round > 2


def test_the_formula_of_layer_ids_is_theirs() -> None:
    for num_target_layers in (4, 24, 28, 36, 48):
        for num_layers in (1, 2, 5, 8):
            ids = default_layer_ids(num_target_layers, num_layers)
            assert ids == zlab.build_target_layer_ids(num_target_layers, num_layers)


def test_raw_rows_are_read_where_the_target_norms_or_scales_its_embedding(tmp_path: Path) -> None:
    target = make_target()
    theirs = their_drafter({}, {})
    theirs.save_pretrained(tmp_path)
    ours = hf_specdiff.load_drafter(tmp_path, target=target)
    rounds = random_rounds(ours)
    expected = our_rounds(ours, target, rounds)
    embedding = target.get_input_embeddings()
    embedding.embed_norm = torch.nn.RMSNorm(16)
    embedding.forward = lambda ids: embedding.embed_norm(torch.nn.Embedding.forward(embedding, ids))
    for logits, right in zip(our_rounds(ours, target, rounds), expected, strict=True):
        assert torch.equal(logits, right)


def test_what_a_file_says_counts_even_if_it_is_nothing() -> None:
    """A 0 is not a field left out: a drafter without convolutions is one, and a block of none is refused."""
    names = ("conv_kernel_size", "conv_group_size", "selector_rank", "selector_top_k")
    told, silent = Fields(dict.fromkeys(names, 0), "z-lab DFlash 2"), Fields({}, "z-lab DFlash 2")
    assert dflash.selector(told) == dict.fromkeys(names, 0)
    assert dflash.selector(silent) == dict(zip(names, (2, 16, 256, 16), strict=True))
    body = {name: value for name, value in make_drafter([0, 2]).config.to_dict().items() if name in BODY}
    top = {"architectures": ["DFlashDraftModel"], "num_target_layers": 3, "mask_token_id": MASK_TOKEN_ID, **body}
    fields = {"block_size": 0, "output_multiplier": 0.0, "input_embedding_scale": 0.0}
    record = dflash.read(top | {"dflash_config": fields}, {}, ())
    assert {name: record.fields[name] for name in fields} == fields
    with pytest.raises(ValueError, match="`block_size` must be"):
        SpecDiffConfig(**record.fields)

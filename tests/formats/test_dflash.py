"""Drafters in z-lab's layout, held against z-lab's own class and loop."""

from pathlib import Path
from typing import Any

import pytest
import torch
from dflash import model as zlab
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


def their_drafter(top: dict[str, Any], section: dict[str, Any]) -> zlab.DFlashDraftModel:
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
    drafter = zlab.DFlashDraftModel(config).eval()
    for parameter in drafter.parameters():
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, 1.0, 0.3)  # norms and biases that do something
    return drafter


@pytest.fixture(params=VARIANTS, ids=str)
def variant(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[zlab.DFlashDraftModel, PreTrainedModel, Path]:
    drafter = their_drafter(*VARIANTS[request.param])
    drafter.save_pretrained(tmp_path)
    return drafter, make_target(), tmp_path


def test_logits_are_theirs_over_rounds_with_cache(variant: tuple[zlab.DFlashDraftModel, PreTrainedModel, Path]) -> None:
    theirs, target, folder = variant
    ours = hf_specdiff.load_drafter(folder, target=target)
    rounds = random_rounds(ours)
    cache = zlab._make_cache(theirs.config)
    for (window, features, start), logits in zip(rounds, our_rounds(ours, target, rounds), strict=True):
        scale = float(zlab._draft_value(theirs.config, "input_embedding_scale", 1.0))
        states = theirs(
            target_hidden=features,
            noise_embedding=zlab._raw_input_embeddings(target, window, scale),
            position_ids=torch.arange(start - features.shape[1], start + window.shape[1])[None],
            past_key_values=cache,
            use_cache=True,
        )[:, 1:]
        zlab._crop_to(cache, start)
        torch.testing.assert_close(logits, theirs.compute_logits(states, target.lm_head), atol=1e-5, rtol=0)


def test_greedy_tokens_are_those_of_plain(variant: tuple[zlab.DFlashDraftModel, PreTrainedModel, Path]) -> None:
    _, target, folder = variant
    check_greedy(target, hf_specdiff.load_drafter(folder, target=target))


@pytest.mark.parametrize("name", ["plain", "causal", "sliding, causal", "sliding, bidirectional"])
def test_accepted_lengths_are_those_of_their_loop(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bundled drafter's weights, which a target accepts, in their layout and with their switches."""
    target, bundled, tokenizer = hf_specdiff.load_demo()
    top = {key: value for key, value in VARIANTS[name][0].items() if key != "layer_types"}
    if "sliding" in name:
        layer_types = ["sliding_attention"] * bundled.config.num_hidden_layers
        layer_types[0] = "full_attention"
        top |= {"layer_types": layer_types, "sliding_window": 24}
    fields = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "head_dim")
    fields += ("num_key_value_heads", "rms_norm_eps", "rope_parameters", "num_target_layers")
    own = bundled.config
    section = {name: getattr(own, name) for name in ("mask_token_id", "target_layer_ids", "block_size")}
    config = Qwen3Config(**{name: getattr(own, name) for name in fields}, dflash_config=section, **top)
    theirs = zlab.DFlashDraftModel(config).eval()
    theirs.load_state_dict({key: tensor for key, tensor in bundled.state_dict().items() if not key.startswith("markov_head.")})
    theirs.save_pretrained(tmp_path)
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

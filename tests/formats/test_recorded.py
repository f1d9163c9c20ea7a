"""Formats without a class that can be installed: checkpoints and logits that their own code produced once.

`rounds.safetensors` holds windows, features and logits of three rounds with a cache, the embedding that stood for the target's
where a drafter borrows it, and, of drafters whose heads know the token before, a greedy chain and how sure a head was of it.
Made with the classes of the public repositories hao-ai-lab/JetSpec, deepseek-ai/DeepSpec and sgl-project/SpecForge (its sliding
layers under the mask that it trains with), and for LiquidAI's drafters with those of Blaizzy/mlx-vlm.
"""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from safetensors.torch import save_file

import hf_specdiff
from tests.conftest import make_target
from tests.formats.rounds import Round
from tests.formats.rounds import check_greedy
from tests.formats.rounds import our_rounds
from tests.formats.rounds import our_states

DATA = Path(__file__).parent / "data"


def recorded_rounds(name: str) -> tuple[dict[str, torch.Tensor], list[Round]]:
    recorded = load_file(DATA / name / "rounds.safetensors")
    return recorded, [(recorded[f"window_{number}"], recorded[f"features_{number}"], 0) for number in range(3)]


def lender(embedding: torch.Tensor) -> Any:
    """Return what a drafter borrows: one matrix as embedding and head."""
    rows = torch.nn.Embedding.from_pretrained(embedding)
    head = torch.nn.Linear(*embedding.T.shape, bias=False)
    head.weight.data.copy_(embedding)
    return SimpleNamespace(get_input_embeddings=lambda: rows, get_output_embeddings=lambda: head)


@pytest.mark.parametrize(
    ("name", "causal", "size"),
    [
        ("jetspec", [True, True], {"hidden_size": 8, "num_hidden_layers": 4}),
        ("specforge_dflash", [True, False], {"hidden_size": 8}),
    ],
    ids=str,
)
def test_logits_are_theirs_with_their_causality(name: str, causal: list[bool], size: dict[str, int]) -> None:
    drafter = hf_specdiff.load_drafter(DATA / name)
    assert drafter.config.causal_layers == causal
    recorded, rounds = recorded_rounds(name)
    target = lender(recorded["embedding"])
    for number, logits in enumerate(our_rounds(drafter, target, rounds)):
        torch.testing.assert_close(logits, recorded[f"logits_{number}"], atol=1e-5, rtol=0)
    for layer in drafter.layers:
        layer.self_attn.is_causal_window = False
    different = our_rounds(drafter, target, rounds)
    assert (different[0] - recorded["logits_0"]).abs().max() > 1e-2
    real = make_target(**size)
    check_greedy(real, hf_specdiff.load_drafter(DATA / name, target=real))


def check_laws(drafter: Any, target: Any, name: str) -> None:
    """Hold the laws along a recorded chain, and how sure the head is, against theirs."""
    recorded, rounds = recorded_rounds(name)
    pairs = zip(our_rounds(drafter, target, rounds), our_states(drafter, target, rounds), strict=True)
    for number, (logits, states) in enumerate(pairs):
        previous, memory = rounds[number][0][:, 0], None
        for index, token in enumerate(recorded[f"tokens_{number}"].unbind(dim=1)):
            law, memory = drafter.step_logits(logits[:, index], states[:, index], previous, memory)
            torch.testing.assert_close(law, recorded[f"logits_{number}"][:, index], atol=1e-5, rtol=0)
            if f"confidence_{number}" in recorded:
                said = drafter.confidence(states[:, index], previous)
                torch.testing.assert_close(said, recorded[f"confidence_{number}"][:, index], atol=1e-5, rtol=0)
            previous = token


def test_deepspec_laws_given_the_token_before_are_theirs() -> None:
    """Its head has a memory, and embedding and head are its own."""
    target = make_target()
    drafter = hf_specdiff.load_drafter(DATA / "deepspec", target=target)
    check_laws(drafter, target, "deepspec")
    check_greedy(target, drafter)


@pytest.mark.parametrize("name", ["specforge_dspark", "lfm2_dspark"])
def test_laws_and_confidence_of_drafters_that_borrow_are_theirs(name: str) -> None:
    drafter, target = hf_specdiff.load_drafter(DATA / name), make_target(hidden_size=8)
    assert drafter.config.predicts_from_anchor
    assert drafter.config.confidence_head_with_markov
    check_laws(drafter, lender(recorded_rounds(name)[0]["embedding"]), name)
    check_greedy(target, hf_specdiff.load_drafter(DATA / name, target=target))


def test_pairs_of_neighbours_are_rotated_where_the_file_says_so() -> None:
    drafter = hf_specdiff.load_drafter(DATA / "lfm2_dspark")
    assert drafter.config.rope_interleaved
    recorded, rounds = recorded_rounds("lfm2_dspark")
    target = lender(recorded["embedding"])
    right = our_rounds(drafter, target, rounds)
    drafter.config.rope_interleaved = False
    assert (our_rounds(drafter, target, rounds)[0] - right[0]).abs().max() > 1e-2


def edited(name: str, folder: Path, config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> Path:
    shutil.copytree(DATA / name, folder)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_specforge_heads_are_found_wherever_it_put_them(tmp_path: Path) -> None:
    """Under `logit_head.` in early files; told by the class of all its drafters; and as its export for SGLang writes them."""
    config = json.loads((DATA / "specforge_dspark" / "config.json").read_text())
    tensors = load_file(DATA / "specforge_dspark" / "model.safetensors")
    parts = ("markov_head", "confidence_head")
    nested = {f"logit_head.{name}" if name.startswith(parts) else name: tensor for name, tensor in tensors.items()}
    expected = hf_specdiff.load_drafter(DATA / "specforge_dspark").state_dict()
    early = edited("specforge_dspark", tmp_path / "early", {**config, "architectures": ["DFlashDraftModel"]}, nested)
    full = {"layer_types": ["full_attention"] * 2, "use_sliding_window": False}
    heads = {name: config["dflash_config"][name] for name in ("markov_rank", "markov_head_type", "enable_confidence_head")}
    exported = {**config, **full, **heads, "architectures": ["Qwen3DSparkModel"]}
    for folder in (early, edited("specforge_dspark", tmp_path / "exported", exported, tensors)):
        loaded = hf_specdiff.load_drafter(folder)
        assert loaded.config.predicts_from_anchor
        assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.state_dict().items())


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        ({"projector_type": "dflash"}, ["`projector_type`", "SpecForge DSpark", "dflash"]),
        ({"shift_label": True}, ["`shift_label`", "SpecForge DSpark"]),
        ({"markov_rank": 4}, ["confidence_head", "(1, 12)"]),
        ({"confidence_head_with_markov": False}, ["confidence_head.proj.weight", "(1, 8)", "(1, 11)"]),
        ({"mask_token_id": None}, ["`mask_token_id`", "SpecForge DSpark"]),
    ],
    ids=str,
)
def test_specforge_files_that_contradict_themselves_are_refused(edit: dict[str, Any], words: list[str], tmp_path: Path) -> None:
    config = json.loads((DATA / "specforge_dspark" / "config.json").read_text())
    config["dflash_config"] |= edit
    folder = edited("specforge_dspark", tmp_path / "x", config, load_file(DATA / "specforge_dspark" / "model.safetensors"))
    with pytest.raises(ValueError, match="must") as caught:
        hf_specdiff.load_drafter(folder)
    assert all(word in str(caught.value) for word in words), caught.value

"""What cannot be loaded is refused in one line that names it, before memory is taken."""

import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import load_file
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

import hf_specdiff
from tests.conftest import VOCAB_SIZE
from tests.conftest import make_drafter
from tests.conftest import make_target
from tests.formats.referees import speculators
from tests.formats.test_dflash import their_drafter as zlab_drafter
from tests.formats.test_speculators import KEPT
from tests.formats.test_speculators import their_drafter as speculators_drafter

Edit = Callable[[dict[str, Any]], object]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    zlab_drafter({}, {}).save_pretrained(tmp_path)
    return tmp_path


def edit_config(folder: Path, edit: Edit) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    edit(config)
    path.write_text(json.dumps(config))


def edit_weights(folder: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def refusal(folder: Path, **target_fields: Any) -> str:
    """Return the line that a folder is refused with; no network with memory is made before."""
    with pytest.raises(ValueError, match=r"must") as caught, patch.object(hf_specdiff.SpecDiffDrafter, "from_pretrained", None):
        hf_specdiff.load_drafter(folder, target=make_target(**target_fields))
    assert "\n" not in str(caught.value)
    return str(caught.value)


CONFIGS: list[tuple[Edit, list[str]]] = [
    (lambda c: c["dflash_config"].update(use_swa=True), ["`use_swa`", "`dflash_config`", "z-lab DFlash"]),
    (lambda c: c["dflash_config"].update(projector_type="domino"), ["`projector_type`", "domino"]),
    (lambda c: c["dflash_config"].pop("mask_token_id"), ["`mask_token_id`", "z-lab DFlash"]),
    (lambda c: c.update(has_lm_head=False), ["`has_lm_head`", "ignored_fields=['has_lm_head']"]),
    (lambda c: c.update(block_size=4), ["`block_size`", "4", "6"]),
    (lambda c: c.update(is_causal=False) or c["dflash_config"].update(causal_head=True), ["`is_causal`", "`causal_head`"]),
    (lambda c: c.update(layer_types=["sliding_attention"] * 2), ["`sliding_window`"]),
    (lambda c: c.pop("hidden_size"), ["`hidden_size`", "config.json"]),
    (lambda c: c.update(num_target_layers=9), ["`target`", "9 layers", "3"]),
    (lambda c: c.update(hidden_size=32), ["`target`", "`hidden_size` 32", "16"]),
    (lambda c: c.update(vocab_size=90_000), ["`target`", "`vocab_size` 90000", str(VOCAB_SIZE)]),
    (lambda c: c.update(intermediate_size=64), ["mlp.down_proj", "(16, 64)", "(16, 32)"]),
    (lambda c: c.update(num_hidden_layers=3, layer_types=None), ["all weights", "layers.2"]),
    (lambda c: c.update(architectures=["Gemma4DSparkModel"]), ["Gemma 4"]),
    (lambda c: c.update(architectures=["FlashMapDraftModel"]), ["FlashMap", "noise"]),
    (lambda c: c.update(architectures=["LlamaForCausalLMEagle3"]), ["EAGLE"]),
    (lambda c: c.update(architectures=["Qwen3ForCausalLM"]), ["known format", "Qwen3ForCausalLM"]),
    (lambda c: c.update(architectures=["DFlashDraftModel", "MuseGlimmerAssistantModel"]), ["`architectures`", "one format"]),
    (lambda c: c.update(speculators_model_type="dflash"), ["one format", "`dflash_config`"]),
    (lambda c: c.update(speculators_model_type="dflash", model_type="specdiff"), ["one format", "`model_type`"]),
    (lambda c: c["dflash_config"].update(target_hidden_size=24), ["`target_hidden_size`", "z-lab DFlash", "24"]),
]


@pytest.mark.parametrize(("edit", "words"), CONFIGS, ids=lambda value: value[0] if isinstance(value, list) else "")
def test_a_config_that_is_not_understood_is_refused(folder: Path, edit: Edit, words: list[str]) -> None:
    edit_config(folder, edit)
    message = refusal(folder)
    assert all(word in message for word in words), message


def test_a_field_that_the_user_vouches_for_is_ignored(folder: Path) -> None:
    edit_config(folder, lambda config: config.update(favourite_colour="blue"))
    assert "`favourite_colour`" in refusal(folder)
    hf_specdiff.load_drafter(folder, ignored_fields=["favourite_colour"])


def test_files_that_are_missing_broken_or_pickled_are_refused(folder: Path) -> None:
    weights, config = folder / "model.safetensors", folder / "config.json"
    (folder / "mask_embedding.pt").write_bytes(b"pickle")
    assert "mask_embedding.pt" in refusal(folder)
    (folder / "mask_embedding.pt").unlink()
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-100])
    assert "model.safetensors" in (message := refusal(folder))
    assert "cut short" in message
    (folder / "model.safetensors.index.json").write_text("{}")
    assert "one set of weights" in refusal(folder)
    weights.unlink()
    assert "model.safetensors.index.json" in refusal(folder)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"fc.weight": "model-1-of-2.safetensors"}}))
    assert "must hold model-1-of-2.safetensors, which model.safetensors.index.json names" in refusal(folder)
    (folder / "model.safetensors.index.json").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    assert "pytorch_model.bin" in (message := refusal(folder))
    assert "run code" in message
    config.write_text("{")
    assert "must be JSON" in refusal(folder)
    config.unlink()
    assert "config.json" in refusal(folder)
    with pytest.raises(ValueError, match="`source` must be a drafter's folder"):
        hf_specdiff.load_drafter("nobody/nothing")


def test_tensors_that_are_not_understood_or_missing_are_refused(folder: Path) -> None:
    edit_weights(folder, lambda tensors: tensors.update({"layers.0.self_attn.sinks": torch.zeros(2)}))
    assert "`layers.0.self_attn.sinks`" in refusal(folder)
    edit_weights(folder, lambda tensors: tensors.pop("layers.0.self_attn.sinks") is None or tensors.pop("fc.weight"))
    assert "fc.weight" in refusal(folder)


def test_speculators_files_that_contradict_themselves_are_refused(tmp_path: Path) -> None:
    drafter = speculators_drafter(speculators.DFlashDraftModel, make_target(), {}, {"draft_vocab_size": len(KEPT)})
    drafter.save_pretrained(tmp_path)
    config = (tmp_path / "config.json").read_text()
    tensors = load_file(tmp_path / "model.safetensors")
    for edit, word in [
        (lambda c: c.update(speculators_version="0.12.0"), "`speculators_version`"),
        (lambda c: c.update(speculators_model_type="xpress"), "`speculators_model_type`"),
        (lambda c: c["speculators_config"]["proposal_methods"][0].update(speculative_tokens=6), "`speculative_tokens`"),
        (lambda c: c["transformer_layer_config"].update(sinks=True), "`sinks`"),
        (lambda c: c.update(noise_level=1), "`noise_level`"),
    ]:
        edit_config(tmp_path, edit)
        assert word in refusal(tmp_path)
        (tmp_path / "config.json").write_text(config)
    save_file(tensors | {"d2t": tensors["d2t"] + 2}, tmp_path / "model.safetensors", {"format": "pt"})
    assert "`d2t`" in refusal(tmp_path)
    save_file(tensors | {"d2t": tensors["d2t"] * 0}, tmp_path / "model.safetensors", {"format": "pt"})
    assert "`t2d`" in refusal(tmp_path)


def test_our_own_files_of_a_newer_version_are_refused(tmp_path: Path) -> None:
    make_drafter([0, 2]).save_pretrained(tmp_path)
    edit_config(tmp_path, lambda config: config.update(format_version=99))
    with pytest.raises(ValueError, match=r"`format_version` must be at most .* got 99"):
        hf_specdiff.load_drafter(tmp_path, target=make_target())


@pytest.mark.parametrize("is_trusted", [None, True])
def test_code_in_a_folder_is_never_run(folder: Path, is_trusted: bool | None) -> None:
    """It is not needed: the drafter loads without it, whatever a caller trusts."""
    witness = folder / "ran"
    (folder / "modeling.py").write_text(f"open({str(witness)!r}, 'w').close()\nclass Net: pass\n")
    names = dict.fromkeys(("AutoConfig", "AutoModel", "AutoModelForCausalLM"), "modeling.Net")
    edit_config(folder, lambda config: config.update(auto_map=names))
    hf_specdiff.load_drafter(folder, target=make_target(), **({} if is_trusted is None else {"trust_remote_code": is_trusted}))
    assert not witness.exists()


def test_the_ordinary_doors_advise_load_drafter(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"hf_specdiff\.load_drafter"):
        hf_specdiff.SpecDiffDrafter.from_pretrained(folder)
    with pytest.raises(ValueError, match=r"hf_specdiff\.load_drafter"):
        hf_specdiff.SpecDiffConfig.from_pretrained(folder)
    target, theirs = make_target(), zlab_drafter({}, {})
    with pytest.raises(TypeError, match=r"hf_specdiff\.load_drafter"):
        hf_specdiff.generate(target, torch.tensor([[1, 5]]), assistant_model=theirs)


def test_a_speculators_folder_never_fills_memory(tmp_path: Path) -> None:
    """Its vocabulary is large, and it drafts few tokens. Read as ours, nested fields would be Qwen3's defaults: 23 GB."""
    size = 151_936
    target = make_target(vocab_size=size)
    drafter = speculators_drafter(speculators.DFlashDraftModel, target, {"vocab_size": size}, {"draft_vocab_size": len(KEPT)})
    drafter.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").stat().st_size < 2.7e6
    script = (
        "import resource, sys, hf_specdiff\n"
        "from tests.conftest import make_target\n"
        f"target = make_target(vocab_size={size})\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "hf_specdiff.load_drafter(sys.argv[1], target=target)\n"
        "try: hf_specdiff.SpecDiffDrafter.from_pretrained(sys.argv[1])\n"
        "except ValueError: pass\n"
        "print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)\n"
    )
    limit = 40 * 2**30  # of address space: a fault fails here instead of taking the machine with it
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script, str(tmp_path)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit)),
        check=False,
    )
    assert done.returncode == 0, done.stderr[-500:]
    assert float(done.stdout) < 200


def test_our_own_drafters_load_through_the_same_door(tmp_path: Path) -> None:
    target, drafter, _ = hf_specdiff.load_demo()
    drafter.save_pretrained(tmp_path)
    loaded = hf_specdiff.load_drafter(tmp_path, target=target)
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), drafter.parameters(), strict=True))
    assert isinstance(AutoModelForCausalLM.from_pretrained(tmp_path), hf_specdiff.SpecDiffDrafter)

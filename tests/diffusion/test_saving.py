"""Diffusion language models written down as drafters and read again."""

import json
from pathlib import Path

import pytest
import torch

import hf_specdiff
from tests.conftest import make_target
from tests.diffusion.families import FAMILIES
from tests.diffusion.test_trials import MASK
from tests.diffusion.test_trials import make_body


@pytest.mark.parametrize("name", FAMILIES)
def test_each_family_is_saved_and_read_as_it_was(name: str, tmp_path: Path) -> None:
    family = FAMILIES[name]
    family.write(tmp_path / "theirs")
    drafter = hf_specdiff.load_drafter(tmp_path / "theirs", block_size=7, **family.settings)
    drafter.own_ids[5] = -1
    drafter.generation_config.tree_budget = 12
    drafter.save_pretrained(tmp_path / "ours")
    again = hf_specdiff.load_drafter(tmp_path / "ours")
    ids = torch.tensor([[3, 4, 6, 7, 8, 9, family.mask_token_id, family.mask_token_id]])
    with torch.no_grad():
        torch.testing.assert_close(again(ids, window_size=3).logits, drafter(ids, window_size=3).logits, atol=1e-6, rtol=1e-5)
    assert type(again.body) is type(drafter.body)
    assert again.config.block_size == 7
    assert again.block_length == family.block_length
    assert again.generation_config.tree_budget == 12
    assert not hasattr(drafter.body.config, "diffusion_drafter")


def test_what_a_file_must_say_is_asked_for(tmp_path: Path) -> None:
    drafter = hf_specdiff.DiffusionDrafter(make_body(), mask_token_id=MASK, target=make_target())
    drafter.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    written = json.loads(path.read_text())
    section = written["diffusion_drafter"]
    for change, message in (
        ({"diffusion_drafter": {name: value for name, value in section.items() if name != "logit_offset"}}, "'logit_offset'"),
        ({"diffusion_drafter": "full"}, "`diffusion_drafter` in config.json must name all of a drafter's settings"),
        ({"model_type": "resnet"}, "must be a language model of transformers, got 'resnet'"),
    ):
        path.write_text(json.dumps({**written, **change}))
        with pytest.raises(ValueError, match=message):
            hf_specdiff.load_drafter(tmp_path)

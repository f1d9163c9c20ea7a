"""A drafter's folder: what is saved, what is loaded from it, and what is refused."""

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

import hf_specdiff
from hf_specdiff import SpecDiffConfig
from hf_specdiff import SpecDiffDrafter
from hf_specdiff.hub.card import drafter_card
from tests.conftest import make_drafter
from tests.conftest import make_target


def test_a_card_follows_the_drafter_until_its_owner_takes_it_over(tmp_path: Path) -> None:
    make_drafter().save_pretrained(tmp_path)
    make_drafter(block_size=4).save_pretrained(tmp_path)
    card = tmp_path / "README.md"
    assert "| block size | 4 " in card.read_text()
    card.write_text("# My own words")
    (tmp_path / "custom_generate" / "mine.py").write_text("1")
    make_drafter().save_pretrained(tmp_path)
    assert card.read_text() == "# My own words"
    assert (tmp_path / "custom_generate" / "mine.py").is_file()


def test_a_card_without_figures_says_so() -> None:
    card = drafter_card(SpecDiffConfig(target_model="org/target"), 1234)
    assert "Not measured" in card.text
    assert "1,234" in card.text
    assert card.data.eval_results is None
    local = drafter_card(SpecDiffConfig(target_model="/home/me/target", target_layer_ids=[1], num_target_layers=3), 1)
    assert local.data.base_model is None
    assert "reads the target's hidden states" in local.text


@pytest.mark.parametrize(
    "asked",
    [
        {"acceptance": "block"},
        {"acceptance": "self_selection"},
        {"num_denoising_steps": 3},
        {"draft_temperature": 0.0},
        {"position_ids": torch.tensor([[3, 4, 5]])},
    ],
)
def test_a_default_shape_yields_to_what_a_call_asks_for(asked: dict[str, Any]) -> None:
    prompt, settings = torch.tensor([[5, 6, 7]]), {"do_sample": True, "max_new_tokens": 9, **asked}
    for shape in ("tree", "chain", "samples"):
        drafter = make_drafter()
        drafter.generation_config.draft_shape = shape
        hf_specdiff.generate(make_target(), prompt, assistant_model=drafter, **settings)
    with pytest.raises(ValueError, match="draft_shape"):  # said in the call, it is an order
        hf_specdiff.generate(
            make_target(), prompt, assistant_model=drafter, draft_shape="tree", acceptance="block", max_new_tokens=9
        )


def test_defaults_of_speculation_survive_saving(tmp_path: Path) -> None:
    drafter = make_drafter()
    drafter.generation_config.gamma, drafter.generation_config.draft_shape = 3, "chain"
    drafter.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    prompt = torch.tensor([[5, 6, 7]])
    settings: dict[str, Any] = {"do_sample": False, "max_new_tokens": 9, "return_dict_in_generate": True}
    stats = hf_specdiff.generate(make_target(), prompt, assistant_model=loaded, **settings).speculation
    assert stats.draft_shape == "chain"
    assert max(stats.num_drafted[0]) == 3
    stock = make_target().generate(prompt, assistant_model=loaded, **settings)
    assert torch.equal(stock.sequences, make_target().generate(prompt, **settings).sequences)
    for shape in ({"draft_shape": "tree"}, {"tree_budget": "auto"}, {"gamma": "auto"}):  # the stock loop takes one draft
        for name, value in shape.items():
            setattr(loaded.generation_config, name, value)
        assert torch.equal(make_target().generate(prompt, assistant_model=loaded, **settings).sequences, stock.sequences)


def test_defaults_that_a_file_leaves_open_are_filled_in(tmp_path: Path) -> None:
    make_drafter().save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"gamma": 4}')
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert (loaded.generation_config.gamma, loaded.generation_config.num_assistant_tokens) == (4, 5)
    prompt = torch.tensor([[5, 6, 7]])
    settings: dict[str, Any] = {"do_sample": False, "max_new_tokens": 9}
    assert torch.equal(
        make_target().generate(prompt, assistant_model=loaded, **settings), make_target().generate(prompt, **settings)
    )


def test_a_repositorys_code_does_not_run_without_trust(tmp_path: Path) -> None:
    folder, mark = tmp_path / "strange_drafter", tmp_path / "it-ran"
    make_drafter().save_pretrained(folder)
    for path in (folder / "custom_generate" / "modeling_specdiff.py", folder / "custom_generate" / "generate.py"):
        path.write_text(f"open({str(mark)!r}, 'w').close()\n" + path.read_text())
    drafter = AutoModelForCausalLM.from_pretrained(folder)
    assert type(drafter) is SpecDiffDrafter
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        hf_specdiff.load_demo()[0].generate(torch.tensor([[5, 6]]), custom_generate=str(folder))
    assert not mark.exists()
    trusted = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)  # control: with trust it does
    assert mark.exists()
    output = trusted.generate(torch.tensor([[5, 6]]), max_new_tokens=3)  # its own `generate`, arguments by position too
    assert output.sequences.shape == (1, 5)


class Payload:
    """Unpickling it leaves a trace."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (str(self.mark), "w")


def test_pickled_weights_are_refused_unread(tmp_path: Path) -> None:
    folder, mark = tmp_path / "pickled", tmp_path / "it-ran"
    drafter = make_drafter()
    drafter.save_pretrained(folder)
    (folder / "model.safetensors").unlink()
    with (folder / "pytorch_model.bin").open("wb") as file:
        pickle.dump(Payload(mark), file)
    with pytest.raises(ValueError, match="must hold a whole drafter"):
        AutoModelForCausalLM.from_pretrained(folder)
    with pytest.raises(ValueError, match="`use_safetensors` must be True"):
        AutoModelForCausalLM.from_pretrained(folder, use_safetensors=False)
    assert not mark.exists()


@pytest.mark.parametrize("trust", [False, True])
def test_tensors_of_wrong_shape_are_refused(tmp_path: Path, trust: bool) -> None:
    folder = tmp_path / "misshapen"
    make_drafter().save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    weights["norm.weight"] = torch.ones(3)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="must hold a whole drafter"):
        AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=trust)


def test_block_sizes_that_disagree_are_refused(tmp_path: Path) -> None:
    make_drafter().save_pretrained(tmp_path)
    path = tmp_path / "generation_config.json"
    before = path.read_text()
    path.write_text(json.dumps({**json.loads(before), "gamma": 99}))
    with pytest.raises(ValueError, match=r"`gamma` in the drafter's generation_config\.json must be at most"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    # The host's own count is cut to the window, and its schedules let it grow past it.
    path.write_text(json.dumps({**json.loads(before), "num_assistant_tokens": 99}))
    AutoModelForCausalLM.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="`block_size` must be the same"):
        SpecDiffConfig(block_size=16, dflash_config={"block_size": 8})


def test_a_later_format_is_refused() -> None:
    with pytest.raises(ValueError, match="saved by a later one"):
        SpecDiffConfig(format_version=2)


def test_an_old_transformers_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "for_newer"
    make_drafter().save_pretrained(folder)
    (folder / "custom_generate" / "requirements.txt").write_text("transformers>=99\n")
    with pytest.raises(ImportError, match="transformers>=99"):
        hf_specdiff.load_demo()[0].load_custom_generate(folder, trust_remote_code=True)
    path = folder / "custom_generate" / "configuration_specdiff.py"
    path.write_text(path.read_text().replace("transformers>=5.17,<6", "transformers>=99,<100"))
    with pytest.raises(ImportError, match="transformers>=99"):
        AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)


def test_layers_that_the_target_lacks_are_refused() -> None:
    target, drafter, _ = hf_specdiff.load_demo()
    drafter.config.target_layer_ids = [1, 5, 9, 99]
    with pytest.raises(ValueError, match="layers that the target has"):
        hf_specdiff.generate(target, torch.tensor([[5, 6]]), assistant_model=drafter)

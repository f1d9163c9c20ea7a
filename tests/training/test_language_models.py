"""Diffusion language models in training: their windows are those of decoding, runs resume, and what is saved loads."""

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LogitsProcessorList
from transformers import logging

import hf_specdiff
from hf_specdiff.commands.main import main
from hf_specdiff.core.cache import RaggedCache
from hf_specdiff.core.conditioning import make_drafter as put_around
from hf_specdiff.core.speculation import SpeculationConfig
from hf_specdiff.core.text import Text
from hf_specdiff.training.data import Sequences
from hf_specdiff.training.data import collate
from hf_specdiff.training.evaluation import HeldOut
from hf_specdiff.training.pipeline import fit_drafter
from hf_specdiff.training.pipeline import train_drafter
from hf_specdiff.training.plan import TrainingPlan
from hf_specdiff.training.trainer import SpecDiffTrainer
from hf_specdiff.training.windows import sample_windows
from tests.conftest import make_target
from tests.diffusion.test_trials import MASK
from tests.diffusion.test_trials import make_body
from tests.training.test_training import KillAfter
from tests.training.test_training import make_sequences
from tests.training.test_training import make_trainer

PLAN = TrainingPlan(
    None, block_size=5, num_epochs=1, batch_size=4, num_anchors=2, bf16=False, save_steps=3, learning_rate=1e-2, max_length=24
)
PROMPT = torch.tensor([[1, 5, 9, 4, 7, 7, 3]])


def language_model(**settings: Any) -> hf_specdiff.DiffusionDrafter:
    fields = {"mask_token_id": MASK, "block_size": 5, "context_cache": "exact", "logit_offset": -1, **settings}
    return hf_specdiff.DiffusionDrafter(make_body(), target=make_target(), **fields)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    language_model().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def load(folder: Path) -> hf_specdiff.DiffusionDrafter:
    return hf_specdiff.load_drafter(folder, target=make_target(), context_cache="exact")


def fit(folder: Path, plan: TrainingPlan, drafter: Any, sequences: Sequences | None = None, **more: Any) -> bool:
    sequences = sequences or make_sequences()
    return fit_drafter(make_target(), sequences, folder, plan, mask_token_id=MASK, language_model=drafter, **more)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"logit_offset": 0, "own_ids": [-1, *range(30, 0, -1)]},
        {"context_cache": "prefix"},
        {"attention": "block_causal", "block_length": 4},
    ],
    ids=["shifted", "own rows and ids", "prefix", "blocks"],
)
def test_training_windows_give_the_logits_of_decoding(settings: dict[str, Any], tmp_path: Path) -> None:
    drafter = language_model(**settings)
    trainer = make_trainer(tmp_path, drafter.body, drafter, num_anchors=2)
    batch = collate([trainer.train_dataset[i] for i in range(3)])
    with torch.no_grad():
        _, outputs = trainer.compute_loss(drafter.body, batch, return_outputs=True)
    windows = sample_windows(batch, 2, 5, MASK, torch.Generator().manual_seed(trainer._window_seed(batch["indices"])))
    for row, anchor in enumerate(windows.anchors.flatten().tolist()):
        text = batch["input_ids"][row // 2 : row // 2 + 1, : anchor + 1]
        decoding = put_around(drafter, make_target(), SpeculationConfig(4, draft_temperature=0.0), LogitsProcessorList())
        decoding.rows = RaggedCache(decoding.cache, 1)
        window = torch.tensor([[int(text[0, -1]), *[MASK] * 4]])
        with torch.no_grad():
            logits = decoding.window_logits(window, Text.of_prompt(text), None)
        drafted = slice(None) if drafter.drafted_ids is None else drafter.drafted_ids
        wanted = logits[0].log_softmax(-1)[:, drafted]
        torch.testing.assert_close(outputs["log_probs"][row], wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("rank", [None, 2], ids=["all weights", "adapter"])
def test_what_is_saved_loads_and_a_killed_run_ends_in_the_same_weights(rank: int | None, base: Path, tmp_path: Path) -> None:
    plan = replace(PLAN, lora_rank=rank, loss_weights={"ce": 1.0, "streak": 0.5, "tv": 0.1, "kl": 0.1})
    drafter = load(base)
    drafter.generation_config.gamma = 3
    arguments = {"held_out": HeldOut.of(make_sequences(3, seed=9), 24)}
    assert fit(tmp_path / "whole", plan, drafter, **arguments)
    loaded = load(tmp_path / "whole")
    ids = torch.randint(3, 29, (2, 9))
    with torch.no_grad():
        made, found, before = (one(ids, window_size=5).logits for one in (drafter.eval(), loaded, load(base)))
    torch.testing.assert_close(found, made, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(found, before, atol=1e-2)
    assert loaded.generation_config.gamma == 3
    assert loaded.config.training["objective"].startswith("ce (weight 1) + streak (weight 0.5)")
    assert (tmp_path / "whole" / "adapter_model.safetensors").is_file() == (rank is not None)
    again = load(base)
    again.generation_config.gamma = 3
    with pytest.raises(RuntimeError, match="killed"):
        fit(tmp_path / "broken", plan, again, callbacks=[KillAfter(5)], **arguments)
    assert fit(tmp_path / "broken", plan, load(base), **arguments)
    resumed, whole = (load(tmp_path / name).body.state_dict() for name in ("broken", "whole"))
    for name, weight in whole.items():
        assert torch.equal(resumed[name], weight), name
    target = make_target()
    settings: dict[str, Any] = {"do_sample": False, "max_new_tokens": 12}
    written = hf_specdiff.generate(target, PROMPT, assistant_model=loaded, draft_shape="samples", gamma=4, **settings)
    assert torch.equal(written, target.generate(PROMPT, **settings))


def test_words_that_it_cannot_write_end_a_window(tmp_path: Path) -> None:
    """The token 7 means something else to the language model: no objective asks for it, nor for what follows it."""
    drafter = language_model(foreign_ids=[7])
    trainer = make_trainer(tmp_path, drafter.body, drafter, num_anchors=8, loss_weights={"ce": 1.0, "streak": 1.0})
    ids = [[3, 4, 5, 7, 8, 9, 10, 11]]
    batch = {**collate([{"input_ids": torch.tensor(row), "is_answer": torch.ones(8).bool(), "index": 0} for row in ids])}
    loss, outputs = trainer.compute_loss(drafter.body, batch, return_outputs=True)
    assert torch.isfinite(loss)
    assert outputs["log_probs"].shape[-1] == 30  # of 31 tokens
    drafted = drafter.drafted_ids
    assert drafted is not None
    assert 7 not in drafted
    windows = sample_windows(batch, 8, 5, MASK, torch.Generator().manual_seed(trainer._window_seed(batch["indices"])))
    for wanted, labels in zip(windows.labels.tolist(), outputs["labels"].tolist(), strict=True):
        cut = wanted.index(7) if 7 in wanted else len(wanted)
        assert [int(drafted[label]) if label >= 0 else label for label in labels[:cut]] == wanted[:cut]
        assert all(label in (-1, -100) for label in labels[cut:])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora_rank": 2, "lora_layers": ["q_proj", "c_attn"]}, r"`lora_layers` must be linear layers .*q_proj.*, got c_attn"),
        ({"lora_rank": 0}, "`lora_rank` must be at least 1, got 0"),
        ({"lora_layers": ["q_proj"]}, "`lora_rank` must be given with `lora_layers`"),
        ({"context_weight": 0.5}, "`context_weight` must be left out for a diffusion language model, got 0.5"),
        ({"target_layer_ids": [1]}, "`target_layer_ids` must be left out"),
        ({"draft_vocab_size": 20}, "`draft_vocab_size` must be left out"),
        ({"from_target": True}, "`from_target` must be left out"),
    ],
)
def test_settings_that_say_nothing_about_a_language_model_are_refused(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        fit(tmp_path / "out", replace(PLAN, **changes), language_model())
    assert not (tmp_path / "out" / "config.json").exists()


def test_adapters_are_for_language_models_alone(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="`lora_rank` and `lora_layers` must be left out for drafters of ours"):
        fit(tmp_path, replace(PLAN, lora_rank=4), None)
    with pytest.raises(ValueError, match="`start_from` must be left out with `language_model`"):
        fit(tmp_path, PLAN, language_model(), start_from=tmp_path)


def test_without_peft_an_adapter_is_refused(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fit(tmp_path / "out", replace(PLAN, lora_rank=2), load(base))
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ValueError, match=r"peft must be installed to train an adapter of rank 2, .*hf_specdiff\[train\]"):
        fit(tmp_path / "other", replace(PLAN, lora_rank=2), load(base))
    with pytest.raises(ValueError, match=r"peft must be installed to load the adapter .*hf_specdiff\[train\]"):
        load(tmp_path / "out")


def test_an_adapter_that_is_not_whole_or_of_another_model_is_refused(base: Path, tmp_path: Path) -> None:
    fit(tmp_path / "out", replace(PLAN, lora_rank=2), load(base))
    body = make_body(hidden_size=32)
    hf_specdiff.DiffusionDrafter(body, mask_token_id=MASK, block_size=5, logit_offset=-1).save_pretrained(base)
    with pytest.raises(ValueError, match=r"must be an adapter for .*, got one that does not fit"):
        load(tmp_path / "out")
    (tmp_path / "out" / "adapter_model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"must hold an adapter in adapter_model.safetensors"):
        load(tmp_path / "out")


def test_a_model_of_nowhere_keeps_its_adapter_in_memory() -> None:
    from hf_specdiff.training.language_models import add_adapter

    drafter = language_model()
    add_adapter(drafter, 2, ["q_proj", "layers.0.mlp.up_proj"], 0)
    trained = {name for name, weight in drafter.body.named_parameters() if weight.requires_grad}
    assert len(trained) == 2 * 3
    with pytest.raises(ValueError, match="must have a body that was loaded from a folder"):
        drafter.save_pretrained("anywhere")


@pytest.fixture
def train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Return `hf-specdiff train` on a few texts in this process; it returns the exit code."""
    _, _, tokenizer = hf_specdiff.load_demo()
    tokenizer.padding_side = "left"
    target = make_target(vocab_size=len(tokenizer))
    body = make_body(vocab_size=len(tokenizer))
    folder = tmp_path / "base"
    hf_specdiff.DiffusionDrafter(body, mask_token_id=3, logit_offset=-1).save_pretrained(folder)
    for place, model in ((tmp_path / "target", target), (folder, None)):
        tokenizer.save_pretrained(place)
        if model is not None:
            model.save_pretrained(place)
    monkeypatch.chdir(tmp_path)
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"text": f"def f_{i}(x):\n    return x + {i}"}) + "\n" for i in range(12)))
    settings = "--block-size 5 --max-length 40 --batch-size 4 --num-anchors 2 --num-epochs 1 --save-steps 2 --eval-tokens 4"

    def run(*options: str) -> int:
        words = ["train", str(tmp_path / "target"), "--prompts", str(prompts), "--output", str(tmp_path / "drafter")]
        monkeypatch.setattr(sys, "argv", ["hf-specdiff", *words, "--init", "base", *settings.split(), *options])
        verbosity = logging.get_verbosity()
        try:
            main()
        except SystemExit as end:
            return int(end.code or 0)
        finally:
            logging.set_verbosity(verbosity)
        return 0

    return run


def test_the_command_aligns_a_language_model(
    train: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    for options, name in (
        (["--num-layers", "2"], "--num-layers"),
        (["--conditioning", "features"], "--conditioning features"),
        (["--cache-features", "x"], "--cache-features"),
    ):
        assert train(*options) == 2
        assert f"`{name}` must be left out where `--init` is a diffusion language model" in capsys.readouterr().err
    assert train("--lora", "2", "--lora-layers", "k_proj", "--loss", "ce", "--loss", "streak") == 0
    folder = tmp_path / "drafter"
    assert json.loads((folder / "adapter_config.json").read_text())["r"] == 2
    monkeypatch.chdir(tmp_path.parent)  # the model that it was trained on is found from anywhere
    target = hf_specdiff.load_drafter(folder).config.target_model
    assert target == str(tmp_path / "target")
    assert (folder / "tokenizer.json").is_file()
    monkeypatch.chdir(tmp_path)
    assert train("--lora", "4") == 2
    assert "'lora_rank': (2, 4)" in capsys.readouterr().err


def test_another_language_model_is_another_run(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, _, tokenizer = hf_specdiff.load_demo()
    monkeypatch.setattr(SpecDiffTrainer, "train", lambda self, **settings: None)
    plan = replace(PLAN, num_eval_prompts=0)

    def run(drafter: Any) -> bool:
        return train_drafter(make_target(), tokenizer, make_sequences(), tmp_path / "out", plan, language_model=drafter)

    assert run(load(base))
    other = hf_specdiff.DiffusionDrafter(make_body(seed=5), mask_token_id=MASK, block_size=5, logit_offset=-1)
    with pytest.raises(ValueError, match="'language_model'"):
        run(other)

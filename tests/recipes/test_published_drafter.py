"""The drafter that lies in `drafters/`: whole, small, and with a card of what was measured of it and nothing else."""

import json
from pathlib import Path

import torch

from hf_specdiff.core.modeling_specdiff import SpecDiffDrafter
from hf_specdiff.hub.card import drafter_card
from hf_specdiff.hub.repository import own_defaults
from recipes.smollm2 import HUB_NAME
from recipes.smollm2 import REPOSITORY

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "drafters" / "smollm2-135m-instruct"
MOST_BYTES = 28 * 2**20


def test_the_repository_is_whole_and_small() -> None:
    drafter = SpecDiffDrafter.from_pretrained(FOLDER, dtype="auto")
    assert drafter.dtype == torch.bfloat16
    assert drafter.config.target_model == HUB_NAME
    assert drafter.drafted_ids is not None
    assert len(drafter.drafted_ids.unique()) == drafter.config.draft_vocab_size
    names = {path.name for path in FOLDER.iterdir()}
    assert names >= {"README.md", "results.json", "tokenizer.json", "generation_config.json", "custom_generate"}
    assert sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file()) <= MOST_BYTES


def test_the_card_holds_the_measured_figures() -> None:
    results = json.loads((ROOT / "benchmarks" / "results" / "smollm2.json").read_text(encoding="utf-8"))
    assert json.loads((FOLDER / "results.json").read_text(encoding="utf-8")) == results
    drafter = SpecDiffDrafter.from_pretrained(FOLDER)
    card = drafter_card(
        drafter.config,
        drafter.num_parameters(),
        repo_id=REPOSITORY,
        results=results,
        license_name="apache-2.0",
        defaults=own_defaults(drafter),
    )
    text = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert text == str(card)
    assert all(f"{row['ratio_to_plain']:.2f}x" in text for row in results["rows"])

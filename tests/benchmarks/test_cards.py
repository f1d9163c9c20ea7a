"""The bundled drafters' cards hold the measured figures and no others."""

from pathlib import Path

import pytest

from benchmarks.cards import KINDS
from benchmarks.cards import card_of
from benchmarks.report import read_record

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("kind", KINDS)
def test_model_cards_hold_the_measured_figures(kind: str) -> None:
    record = read_record(ROOT, "standard")
    card = (ROOT / "model_cards" / f"{kind}.md").read_text(encoding="utf-8")
    assert card == card_of(kind, record)
    row = next(row for row in record["rows"] if row["method"] == f"{kind}, chain")
    assert f"{row['ratio_to_plain']:.2f}x" in card

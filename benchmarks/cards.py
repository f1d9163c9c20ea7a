"""The bundled drafters' cards, from what was measured of them: `python -m benchmarks.cards model_cards`."""

import json
from pathlib import Path
from typing import Annotated
from typing import Any

import typer

from hf_specdiff.core.files import write_text_whole
from hf_specdiff.core.modeling_specdiff import SpecDiffDrafter
from hf_specdiff.demo.bundle import PAIR
from hf_specdiff.hub.card import drafter_card
from hf_specdiff.hub.repository import own_defaults

RESULTS = Path("benchmarks") / "results" / "standard.json"
KINDS = ("features", "tokens")


def results_of(record: dict[str, Any], kind: str) -> dict[str, Any]:
    """Return what was measured of one bundled drafter.

    Args:
        record (`dict`): of `hf-specdiff bench`.
        kind (`str`): `"features"` or `"tokens"`.

    Returns:
        `dict`: the same conditions, and the rows of that drafter under the names of their shapes and rules.
    """
    prefix = f"{kind}, "
    rows = [row for row in record["rows"] if row["method"].startswith(prefix) and " samples by " not in row["method"]]
    named = [{**row, "method": row["method"].removeprefix(prefix)} for row in rows]
    return {"conditions": record["conditions"], "rows": named}


def card_of(kind: str, record: dict[str, Any]) -> str:
    """Return a bundled drafter's card.

    Args:
        kind (`str`): `"features"` or `"tokens"`.
        record (`dict`): of `hf-specdiff bench`.

    Returns:
        `str`: the file's text.
    """
    drafter = SpecDiffDrafter.from_pretrained(PAIR / kind)
    card = drafter_card(
        drafter.config,
        drafter.num_parameters(),
        repo_id=f"your-name/hf-specdiff-demo-{kind}",
        results=results_of(record, kind),
        license_name="apache-2.0",
        defaults=own_defaults(drafter),
    )
    return str(card)


def main(output: Annotated[Path, typer.Argument(help="folder for the cards")]) -> None:
    """Write the cards of both bundled drafters."""
    record = json.loads((output.absolute().parent / RESULTS).read_text(encoding="utf-8"))
    output.mkdir(exist_ok=True)
    for kind in KINDS:
        write_text_whole(output / f"{kind}.md", card_of(kind, record))
    typer.echo(f"{len(KINDS)} cards written to {output}")


if __name__ == "__main__":
    typer.run(main)

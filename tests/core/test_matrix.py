"""Every causal language model type that transformers registers, as a target: what is written, or why it is refused.

`pytest -m "slow or not slow" tests/core/test_matrix.py` tries all and writes docs/models.md; the default run tries a few.
Texts are longer than all windows; drafts are right three times out of four; refusals must be ours.
"""

import json
import os
import traceback
from collections.abc import Callable
from collections.abc import Iterator
from dataclasses import asdict
from dataclasses import dataclass
from dataclasses import field
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import hf_specdiff
from hf_specdiff.core.files import write_text_whole
from tests.core.oracle import drafter_for
from tests.core.oracle import oracle
from tests.core.tiny_models import CAUSAL_TYPES
from tests.core.tiny_models import make_model
from tests.core.tiny_models import widen

PAGE = Path(__file__).parents[2] / "docs" / "models.md"
NUM_NEW = 32
# Plain's logits of the first two tokens, where texts first differ: rounding decides below this.
TIE = 1e-3
# Windows beside full attention, no masks of ours, a running state; the plainest and the refused have tests of their own.
SHORT_LIST = ["gemma3_text", "bloom", "qwen3_next"]
IDENTICAL, REFUSED, WRONG = "identical", "refused", "**differs**"
GREEDY = {"do_sample": False, "max_new_tokens": NUM_NEW, "pad_token_id": 0, "use_cache": True}


@dataclass
class Row:
    """What became of one type: an outcome for each column, and the reasons of refusals and failures, each once."""

    model_type: str
    name: str = ""
    outcomes: dict[str, str] = field(default_factory=dict)
    reasons: list[str] = field(default_factory=list)

    def add(self, column: str, outcome: str, reason: str = "") -> None:
        worst = max([self.outcomes.get(column, IDENTICAL), outcome], key=[IDENTICAL, REFUSED, WRONG].index)
        self.outcomes[column] = worst
        if reason and reason not in self.reasons:
            self.reasons.append(reason)


def prompts() -> tuple[torch.Tensor, torch.Tensor]:
    """Return three prompts of different lengths, padded on the left, and their mask; the first one is the longest."""
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(3, 99, (size,), generator=generator) for size in (22, 6, 13)]
    ids, mask = torch.zeros(3, 22, dtype=torch.long), torch.zeros(3, 22, dtype=torch.long)
    for index, row in enumerate(rows):
        ids[index, -len(row) :], mask[index, -len(row) :] = row, 1
    return ids, mask


class Trial:
    """One model against plain decoding.

    Args:
        model_type (`str`): as registered.
    """

    def __init__(self, model_type: str) -> None:
        self.row = Row(model_type)
        self.model = make_model(model_type)
        self.row.name = type(self.model).__name__
        self.ids, self.mask = prompts()
        self.plain = self._plainly(self.ids[:1])
        for seed in range(1, 6):
            if len(set(self._new(self.plain))) >= 8:
                break
            widen(self.model, seed, gain=1.6 + 0.4 * seed)
            self.plain = self._plainly(self.ids[:1])
        num_layers = getattr(self.model.config.get_text_config(), "num_hidden_layers", 2)
        self.drafters = {"tokens": drafter_for(self.model), "features": drafter_for(self.model, sorted({0, num_layers - 1}))}

    def _plainly(self, ids: torch.Tensor, mask: torch.Tensor | None = None, **settings: Any) -> torch.Tensor:
        return self.model.generate(ids, attention_mask=mask, **{**GREEDY, **settings})

    def _new(self, texts: torch.Tensor) -> list[int]:
        return texts[0, self.ids.shape[1] :].tolist()

    def run(self) -> Row:
        """Try everything."""
        ends = self._end_tokens()
        for column, shape in (("chain", "chain"), ("tree", "tree")):
            settings = {"draft_shape": shape, "tree_budget": 8}
            self._check(column, "features", self.plain, self.plain, **settings)
            self._check(column, "tokens", self.plain, self.plain, **settings)
            if self.row.outcomes[column] == REFUSED:
                continue
            self._check(column, "tokens" if shape == "chain" else "features", self.plain, None, **settings)
            for end in ends:
                self._check(
                    column, "tokens", self._plainly(self.ids[:1], eos_token_id=end), self.plain, eos_token_id=end, **settings
                )
        self._check_batches()
        return self.row

    def _end_tokens(self) -> list[int]:
        """Return tokens of the text that stand early and late in it, each for the first time."""
        new = self._new(self.plain)
        found = [
            next((t for i, t in enumerate(new) if i in span and t not in new[:i]), None)
            for span in (range(3, 16), range(16, 31))
        ]
        return [token for token in found if token is not None]

    def _check_batches(self) -> None:
        """Rows of a batch with left padding are written as if they were alone, or as the host's own batch writes them."""
        alone = []
        for row, mask in zip(self.ids, self.mask, strict=True):
            new = self._plainly(row[mask.bool()][None])[0, int(mask.sum()) :]
            alone.append(torch.cat([row, torch.nn.functional.pad(new, (0, NUM_NEW - len(new)))]))
        texts = torch.stack(alone)
        try:
            together = self._plainly(self.ids, self.mask)
        except Exception:  # what the host cannot do itself is no matter of ours
            together = texts
        for conditioning, shape in (("tokens", "tree"), ("features", "chain")):
            settings = {"draft_shape": shape if self.row.outcomes["tree"] == IDENTICAL else "chain", "tree_budget": 8}
            self._check("batch", conditioning, texts, texts, self.mask, together, **settings)

    def _check(
        self,
        column: str,
        conditioning: str,
        want: torch.Tensor,
        told: torch.Tensor | None,
        mask: torch.Tensor | None = None,
        or_else: torch.Tensor | None = None,
        **settings: Any,
    ) -> None:
        ids = self.ids if mask is not None else self.ids[:1]
        drafter = self.drafters[conditioning]
        call: Callable[[], torch.Tensor] = lambda: hf_specdiff.generate(  # noqa: E731
            self.model, ids, attention_mask=mask, assistant_model=drafter, **{**GREEDY, **settings}
        )
        try:
            with oracle(want[:, :0] if told is None else told, 1.0 if told is None else 0.25):
                got = call()
        except ValueError as error:
            if "hf_specdiff" not in traceback.extract_tb(error.__traceback__)[-1].filename:
                self.row.add(column, WRONG, f"{column}: {type(error).__name__}: {str(error)[:160]}")
            elif conditioning == "features" and "that reads tokens" in str(error):
                self.row.add(column, IDENTICAL, str(error))  # the other drafter says how the model does
            else:
                self.row.add(column, REFUSED, str(error))
        except Exception as error:  # a crash is an outcome to report, for all types
            self.row.add(column, WRONG, f"{column}: {type(error).__name__}: {str(error)[:160]}")
        else:
            same = any(got.shape == other.shape and torch.equal(got, other) for other in (want, or_else) if other is not None)
            tie = 0.0 if same else self._gap(got, want, mask)
            note = "" if same else f"{column}, {conditioning}: differs from plain where its two best logits are {tie:.1e} apart"
            self.row.add(column, IDENTICAL if tie < TIE else WRONG, note)

    def _gap(self, got: torch.Tensor, want: torch.Tensor, mask: torch.Tensor | None) -> float:
        """Return how far plain's two best logits are apart where the texts first differ."""
        shared = min(got.shape[1], want.shape[1])
        apart = (got[:, :shared] != want[:, :shared]).nonzero()
        if not len(apart):
            return float("inf")
        row, place = apart[0].tolist()
        prefix = want[row : row + 1, :place]
        if mask is not None:
            prefix = prefix[:, int((mask[row] == 0).sum()) :]
        settings = {**GREEDY, "max_new_tokens": 1, "return_dict_in_generate": True, "output_logits": True}
        best = self.model.generate(prefix, **settings).logits[0][0].topk(2).values
        return float(best[0] - best[1])


def tried(model_type: str) -> Row:
    """Return a type's row; one of which there is no tiny model has no outcomes."""
    try:
        trial = Trial(model_type)
    except Exception as error:  # the host's classes raise anything
        return Row(model_type, reasons=[f"{type(error).__name__}: {str(error)[:160]}"])
    return trial.run()


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of this run's rows, for all workers; whoever ends when no type is missing writes the page."""
    own = tmp_path_factory.getbasetemp()
    folder = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "matrix"
    folder.mkdir(exist_ok=True)
    yield folder
    if {path.stem for path in folder.glob("*.json")} >= set(CAUSAL_TYPES):
        rows = [Row(**json.loads((folder / f"{kind}.json").read_text(encoding="utf-8"))) for kind in sorted(CAUSAL_TYPES)]
        write_text_whole(PAGE, page(rows))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "model_type",
    [kind if kind in SHORT_LIST else pytest.param(kind, marks=pytest.mark.slow) for kind in sorted(CAUSAL_TYPES)],
)
def test_every_type_is_identical_or_refused(model_type: str, found: Path) -> None:
    row = tried(model_type)
    (found / f"{model_type}.json").write_text(json.dumps(asdict(row)), encoding="utf-8")
    assert WRONG not in row.outcomes.values(), row.reasons
    assert row.outcomes or model_type not in SHORT_LIST


def page(found: list[Row]) -> str:
    """Return docs/models.md."""
    ran = [row for row in found if row.outcomes]
    counts = {
        column: [sum(row.outcomes[column] == kind for row in ran) for kind in (IDENTICAL, REFUSED, WRONG)] for column in COLUMNS
    }
    lines = [
        "# Models",
        "",
        f"Every causal language model type that transformers {transformers.__version__} registers, as a target. "
        '`pytest -m "slow or not slow" tests/core/test_matrix.py` wrote this page.',
        "",
        "A tiny random model of each type, in float32, on a CPU, writes greedily: with drafters that read tokens and with ones "
        "that read the target's hidden states, with drafts that are right three times out of four and with wrong ones, past "
        "the windows of sliding and chunked layers, with end tokens inside a draft, and three prompts of different lengths at "
        "a time.",
        "",
        '- "identical": token for token what `model.generate` writes; for a batch, of each prompt alone or of that batch.',
        '- "refused": a `ValueError` before anything is written, for the reason given.',
        '- "differs": it does not, and says nothing; a defect.',
        "",
        "| | identical | refused | differs |",
        "|---|---|---|---|",
        *[f"| {column} | {' | '.join(map(str, numbers))} |" for column, numbers in counts.items()],
        "",
        "What to do where something is refused: where trees are, leave `draft_shape` out, and chains are drafted; where "
        "chains are, use plain `model.generate`. Batches of models that take no tree are verified row after row.",
        "",
        "| type | chain | tree | batch | why |",
        "|---|---|---|---|---|",
    ]
    for row in ran:
        cells = " | ".join(row.outcomes[column] for column in COLUMNS)
        lines.append(f"| {row.model_type} | {cells} | {_why(row)} |")
    missing = [row for row in found if not row.outcomes]
    lines += ["", "Not tried, since no tiny model of these could be made from a config alone:", ""]
    lines += [f"- {row.model_type}: {_why(row)}" for row in missing]
    return "\n".join(lines) + "\n"


COLUMNS = ("chain", "tree", "batch")


OPENINGS = (
    "`draft_shape` must be 'chain' here, got 'tree': ",
    "`input_ids` must be one sequence and `num_return_sequences` 1 for this call, got 3 sequences: ",
    "`model` must give drafted tokens in one pass the logits that it gives them one by one, but ",
)


def _why(row: Row) -> str:
    """Return a row's reasons for the table, each once, without the class's name and what the page tells once for all."""
    found = []
    for reason in row.reasons:
        flat = " ".join(reason.split()).replace("|", "/")
        for opening in OPENINGS:
            flat = flat.removeprefix(opening)
        for remedy in (". Call generate once", ". Use plain model.generate", ". Use a drafter that reads tokens"):
            flat = flat.split(remedy)[0]
        found.append(flat.removeprefix(row.name).strip().rstrip("."))
    return "; ".join(dict.fromkeys(found))

"""README.md and docs/: their blocks run, their links lead somewhere, and what they name exists."""

import inspect
import itertools
import re
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from transformers import LlamaConfig
from transformers import LlamaForCausalLM

import hf_specdiff
from benchmarks import specdiff_papers
from hf_specdiff.commands.main import app
from hf_specdiff.core.speculation import SPECULATION_ARGUMENTS
from tests.core.test_lossless import PROMPT
from tests.core.test_lossless import distance
from tests.core.test_lossless import drafter_for
from tests.core.test_lossless import law_of

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXTS = {path: path.read_text(encoding="utf-8") for path in PAGES}
LINK = re.compile(r"\]\(([^)\s]+)\)")
MOST_README_BYTES = 9_000


def blocks_of(path: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", TEXTS[path], flags=re.DOTALL | re.MULTILINE)


def anchors_of(text: str) -> set[str]:
    """Return what the headings of a page are called in links, as GitHub names them."""
    prose = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ (.+)$", prose, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@cache
def run_blocks(path: Path) -> dict[str, Any]:
    namespace: dict[str, Any] = {}
    for block in blocks_of(path, "python"):
        exec(compile(block, path.name, "exec"), namespace)
    return namespace


@pytest.mark.parametrize("path", [path for path in PAGES if blocks_of(path, "python")], ids=lambda path: path.name)
def test_python_blocks_run_one_after_the_other(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_blocks(path)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_blocks_that_need_the_hub_are_python_at_least(path: Path) -> None:
    for block in blocks_of(path, "py"):
        compile(block, path.name, "exec")


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_links_lead_to_files_and_headings(path: Path) -> None:
    for link in LINK.findall(TEXTS[path]):
        if link.startswith("https://"):
            continue
        name, _, anchor = link.partition("#")
        target = path if not name else (path.parent / name).resolve()
        assert target.exists(), link
        assert target.is_relative_to(ROOT), link
        if anchor:
            assert anchor in anchors_of(target.read_text(encoding="utf-8")), link


def test_the_readme_is_short_and_leads_to_every_page() -> None:
    readme = PAGES[0]
    assert readme.stat().st_size <= MOST_README_BYTES
    assert {f"docs/{path.name}" for path in PAGES[1:]} <= set(LINK.findall(TEXTS[readme]))


def test_commands_and_options_exist_and_every_command_is_named() -> None:
    command = typer.main.get_command(app)
    named = set()
    for line in itertools.chain.from_iterable(text.splitlines() for text in TEXTS.values()):
        for name, rest in re.findall(r"hf-specdiff (\w+)([^`|#]*)", line):
            known = {option for parameter in command.commands[name].params for option in parameter.opts} | {"--help"}
            assert set(re.findall(r"--[\w-]+", rest)) <= known, line
            named.add(name)
    assert named == set(command.commands)


def test_options_named_by_themselves_exist() -> None:
    command = typer.main.get_command(app)
    known = {option for part in command.commands.values() for parameter in part.params for option in parameter.opts}
    extra = {"--help", "--work", "--steps", "--num-seeds", "--drafter", "--no-deps"}  # of all; of `benchmarks`; of pip
    extra |= {"--num-category-prompts", "--num-sampled", "--num-untrained", "--minutes"}  # of benchmarks.smollm2
    extra |= {"--num-passes", "--length", "--num-tokens", "--num-calls"}  # of benchmarks.experts and benchmarks.context_cache
    extra |= {f"--{name.replace('_', '-')}" for name in inspect.signature(specdiff_papers.main).parameters}
    extra |= {"--speculative-config", "--speculative-algorithm"}  # of vLLM; of SGLang, as the next two
    extra |= {"--speculative-draft-model-path", "--speculative-num-draft-tokens"}
    for path, text in TEXTS.items():
        assert set(re.findall(r"(?<![\w-])--[a-z][\w-]*", text)) <= known | extra, path.name


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in set(re.findall(r"(?:`|^)make ([a-z]+)\b", "\n".join(TEXTS.values()), flags=re.MULTILINE)):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target


def test_all_arguments_are_in_the_table() -> None:
    rows = set(re.findall(r"^\| `(\w+)` \|", TEXTS[ROOT / "docs" / "arguments.md"], flags=re.MULTILINE))
    assert set(SPECULATION_ARGUMENTS) | {"profile"} <= rows


def test_the_map_names_every_module() -> None:
    """`python -m benchmarks.layout` brings it up to date."""
    named = {link.removeprefix("../") for link in LINK.findall(TEXTS[ROOT / "docs" / "layout.md"])}
    for folder in ("hf_specdiff", "recipes", "benchmarks"):
        for path in (ROOT / folder).rglob("*.py"):
            assert path.name == "__init__.py" or path.relative_to(ROOT).as_posix() in named, path


@pytest.mark.parametrize(("task", "number"), [("math", 0), ("math", 1), ("code", 0), ("code", 1)])
def test_the_reference_loop_writes_what_ours_writes(task: str, number: int) -> None:
    """Token by token, and round by round as long as a whole window fits into the text."""
    reference = run_blocks(ROOT / "docs" / "lossless.md")
    target, drafter, tokenizer = reference["target"], reference["drafter"], reference["tokenizer"]
    ids = tokenizer(hf_specdiff.load_prompts(task)[number]["prompt"])["input_ids"]
    text, added = reference["reference_generate"](target, drafter, ids, num_new_tokens=40, gamma=7)
    settings = {"draft_shape": "chain", "gamma": 7, "do_sample": False, "max_new_tokens": 40, "return_dict_in_generate": True}
    settings["prompt_lookup_num_tokens"] = 0  # which the reference does not do
    output = hf_specdiff.generate(target, torch.tensor([ids]), assistant_model=drafter, **settings)
    assert output.sequences[0].tolist() == text
    whole = [sum(added[:count]) <= 40 - 1 - 8 for count in range(len(added))]
    ours = [accepted + 1 for (accepted,) in output.speculation.num_accepted]
    assert ours[: sum(whole)] == added[: sum(whole)]
    assert sum(whole) > 3


def test_the_reference_loops_samples_have_the_law_of_plain_generate(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every random choice of it is walked through, once with a window of two and once with several rounds."""
    torch.manual_seed(3)
    sizes = {"vocab_size": 4, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(**sizes, initializer_range=0.5, bos_token_id=1, eos_token_id=0, pad_token_id=0)
    target, drafter = LlamaForCausalLM(config).eval(), drafter_for(None)
    reference = {}
    exec(blocks_of(ROOT / "docs" / "lossless.md", "python")[0], reference)

    def law(length: int, gamma: int, temperature: float) -> Counter:
        def call() -> torch.Tensor:
            text, _ = reference["reference_generate"](target, drafter, PROMPT[0].tolist(), length, gamma, temperature)
            return torch.tensor([text])

        return law_of(call, monkeypatch)

    for length, gamma in ((2, 2), (3, 1)):
        settings = {"max_new_tokens": length, "do_sample": True, "top_k": 0, "temperature": 0.7}
        plain = law_of(lambda settings=settings: target.generate(PROMPT, **settings), monkeypatch)
        assert distance(plain, law(length, gamma, 0.7)) < 2e-6
        if length == 2:
            assert distance(plain, law(length, gamma, 0.8)) > 1e-3  # control: another temperature is seen

"""Prompts are the same wherever they are read from, and what cannot be read is refused in one line."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from datasets import Dataset
from datasets import DatasetDict

import hf_specdiff
from hf_specdiff.training import corpus
from hf_specdiff.training.corpus import read_corpus
from hf_specdiff.training.prompts import encode
from hf_specdiff.training.prompts import encode_document
from hf_specdiff.training.prompts import prompt_of
from hf_specdiff.training.prompts import read_prompts

ASK, ANSWER = {"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}
CHATS = [{"messages": [ASK, ANSWER]}, {"messages": [ASK, ANSWER, ASK]}, {"messages": []}]
TEXTS = [{"text": "one"}, {"text": " "}, {"text": "two\nlines"}]
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"


def write_lines(path: Path, records: list[dict]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def sources(records: list[dict], folder: Path) -> list[str]:
    """Write the same records in every form; each has a column of its own that nobody asked for."""
    data = Dataset.from_list([{**record, "id": number} for number, record in enumerate(records)])
    other = Dataset.from_list([{"text": "of another split"}])
    data.save_to_disk(folder / "one")
    DatasetDict({"test": other, "train": data}).save_to_disk(folder / "default")
    DatasetDict({"train": other, "test": data}).save_to_disk(folder / "named")
    data.to_parquet(folder / "file.parquet")
    names = ["one", "default", "named:test", "file.parquet", next((folder / "one").glob("*.arrow")).relative_to(folder)]
    return [str(folder / name) for name in names]


@pytest.mark.parametrize("as_is", [False, True])
@pytest.mark.parametrize("records", [CHATS, TEXTS], ids=["chats", "texts"])
def test_a_data_set_reads_like_the_same_lines(records: list[dict], as_is: bool, tmp_path: Path) -> None:
    expected = read_prompts(write_lines(tmp_path / "lines.jsonl", records), as_is=as_is)
    assert len(expected) == 2  # the blank one is left out
    for source in [str(tmp_path / "lines.jsonl"), *sources(records, tmp_path)]:
        assert read_corpus(source, as_is=as_is) == expected, source


def test_as_is_takes_whole_documents_and_no_prompts(tmp_path: Path) -> None:
    chat = [ASK, ANSWER]
    record = {"prompt": "2 + 2?", "messages": chat, "text": None}
    assert prompt_of(record, "") == "2 + 2?"
    assert prompt_of(record, "", as_is=True) == chat
    assert prompt_of({"messages": chat}, "") == [ASK]
    with pytest.raises(ValueError, match=r"`prompts` must have a 'text' field, or 'messages'.* in line 1 of"):
        read_corpus(str(write_lines(tmp_path / "p.jsonl", [{"prompt": "only"}])), as_is=True)


def test_a_document_ends_where_it_ends_and_a_prompt_where_the_answer_begins() -> None:
    tokenizer = hf_specdiff.load_demo()[2]
    with pytest.raises(ValueError, match="without a chat template"):
        encode_document(tokenizer, [ASK])
    tokenizer.chat_template = TEMPLATE
    chat = [ASK, ANSWER]
    assert tokenizer.decode(encode_document(tokenizer, chat)[0]).endswith("<user>2 + 2?\n<assistant>4\n")
    assert tokenizer.decode(encode(tokenizer, [ASK])).endswith("<user>2 + 2?\n<a>")
    ids = encode(tokenizer, "one")
    assert encode_document(tokenizer, "one") == ([*ids, tokenizer.eos_token_id], [True] * (len(ids) + 1))
    tokenizer.eos_token = None
    assert encode_document(tokenizer, "one") == (ids, [True] * len(ids))


def test_a_field_of_any_name_is_read(tmp_path: Path) -> None:
    records = [{"question": "2 + 2?", "text": "no"}, {"question": [ASK, ANSWER], "text": "no"}]
    lines = write_lines(tmp_path / "lines.jsonl", records)
    assert read_corpus(str(lines), field="question") == ["2 + 2?", [ASK]]
    Dataset.from_list(records[:1]).save_to_disk(tmp_path / "data")
    assert read_corpus(str(tmp_path / "data"), field="question") == ["2 + 2?"]
    with pytest.raises(ValueError, match="`prompts` must have a column query, got question, text"):
        read_corpus(str(tmp_path / "data"), field="query")
    with pytest.raises(ValueError, match="`prompts` must have a 'query' field"):
        read_corpus(str(lines), field="query")


def test_names_of_the_hub_are_loaded_with_their_split(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def load_dataset(name: str, split: str) -> Dataset:
        calls.append((name, split))
        return Dataset.from_list(TEXTS)

    monkeypatch.setattr(corpus, "load_dataset", load_dataset)
    for source in ("org/name", "org/name:test", "org/some.name-2:train[:5]"):
        assert read_corpus(source) == ["one", "two\nlines"]
    assert calls == [("org/name", "train"), ("org/name", "test"), ("org/some.name-2", "train[:5]")]


def test_what_the_hub_does_not_give_ends_in_one_line() -> None:
    """Tests are offline, so the real call fails like any other without a network."""
    with pytest.raises(
        ValueError, match=r"`prompts` must be a data set that can be loaded, got 'nobody/nothing:test': "
    ) as caught:
        read_corpus("nobody/nothing:test")
    assert "\n" not in str(caught.value)


def test_bad_data_sets_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "load_dataset", lambda *arguments, **settings: pytest.fail("asked the Hub"))
    Dataset.from_list(TEXTS).save_to_disk(tmp_path / "one")
    Dataset.from_list([{"question": "a", "id": 1}]).save_to_disk(tmp_path / "columns")
    Dataset.from_list([{"messages": [ASK]}, {"messages": [{"role": "user", "content": None}]}]).save_to_disk(tmp_path / "row")
    Dataset.from_list([{"text": ""}]).save_to_disk(tmp_path / "blank")
    DatasetDict({"test": Dataset.from_list(TEXTS), "dev": Dataset.from_list(TEXTS)}).save_to_disk(tmp_path / "splits")
    (tmp_path / "folder").mkdir()
    (tmp_path / "broken.parquet").write_text("no")
    for name, words in {
        "one:train": "no splits. Leave ':train' out",
        "splits": "no split 'train'. Name one of test, dev behind a colon",
        "splits:valid": "no split 'valid'",
        "columns": "a column prompt, text, messages, got question, id in",
        "row": "row 2 of",
        "blank": "at least one prompt",
        "folder": "neither a `Dataset` directory nor",
        "broken.parquet": "Parquet file size is 2 bytes",
        "none": "which does not exist",
    }.items():
        with pytest.raises(ValueError, match="`prompts` must") as caught:
            read_corpus(str(tmp_path / name))
        assert words in str(caught.value), name
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="which does not exist"):
        read_corpus("data/prompts.jsonl")  # of the form of a name on the Hub, and plainly none


def python(code: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)


def test_the_other_commands_do_without_what_training_needs() -> None:
    code = """
import sys
import hf_specdiff
print("imported:", *(name for name in ("datasets", "hf_specdiff.training.corpus") if name in sys.modules))
sys.modules["datasets"] = sys.modules["matplotlib"] = None
from hf_specdiff.commands.main import main
for arguments in ("train target --prompts p.txt --output x", "bench --output x", "generate nowhere/here drafter"):
    sys.argv = ["hf-specdiff", *arguments.split()]
    try:
        main()
    except SystemExit as end:
        print(arguments.split()[0], end.code)
import runpy
sys.argv = ["hf-specdiff", *"demo --num-prompts 0".split()]
del sys.modules["hf_specdiff.commands.main"]
runpy.run_module("hf_specdiff.commands.main", run_name="__main__")  # as `python -m` does, to the process's end
"""
    done = python(code)
    assert done.stdout.splitlines() == ["imported:", "train 2", "bench 2", "generate 2"], done.stderr
    assert done.returncode == 2
    assert "`num_prompts` must be from 1" in done.stderr
    assert "Traceback" not in done.stderr
    for words in ("'hf_specdiff[train]'", "'hf_specdiff[bench]'", "`--prompt` or `--prompts-file` must be given"):
        assert words in " ".join(done.stderr.split())

"""Prompts from files of strangers end in one line where they are none."""

import json
from pathlib import Path

import pytest

import hf_specdiff
from hf_specdiff.training.prompts import as_turns
from hf_specdiff.training.prompts import encode
from hf_specdiff.training.prompts import read_prompts
from tests.conftest import TEMPLATE


@pytest.mark.parametrize(
    "line",
    [
        "[" * 100_000,
        '{"a":' * 100_000,
        '{"prompt": ' + "[" * 100_000 + "]" * 100_000 + "}",
        '{"prompt": 1' + "0" * 10_000 + "}",
    ],
    ids=["lists", "objects", "a deep field", "a long number"],
)
def test_json_that_is_too_deep_or_too_long_is_refused(line: str, tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text(json.dumps({"prompt": "a"}) + "\n" + line + "\n")
    with pytest.raises(ValueError, match=r"`prompts` must be one JSON object a line.*in line 2") as caught:
        read_prompts(file)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300 + len(str(file))


def test_a_field_as_deep_as_json_is_read_is_no_traceback(tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    for depth in range(100, 3000, 100):
        file.write_text('{"prompt": ' + "[" * depth + "]" * depth + "}\n")
        with pytest.raises(ValueError, match="`prompts` must"):
            read_prompts(file)


def test_texts_are_turns_where_the_tokenizer_has_a_template() -> None:
    tokenizer = hf_specdiff.load_demo()[2]
    chat = [{"role": "user", "content": "b"}]
    assert as_turns(["a", chat], tokenizer) == ["a", chat]
    tokenizer.chat_template = TEMPLATE
    assert as_turns(["a", chat], tokenizer) == [[{"role": "user", "content": "a"}], chat]
    assert as_turns(["a", chat], tokenizer, raw=True) == ["a", chat]
    assert tokenizer.decode(encode(tokenizer, chat)) == "user: b\nassistant:"
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="must be texts for a tokenizer without a chat template"):
        encode(tokenizer, chat)

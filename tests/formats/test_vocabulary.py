"""What words stand for, however a tokenizer's files spell them."""

import json
from pathlib import Path
from typing import Any

import pytest

from hf_specdiff.formats.source import Source
from hf_specdiff.formats.vocabulary import Vocabulary
from hf_specdiff.formats.vocabulary import own_ids
from hf_specdiff.formats.vocabulary import read_vocabulary


def read(folder: Path, words: list[str], **parts: Any) -> Vocabulary:
    model = {"vocab": {word: i for i, word in enumerate(words)}, **parts.pop("model", {})}
    (folder / "config.json").write_text("{}")
    (folder / "tokenizer.json").write_text(json.dumps({"model": model, **parts}))
    found = read_vocabulary(Source(str(folder), {}))
    assert found is not None
    return found


def test_a_word_is_the_same_in_the_spelling_of_bytes_and_of_sentencepiece(tmp_path: Path) -> None:
    decoders = [{"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "}, {"type": "ByteFallback"}]
    pieces = read(
        tmp_path,
        ["<0x0A>", "\u2581the", "caf\u00e9", "the", "\u2581x"],
        model={"byte_fallback": True},
        decoder={"type": "Sequence", "decoders": decoders},
    )
    of_bytes = read(tmp_path, ["the", "\u0120the", "\u010a", "caf\u00c3\u00a9"], pre_tokenizer={"type": "ByteLevel"})
    assert of_bytes.base == {0: b"the", 1: b" the", 2: b"\n", 3: "caf\u00e9".encode()}
    assert own_ids(of_bytes, pieces, 4, 5, "x") == [2, 1, 3, 0, -1]
    assert own_ids(of_bytes, pieces, 3, 5, "x") == [2, 1, -1, 0, -1]  # a tokenizer with more words than the body has rows


def test_control_other_spellings_are_other_words(tmp_path: Path) -> None:
    raw = read(tmp_path, ["\u0120the", "\u2581the", "<0x0A>"])
    assert raw.base == {0: "\u0120the".encode(), 1: "\u2581the".encode(), 2: b"<0x0A>"}


def test_few_words_in_common_are_refused() -> None:
    few, many = Vocabulary({0: b"a", 1: b"b"}), Vocabulary({i: bytes([97 + i]) for i in range(21)})
    with pytest.raises(ValueError, match=r"got 2 words in common: 9.5% of the target's 21 and 100.0% of its own 2"):
        own_ids(few, many, 2, 21, "x")
    with pytest.raises(ValueError, match=r"100.0% of the target's 2 and 9.5% of its own 21"):
        own_ids(many, few, 21, 2, "x")
    with pytest.raises(ValueError, match="got 0 words in common"):
        own_ids(Vocabulary(), few, 2, 2, "x")

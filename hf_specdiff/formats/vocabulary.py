"""Which words ids stand for, from a tokenizer's files; and which ids of two models mean the same.

Reads JSON, never code.
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from dataclasses import field
from typing import Any

from transformers.utils import logging

from hf_specdiff.formats.source import Source

logger = logging.get_logger(__name__)


# Words that two tokenizers must share, of either's own, for drafts to be worth translating.
LEAST_SHARE = 0.1
# How tokenizers of bytes spell them: those that can be read as themselves, all others as what stands behind the 256.
_READABLE = [byte for byte in range(256) if 33 <= byte <= 126 or 161 <= byte <= 172 or byte >= 174]
_OTHERS = [byte for byte in range(256) if byte not in _READABLE]
BYTES = {chr(byte): byte for byte in _READABLE} | {chr(256 + place): byte for place, byte in enumerate(_OTHERS)}
# How tokenizers of SentencePiece's kind spell a space, and bytes that are in no word of theirs.
SPACE = "\u2581"
SINGLE_BYTE = re.compile(r"<0x([0-9A-F]{2})>")


@dataclass
class Vocabulary:
    """A tokenizer's words, each as the bytes that it stands for in a text, however the files spell it.

    Attributes:
        base (`dict[int, bytes]`): those it was trained with.
        added (`dict[int, bytes]`): those that were added later, special ones among them.
        mask_token_id (`int`, *optional*): that of its mask, if it has one.
    """

    base: dict[int, bytes] = field(default_factory=dict)
    added: dict[int, bytes] = field(default_factory=dict)
    mask_token_id: int | None = None

    def word(self, token_id: int) -> bytes | None:
        """Return what an id stands for, `None` if for nothing."""
        return self.added.get(token_id, self.base.get(token_id))

    def ids(self) -> dict[bytes, int]:
        """Return the id of each word; of several the lowest."""
        return {word: token_id for token_id, word in sorted((self.base | self.added).items(), reverse=True)}


def read_vocabulary(source: Source) -> Vocabulary | None:
    """Read the words of a folder or repository.

    Args:
        source (`Source`): of a model with its tokenizer.

    Returns:
        `Vocabulary`, *optional*: `None` if there are no files that say it.

    Raises:
        ValueError: if a file is broken.
    """
    whole, settings = _json(source, "tokenizer.json"), _json(source, "tokenizer_config.json") or {}
    if whole is not None:
        words = whole.get("model", {}).get("vocab", {})
        # A list where each word has a score, in the order of their ids.
        pairs = list(words.items()) if isinstance(words, dict) else [(entry[0], i) for i, entry in enumerate(words)]
        added = {entry["id"]: entry["content"] for entry in whole.get("added_tokens", [])}
    else:
        words = _json(source, "vocab.json")
        if words is None:
            return None
        pairs, added = list(words.items()), {}
    added |= {i: word for word, i in (_json(source, "added_tokens.json") or {}).items()}
    added |= {int(i): entry["content"] for i, entry in settings.get("added_tokens_decoder", {}).items()}
    spelt_as = _spelling(whole)
    base = {i: spelt_as(word) for word, i in pairs if i not in added}
    mask = settings.get("mask_token")
    mask = mask.get("content") if isinstance(mask, dict) else mask
    mask_ids = [i for word, i in [*((word, i) for i, word in added.items()), *pairs] if word == mask]
    return Vocabulary(base, {i: word.encode() for i, word in added.items()}, mask_ids[0] if mask_ids else None)


def _spelling(whole: Any) -> Callable[[str], bytes]:
    """Return what turns a trained word, as the file spells it, into bytes; files older than tokenizer.json spell as GPT-2's."""
    parts = {} if whole is None else {name: whole.get(name) for name in ("normalizer", "pre_tokenizer", "decoder")}
    described = json.dumps(parts, ensure_ascii=False)
    if whole is None or '"ByteLevel"' in described:
        return lambda word: bytes(BYTES[char] for char in word) if all(char in BYTES for char in word) else word.encode()
    has_bytes, has_spaces = whole.get("model", {}).get("byte_fallback", False), SPACE in described

    def bytes_of(word: str) -> bytes:
        found = SINGLE_BYTE.fullmatch(word) if has_bytes else None
        if found:
            return bytes([int(found[1], 16)])
        return (word.replace(SPACE, " ") if has_spaces else word).encode()

    return bytes_of


def own_ids(own: Vocabulary, theirs: Vocabulary, num_rows: int, size: int, name: str) -> list[int]:
    """Return, for each of a target's ids, the drafter's id of the same word.

    Args:
        own (`Vocabulary`): the drafter's.
        theirs (`Vocabulary`): the target's.
        num_rows (`int`): ids that the drafter has rows for.
        size (`int`): ids that the target has rows for.
        name (`str`): of the drafter, for the message.

    Returns:
        `list[int]`: of `size` ids; -1 for words that the drafter does not have. What is no word to either stands for itself.

    Raises:
        ValueError: if they share too few of the words that they were trained with.
    """
    common = len(set(own.base.values()) & set(theirs.base.values()))
    shares = [common / max(len(one.base), 1) for one in (theirs, own)]
    if min(shares) < LEAST_SHARE:
        raise ValueError(
            f"{name!r} must have the target's tokenizer, or one that shares at least {LEAST_SHARE:.0%} of either's words with "
            f"it, got {common} words in common: {shares[0]:.1%} of the target's {len(theirs.base)} and {shares[1]:.1%} of its "
            f"own {len(own.base)}. Use a language model of the target's family."
        )
    ids, known = [], own.ids()
    for i in range(size):
        word = theirs.word(i)
        found = i if own.word(i) == word else known.get(word, -1) if word is not None else -1
        ids.append(found if found < num_rows else -1)
    if any(found not in (i, -1) for i, found in enumerate(ids)):
        logger.warning(
            f"{name!r} has other ids than the target for the same words: drafts are translated through the {common} words that "
            f"they share, {shares[0]:.0%} of the target's and {shares[1]:.0%} of its own. It drafts no others."
        )
    return ids


def _json(source: Source, name: str) -> Any:
    path = source.file(name)
    if path is None:
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{name} of {source.name!r} must be JSON, got: {error}. Download it again.") from error

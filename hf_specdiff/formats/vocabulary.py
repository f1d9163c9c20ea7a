"""Which words ids stand for, from a tokenizer's files; and whether two models mean the same by them.

Reads JSON, never code.
"""

import json
from dataclasses import dataclass
from dataclasses import field
from typing import Any

from hf_specdiff.formats.source import Source


@dataclass
class Vocabulary:
    """A tokenizer's words.

    Attributes:
        base (`dict[int, str]`): those it was trained with.
        added (`dict[int, str]`): those that were added later, special ones among them.
        mask_token_id (`int`, *optional*): that of its mask, if it has one.
    """

    base: dict[int, str] = field(default_factory=dict)
    added: dict[int, str] = field(default_factory=dict)
    mask_token_id: int | None = None

    def word(self, token_id: int) -> str | None:
        """Return what an id stands for, `None` if for nothing."""
        return self.added.get(token_id, self.base.get(token_id))


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
        pairs = words.items() if isinstance(words, dict) else ((entry[0], i) for i, entry in enumerate(words))
        added = {entry["id"]: entry["content"] for entry in whole.get("added_tokens", [])}
    else:
        words = _json(source, "vocab.json")
        if words is None:
            return None
        pairs, added = words.items(), {}
    added |= {i: word for word, i in (_json(source, "added_tokens.json") or {}).items()}
    added |= {int(i): entry["content"] for i, entry in settings.get("added_tokens_decoder", {}).items()}
    base = {i: word for word, i in pairs if i not in added}
    mask = settings.get("mask_token")
    mask = mask.get("content") if isinstance(mask, dict) else mask
    mask_ids = [i for i, word in (base | added).items() if word == mask]
    return Vocabulary(base, added, mask_ids[0] if mask_ids else None)


def foreign_ids(own: Vocabulary, theirs: Vocabulary, size: int, name: str) -> list[int]:
    """Return the ids that a target has no word for, or another one.

    Args:
        own (`Vocabulary`): the drafter's.
        theirs (`Vocabulary`): the target's.
        size (`int`): ids that both have rows for.
        name (`str`): of the drafter, for the message.

    Returns:
        `list[int]`: added words only.

    Raises:
        ValueError: if words of the trained vocabulary differ: it is another tokenizer.
    """
    shared = [i for i in range(size) if i in own.base and i in theirs.base]
    differing = [i for i in shared if own.base[i] != theirs.base[i]]
    if differing or not shared:
        first = differing[0] if differing else None
        detail = (
            "no common word" if first is None else f"{own.base[first]!r} for the target's {theirs.base[first]!r} at {first}"
        )
        raise ValueError(
            f"{name!r} must have the target's tokenizer, got another one ({detail}; {len(differing)} of {len(shared)} words "
            "differ). Use a language model of the target's family."
        )
    return [i for i in range(size) if own.word(i) is not None and own.word(i) != theirs.word(i)]


def _json(source: Source, name: str) -> Any:
    path = source.file(name)
    if path is None:
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{name} of {source.name!r} must be JSON, got: {error}. Download it again.") from error

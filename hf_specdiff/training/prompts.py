"""Prompts and documents: texts and chats from a file, and their token ids. Knows no data sets and no models."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# A prompt is a text, or a chat: messages with a role and a content, the one to be answered last.
Prompt = str | list[dict[str, str]]


def read_prompts(path: Path, *, as_is: bool = False, field: str | None = None) -> list[Prompt]:
    """Read prompts from a file.

    Args:
        path (`pathlib.Path`): a `.jsonl` file of objects with a "prompt", "text" or "messages" field, or a text file with a
            prompt in each line.
        as_is (`bool`): see `prompt_of`.
        field (`str`, *optional*): see `prompt_of`; for `.jsonl` files.

    Returns:
        `list`: the prompts, blank ones left out.

    Raises:
        ValueError: if the file is missing, holds no prompt, or a line is no such object.
    """
    if not path.is_file():
        raise ValueError(f"`prompts` must be a text or JSON-lines file, got {str(path)!r}, which does not exist.")
    if path.suffix in (".json", ".csv", ".tsv"):
        raise ValueError(
            f"`prompts` must be a text or JSON-lines file, got {str(path)!r}. Write one JSON object a line, as .jsonl."
        )
    if path.suffix != ".jsonl":
        return without_blank(_lines_of(path), str(path))
    records = read_records(path)
    prompts = [prompt_of(record, f"line {number} of {str(path)!r}", as_is=as_is, field=field) for record, number in records]
    return without_blank(prompts, str(path))


def read_records(path: Path) -> list[tuple[dict[str, Any], int]]:
    """Read a file of JSON lines.

    Args:
        path (`pathlib.Path`): the file.

    Returns:
        `list[tuple]`: the objects with the numbers of their lines, from 1; blank lines are passed over.

    Raises:
        ValueError: if a line is no object, or the file no UTF-8.
    """
    return [(_record_of(line, number, path), number) for number, line in enumerate(_lines_of(path), 1) if line.strip()]


def _lines_of(path: Path) -> list[str]:
    try:
        # Not every separator that `splitlines` knows ends a line of JSON.
        return path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"`prompts` must be a text file in UTF-8, got {str(path)!r}: {error}.") from error


def without_blank(prompts: Sequence[Prompt], source: str) -> list[Prompt]:
    """Leave blank prompts out.

    Args:
        prompts (`Sequence`): texts and chats.
        source (`str`): where they come from, for the message.

    Returns:
        `list`: the others.

    Raises:
        ValueError: if there are none.
    """
    kept = [prompt for prompt in prompts if (prompt.strip() if isinstance(prompt, str) else prompt)]
    if not kept:
        raise ValueError(f"`prompts` must hold at least one prompt, got none in {source!r}.")
    return kept


def prompt_of(record: dict[str, Any], place: str, *, as_is: bool = False, field: str | None = None) -> Prompt:
    """Take the prompt out of a record.

    Args:
        record (`dict`): a "prompt" or "text" field, or "messages", the first that is there.
        place (`str`): where the record stands, for the message.
        as_is (`bool`): whether the whole document is wanted, not only what the target is to continue: then a "prompt" field is
            passed over, and a chat keeps its last answer, which is left out otherwise, for the target to give its own.
        field (`str`, *optional*): the one field to read, a text or a chat, in place of these.

    Returns:
        `str` or `list[dict]`: the prompt.

    Raises:
        ValueError: if there is none.
    """
    names = (field,) if field is not None else ("text",) if as_is else ("prompt", "text")
    for name in names:
        text = record.get(name)
        if isinstance(text, str):
            return text
    messages = record.get("messages" if field is None else field)
    if not isinstance(messages, list) or not all(_is_message(message) for message in messages):
        raise ValueError(
            f"`prompts` must have a {' or '.join(map(repr, names))} field, or 'messages' with a 'role' and a 'content' each, "
            f"got {str(record)[:60]} in {place}."
        )
    messages = [{"role": message["role"], "content": message["content"]} for message in messages]
    return messages if as_is else up_to_the_answer(messages)


def up_to_the_answer(messages: list[dict[str, str]]) -> list[dict[str, str]]:
    """Return a chat without its last answer."""
    return messages[:-1] if messages and messages[-1]["role"] == "assistant" else messages


def as_chat(prompt: Prompt) -> Prompt:
    """Return a text as a chat of one message; a chat stays what it is."""
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt


def as_turns(prompts: Sequence[Prompt], tokenizer: Any, *, raw: bool = False) -> list[Prompt]:
    """Return texts as users' turns if the tokenizer has a chat template: what follows is then an answer, not a continuation.

    Args:
        prompts (`Sequence`): texts and chats.
        tokenizer (`PreTrainedTokenizerBase`): the target's.
        raw (`bool`): leave texts as they are.

    Returns:
        `list`: the prompts in their order.
    """
    return list(prompts) if raw or tokenizer.chat_template is None else [as_chat(prompt) for prompt in prompts]


def encode(tokenizer: Any, prompt: Prompt) -> list[int]:
    """Return a prompt's token ids: a text as it is, a chat by the tokenizer's template up to where the answer begins.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): the target's.
        prompt (`str` or `list[dict]`): the prompt.

    Returns:
        `list[int]`: ids.

    Raises:
        ValueError: for a chat if the tokenizer has no template.
    """
    if isinstance(prompt, str):
        return list(tokenizer(prompt)["input_ids"])
    return _encode_chat(tokenizer, prompt, add_generation_prompt=True)


def encode_document(tokenizer: Any, document: Prompt) -> tuple[list[int], list[bool]]:
    """Return a whole document's token ids: a text and the end-of-text token, a chat as the tokenizer's template writes it.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): the target's.
        document (`str` or `list[dict]`): the document.

    Returns:
        `tuple`: ids (`list[int]`), and which of them the target would write (`list[bool]`): all of a text; of a chat the
            assistant's turns, each with the end-of-text token behind it.

    Raises:
        ValueError: for a chat if the tokenizer has no template.
    """
    if isinstance(document, str):
        end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        ids = [*tokenizer(document)["input_ids"], *end]
        return ids, [True] * len(ids)
    ids = _encode_chat(tokenizer, document, add_generation_prompt=False)
    is_answer = [False] * len(ids)
    for number, message in enumerate(document):
        if message["role"] == "assistant":
            first, last = _turn(tokenizer, document, number, ids)
            is_answer[first:last] = [True] * (last - first)
    return ids, is_answer


def _turn(tokenizer: Any, chat: list[dict[str, str]], number: int, ids: list[int]) -> tuple[int, int]:
    """Return where a message of the assistant begins in a chat's ids, as the target would begin it, and where it ends.

    Templates differ in what they write before an answer and in what they make of earlier ones, so it is told by what the chat
    has in common with the prompt for this message, and with the chat up to its end.
    """
    start = _num_common(ids, _encode_chat(tokenizer, chat[:number], add_generation_prompt=True))
    end = _num_common(ids, _encode_chat(tokenizer, chat[: number + 1], add_generation_prompt=False))
    if tokenizer.eos_token_id in ids[start:end]:
        # What a template writes behind it, a newline for one, is not the target's.
        end = ids.index(tokenizer.eos_token_id, start) + 1
    return start, max(start, end)


def _num_common(first: list[int], second: list[int]) -> int:
    """Return how many ids two lists have in common from their beginning on."""
    pairs = zip(first, second, strict=False)
    return next((i for i, (one, other) in enumerate(pairs) if one != other), min(len(first), len(second)))


def _encode_chat(tokenizer: Any, chat: list[dict[str, str]], *, add_generation_prompt: bool) -> list[int]:
    if tokenizer.chat_template is None:
        raise ValueError(
            "`prompts` must be texts for a tokenizer without a chat template, got chats. Give texts, or set "
            "`tokenizer.chat_template` and save the tokenizer with the target."
        )
    settings = {"add_generation_prompt": add_generation_prompt, "return_dict": True}
    return list(tokenizer.apply_chat_template(chat, **settings)["input_ids"])


def _record_of(line: str, number: int, path: Path) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):  # numbers of thousands of digits, and brackets within brackets, are no JSON errors
        record = None
    if not isinstance(record, dict):
        raise ValueError(f"`prompts` must be one JSON object a line, got {line[:40]!r} in line {number} of {str(path)!r}.")
    return record


def _is_message(message: Any) -> bool:
    return isinstance(message, dict) and isinstance(message.get("role"), str) and isinstance(message.get("content"), str)

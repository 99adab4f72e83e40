"""A text or a chat as the model gets it: token ids, and what each of them stands for."""

import json
from pathlib import Path
from typing import NamedTuple

from sglang_metasoft.config import shown


class InspectedPrompt(NamedTuple):
    """A prompt as the model gets it."""

    ids: list[int]
    texts: list[str]  # what each token stands for


def read_prompt(path: Path | None, question: str | None, tokenizer) -> InspectedPrompt:
    """Read a text or a chat and render it with the model's chat template, if it has one.

    Args:
        path: text, or with the suffix ``.json`` a chat: ``[{"role": ..., "content": ...}]``, or an object with that
            list as ``messages``. None: the demo's document.
        question: follows a text in the same message; follows a chat as a message of its own.

    Raises:
        ValueError: the file is missing, empty, not UTF-8, or no chat.
    """
    if path is None:
        from sglang_metasoft.data import DOCUMENT
        from sglang_metasoft.demo.questions import SHIPPED

        path, question = DOCUMENT, question or SHIPPED[0].text
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"prompt file {shown(str(path))} cannot be read: {error}") from None
    if not text.strip():
        raise ValueError(f"prompt file {shown(str(path))} is empty; allowed: a text or a chat")
    if path.suffix == ".json":
        messages = _read_chat(text, path) + ([{"role": "user", "content": question}] if question else [])
    else:
        messages = [{"role": "user", "content": f"{text}\n\n{question}" if question else text}]
    if tokenizer.chat_template:
        try:
            rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # a template is a program of the model's; it may refuse in any way
            raise ValueError(f"the model's chat template refuses this chat: {error}") from None
        return _tokenize(rendered, tokenizer, special=False)
    return _tokenize("\n\n".join(message["content"] for message in messages), tokenizer, special=True)


def _read_chat(text: str, path: Path) -> list[dict]:
    form = '[{"role": "user", "content": "..."}], or {"messages": [...]}'
    try:
        chat = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"prompt file {shown(str(path))} is not JSON ({error}); allowed: {form}") from None
    messages = chat.get("messages") if isinstance(chat, dict) else chat
    if not isinstance(messages, list) or not messages or not all(map(_is_message, messages)):
        raise ValueError(f"prompt file {shown(str(path))} holds {shown(chat)}; allowed: {form}")
    return [{"role": message["role"], "content": message["content"]} for message in messages]


def _is_message(value: object) -> bool:
    return isinstance(value, dict) and all(isinstance(value.get(name), str) for name in ("role", "content"))


def _tokenize(text: str, tokenizer, special: bool) -> InspectedPrompt:
    if not tokenizer.is_fast:
        ids = tokenizer(text, add_special_tokens=special)["input_ids"]
        return InspectedPrompt(ids, [tokenizer.decode([token]) for token in ids])
    out = tokenizer(text, add_special_tokens=special, return_offsets_mapping=True)
    texts, end = [], 0
    for token, (start, stop) in zip(out["input_ids"], out["offset_mapping"], strict=True):
        if start == stop:
            texts.append(tokenizer.convert_ids_to_tokens(token))  # added by the tokenizer: not in the text
        else:
            texts.append(text[max(start, end) : stop] or "·")  # a character of several tokens is shown once
            end = max(end, stop)
    return InspectedPrompt(out["input_ids"], texts)

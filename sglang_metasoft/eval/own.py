"""A user's own prompts and chats, from a file with one JSON object a line."""

import hashlib
import json
from pathlib import Path
from typing import NamedTuple

from sglang_metasoft.config import shown
from sglang_metasoft.eval.case import Case, Turn, render
from sglang_metasoft.eval.metrics import FIDELITY
from sglang_metasoft.eval.tasks.natural import ANSWER_TOKENS

SUFFIX = ".jsonl"
OWN = "own"  # split and kind of these cases
KEYS = ("messages", "prompt", "answer", "id")
ROLES = ("system", "developer", "user", "assistant", "tool")
ALLOWED = (
    'allowed: {"messages": [{"role": ..., "content": ...}, ...]} that ends with the user, or {"prompt": "..."}; '
    'besides, "answer": "..." and "id": "..."'
)
MORE_TOKENS = 8  # an answer may be that much longer than its reference before it is cut


class OwnPrompt(NamedTuple):
    """One line of the file."""

    place: str  # file and line, for messages
    messages: tuple[dict, ...]
    prompt: str
    answer: str | None
    name: str


def read_own(path: Path) -> list[OwnPrompt]:
    """The prompts of a file; empty lines are passed over.

    Raises:
        ValueError: not there, empty, or a line that is none; the message has file, line and what is allowed.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--tasks: {shown(str(path))} cannot be read: {error}") from None
    found: list[OwnPrompt] = []
    names: dict[str, str] = {}
    for number, line in enumerate(lines, 1):
        if line.strip():
            prompt = _parse(line, f"--tasks: {path}: line {number}")
            if prompt.name in names:
                raise ValueError(f'{prompt.place}: "id" {shown(prompt.name)} is that of {names[prompt.name]} too')
            names[prompt.name] = f"line {number}"
            found.append(prompt)
    if not found:
        raise ValueError(f"--tasks: {path} has no prompt; {ALLOWED}, one a line")
    return found


def _parse(line: str, place: str) -> OwnPrompt:
    def refuse(what: str) -> ValueError:
        return ValueError(f"{place}: {what}; {ALLOWED}")

    try:
        row = json.loads(line)
    except ValueError as error:
        raise refuse(f"not JSON ({error})") from None
    if not isinstance(row, dict):
        raise refuse(f"{shown(row)} is no object")
    if unknown := [key for key in row if key not in KEYS]:
        raise refuse(f"key {shown(unknown[0])} is unknown")
    if ("messages" in row) == ("prompt" in row):
        raise refuse('either "messages" or "prompt" must be there')
    for key in ("prompt", "answer"):
        if key in row and (not isinstance(row[key], str) or not row[key].strip()):
            raise refuse(f'"{key}" is {shown(row[key])}, no text')
    name = row.get("id", hashlib.sha256(line.strip().encode()).hexdigest()[:12])
    if not isinstance(name, str | int) or isinstance(name, bool) or name == "":
        raise refuse(f'"id" is {shown(name)}, neither text nor a whole number')
    messages = _messages(row["messages"], refuse) if "messages" in row else ()
    return OwnPrompt(place, messages, row.get("prompt", ""), row.get("answer"), str(name))


def _messages(listed, refuse) -> tuple[dict, ...]:
    if not isinstance(listed, list) or not listed:
        raise refuse(f'"messages" is {shown(listed)}, no list of messages')
    found = []
    for message in listed:
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            raise refuse(f"message {shown(message)} has no role of {', '.join(ROLES)}")
        content = message.get("content")
        if isinstance(content, list) and all(isinstance(p, dict) and isinstance(p.get("text"), str) for p in content):
            content = "".join(part["text"] for part in content)
        if not isinstance(content, str):
            raise refuse(f"message {shown(message)} has no text as content")
        found.append(message | {"content": content})
    if found[-1]["role"] != "user" or not found[-1]["content"].strip():
        raise refuse("the last message is no question of the user")
    return tuple(found)


def own_cases(path: Path, prompts: list[OwnPrompt], tokenizer) -> list[Case]:
    """A case for each prompt, in order.

    Its index is made of its content, so that a result file goes on rightly when lines were moved, added or changed.

    Raises:
        ValueError: the model's chat template does not take a line's messages.
    """
    cases = []
    for prompt in prompts:
        content = json.dumps([prompt.messages, prompt.prompt, prompt.answer, prompt.name])
        index = int(hashlib.sha256(content.encode()).hexdigest()[:12], 16)
        room = len(tokenizer(prompt.answer, add_special_tokens=False)["input_ids"]) if prompt.answer else 0
        case = Case(
            f"{OWN}/{path.stem}", OWN, index, 0, 0, "",
            (Turn(prompt.prompt, (prompt.answer,) if prompt.answer else ()),), FIDELITY,
            max(ANSWER_TOKENS, room + MORE_TOKENS if room else 0), messages=prompt.messages,
            details={"kind": OWN, "split": OWN, "document": f"{path.stem}/{prompt.name}"},
        )  # fmt: skip
        try:
            render(case, 0, tokenizer)
        except Exception as error:  # jinja2 and the templates have their own types
            raise ValueError(f"{prompt.place}: the model's chat template does not take it: {error}") from None
        cases.append(case)
    return cases

"""Cases: a prefix that is to be compressed, and what is asked about it."""

import random
from collections.abc import Callable, Sequence
from typing import NamedTuple

PREAMBLE = "\n\n"
RESPONSE = "\x00"  # in a question: what follows it is the start of the answer, given with the question
REPEAT = "Repeat the text above word for word."


class Task(NamedTuple):
    """A document and what is asked about it, as text; an answer of None is left to the model."""

    family: str
    document: str
    questions: Sequence[tuple[str, str | None]]


class Case(NamedTuple):
    """A :class:`Task` in tokens."""

    family: str
    prefix: list[int]
    questions: list[list[int]]  # each follows the prefix directly
    answers: list[list[int] | None]
    repeat_request: list[int]  # empty, or what asks for the prefix once more
    repeat_from: int  # where the repeated part of the prefix begins


def to_case(tokenizer, task: Task, *, chat: bool, repeat: bool) -> Case:
    """Put a task into the model's chat template, or into plain text.

    Prefix and questions are tokenised apart, as a server sees a shared document and what follows it.
    """
    before, after = _template(tokenizer) if chat else ("", "\n")

    def ids(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    head = ids(before)
    asked = [question.partition(RESPONSE) for question, _ in task.questions]
    questions = [ids(PREAMBLE + question + after + start) for question, _, start in asked]
    answers = [None if answer is None else ids(answer) for _, answer in task.questions]
    request = ids(PREAMBLE + REPEAT + after) if repeat else []
    return Case(task.family, head + ids(task.document), questions, answers, request, len(head))


def continuation_case(family: str, text_ids: list[int], tail: int, answer: int) -> Case:
    """Plain text whose continuation is the answer; its last tokens take the question's place."""
    end = len(text_ids) - answer
    return Case(family, text_ids[: end - tail], [text_ids[end - tail : end]], [text_ids[end:]], [], 0)


def _template(tokenizer) -> tuple[str, str]:
    """What the chat template puts before and after the user's text."""
    if not tokenizer.chat_template:
        return "", "\n"
    marker = "\x00user text\x00"
    whole = tokenizer.apply_chat_template(
        [{"role": "user", "content": marker}], tokenize=False, add_generation_prompt=True
    )
    before, _, after = whole.partition(marker)
    return before, after


Generator = Callable[[random.Random, str], Task]  # (randomness, haystack) -> task

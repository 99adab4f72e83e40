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


def to_case(tokenizer, task: Task, *, chat: bool, repeat: bool, earlier: tuple[str, str] | None = None) -> Case:
    """Put a task into the model's chat template, or into plain text.

    Prefix and questions are tokenised apart, as a server sees a shared document and what follows it.

    Args:
        chat: in the model's template.
        repeat: the prefix is also asked for word for word.
        earlier: a question and its answer that come between the document and the questions.
    """
    before, after, following = chat_template(tokenizer) if chat else ("", "\n", "\n\n")

    def ids(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    head = ids(before)
    asked = [question.partition(RESPONSE) for question, _ in task.questions]
    opening = PREAMBLE
    body = ids(task.document)
    if earlier is not None:
        body += ids(PREAMBLE + earlier[0] + after) + ids(earlier[1] + following)
        opening = ""
    questions = [ids(opening + question + after + start) for question, _, start in asked]
    answers = [None if answer is None else ids(answer) for _, answer in task.questions]
    request = ids(PREAMBLE + REPEAT + after) if repeat else []
    return Case(task.family, head + body, questions, answers, request, len(head))


def continuation_case(family: str, text_ids: list[int], tail: int, answer: int) -> Case:
    """Plain text whose continuation is the answer; its last tokens take the question's place."""
    end = len(text_ids) - answer
    return Case(family, text_ids[: end - tail], [text_ids[end - tail : end]], [text_ids[end:]], [], 0)


def chat_template(tokenizer) -> tuple[str, str, str]:
    """What the chat template puts before and after the user's text, and between an answer and the next question."""
    if not tokenizer.chat_template:
        return "", "\n", "\n\n"
    marker = "\x00user text\x00"
    user, answer = {"role": "user", "content": marker}, {"role": "assistant", "content": marker}
    whole = tokenizer.apply_chat_template([user], tokenize=False, add_generation_prompt=True)
    before, _, after = whole.partition(marker)
    try:
        turns = tokenizer.apply_chat_template([user, answer, user], tokenize=False, add_generation_prompt=True)
        following = turns.split(marker)[2]
    except Exception:  # templates raise what they like where they do not take two turns
        following = "\n\n"
    return before, after, following


Generator = Callable[[random.Random, str], Task]  # (randomness, haystack) -> task

"""The demo: the same questions about a long document, with the full cache and with the compressed one."""

import time
from collections.abc import Iterator
from typing import NamedTuple

from sglang_metasoft.demo.questions import (
    DOCUMENT,
    MAX_ANSWER_TOKENS,
    Question,
    Task,
    document_message,
    question_message,
)
from sglang_metasoft.local_server import Server

__all__ = ["DOCUMENT", "Answer", "ask", "converse"]
CACHES = ("full", "compressed")


class Answer(NamedTuple):
    """What came back for one question."""

    text: str
    prompt_tokens: int
    entries: int  # that the prompt holds, per layer and KV head
    cached_tokens: int  # prompt tokens that were not computed again
    reused_tokens: int  # of them, from a compressed prefix
    seconds: float
    bypass: str | None  # why the prompt is not compressed


def ask(server: Server, messages: list[dict], cache: str, boundary_tokens: int) -> Answer:
    """One request.

    Args:
        cache: ``full``: ratio 1, which switches compression off; or ``compressed``. Each has a ``cache_salt`` of its
            own, so that neither finds what the other left in the radix tree.
        boundary_tokens: tokens that the prompts of all questions have in common.

    Raises:
        requests.HTTPError: the server refused it.
    """
    params = {"metasoft_ratio": 1} if cache == "full" else {"metasoft_boundary": boundary_tokens}
    begin = time.monotonic()
    response = server.chat(
        messages, MAX_ANSWER_TOKENS, custom_params=params, cache_salt=f"demo-{cache}", return_meta_info=True
    )  # fmt: skip
    seconds = time.monotonic() - begin
    (choice,) = response["choices"]
    meta, prompt_tokens = choice["meta_info"], response["usage"]["prompt_tokens"]
    return Answer(
        text=" ".join(choice["message"]["content"].split()),
        prompt_tokens=prompt_tokens,
        entries=meta["metasoft_kv_tokens"],
        cached_tokens=meta["cached_tokens"],
        reused_tokens=meta["metasoft_reused_tokens"],
        seconds=seconds,
        bypass=meta.get("metasoft_bypass"),
    )


def converse(server: Server, task: Task, boundary_tokens: int) -> Iterator[tuple[Question, dict[str, Answer]]]:
    """Ask all questions of both caches; yields each question with its answer by cache."""
    head = document_message(task.document)
    chats: dict[str, list[dict]] = {}
    for question in task.questions:
        answers = {}
        for cache in CACHES:
            before = chats[cache] if question.is_next_turn else [head]
            messages = [*before, question_message(question.text)]
            answers[cache] = ask(server, messages, cache, boundary_tokens)
            chats[cache] = [*messages, {"role": "assistant", "content": answers[cache].text}]
        yield question, answers

"""What the demo asks: the shipped questions, or the user's own; checked before anything starts."""

import os
from pathlib import Path
from typing import NamedTuple

from sglang_metasoft.data import DOCUMENT

MAX_ANSWER_TOKENS = 40
INSTRUCTION = "Answer questions about this document. Give short answers, in the words of the document."


class Question(NamedTuple):
    """One question."""

    text: str
    right: str | None = None  # a right answer holds these words; None: not known
    is_next_turn: bool = False  # of the chat that the question before it belongs to; else over the document alone


# Chosen by running: right with the full cache and with the compressed one. `benchmarks/demo_questions.py` has all that
# were tried; docs/index.md says how many each cache answered.
SHIPPED = (
    Question("What does the speaker ask Congress to explore the means for?", "economic bill of rights"),
    Question(
        "Which grave dangers did one of the great American industrialists emphasize?",
        "rightist reaction",
        is_next_turn=True,
    ),
    Question("Who said that we must all hang together?", "Benjamin Franklin"),
)


class Task(NamedTuple):
    """A document and what is asked about it."""

    name: str  # of the document
    document: str
    questions: tuple[Question, ...]

    @property
    def is_shipped(self) -> bool:
        return self.questions == SHIPPED


def read_task(document: Path | None, asked: list[str], is_chat: bool) -> Task:
    """The task that the arguments describe.

    Args:
        document: None is the shipped one.
        asked: the user's questions.
        is_chat: each question is the next turn of one chat.

    Raises:
        ValueError: a document without questions, an empty question, or a file that is missing, not UTF-8 or empty.
    """
    if document is None and not asked:
        if is_chat:
            raise ValueError("--chat is for your own questions; allowed: --chat with one --ask QUESTION or more")
        return Task("State of the Union 1944", DOCUMENT.read_text(encoding="utf-8"), SHIPPED)
    if not asked:
        raise ValueError(f"--document {document} has no question; allowed: one --ask QUESTION or more beside it")
    for number, question in enumerate(asked, 1):
        if not question.strip():
            raise ValueError(f"--ask {question!r} (question {number}) is empty; allowed: a question in words")
    questions = tuple(Question(text, is_next_turn=is_chat and number > 0) for number, text in enumerate(asked))
    path = document or DOCUMENT
    return Task(path.name, _read(path), questions)


def _read(path: Path) -> str:
    allowed = "allowed: a text file in UTF-8"
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"--document {path} is not text in UTF-8 (byte {error.start}); {allowed}") from None
    except OSError as error:
        raise ValueError(f"--document {path} cannot be read: {error.strerror}; {allowed}") from None
    if not text.strip():
        raise ValueError(f"--document {path} is empty; {allowed}, with some words in it")
    return text.strip()


def document_message(document: str) -> dict:
    """The system message that all questions about a document have in common."""
    return {"role": "system", "content": f"{INSTRUCTION}\n\n{document}"}


def question_message(question: str) -> dict:
    return {"role": "user", "content": f"Question: {question}\nAnswer in a few words."}


def check_length(task: Task, tokenizer, context_tokens: int) -> int:
    """Tokens that the prompts of all questions about the document have in common: the boundary for compression.

    Args:
        tokenizer: the model's, with a chat template.
        context_tokens: the model's longest prompt and answer.

    Raises:
        ValueError: document, the longest chat and its answers do not fit the context.
    """
    head = [document_message(task.document)]
    chat, longest_tokens = list(head), 0
    for question in task.questions:
        chat = [*(chat if question.is_next_turn else head), question_message(question.text)]
        turns = sum(message["role"] == "user" for message in chat)
        longest_tokens = max(longest_tokens, len(_token_ids(tokenizer, chat)) + turns * MAX_ANSWER_TOKENS)
    if longest_tokens >= context_tokens:
        raise ValueError(
            f"document {task.name} with its questions and answers is {longest_tokens:,} tokens long; "
            f"allowed: fewer than {context_tokens:,}, the model's context"
        )
    one, other = (_token_ids(tokenizer, [*head, question_message(text)]) for text in ("Who?", "What?"))
    return len(os.path.commonprefix([one, other]))


def _token_ids(tokenizer, messages: list[dict]) -> list[int]:
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return tokenizer(text, add_special_tokens=False)["input_ids"]

"""One case of a benchmark, and the token ids that every runner sends for it."""

import dataclasses
import random
from collections.abc import Callable
from typing import NamedTuple

from sglang_metasoft.eval.data import Sources
from sglang_metasoft.eval.metrics import FIDELITY

MARK = "\u241f"
MODES = ("inside", "repeat", "after")


class Turn(NamedTuple):
    """One question about the document."""

    question: str
    answers: tuple[str, ...]
    answer_prefix: str = ""


@dataclasses.dataclass(frozen=True)
class Case:
    """A document and what is asked about it.

    The prompt of a turn is the document, earlier turns with their true answers, and the turn's own question. Document,
    questions and what follows them are tokenised apart, so that all modes and runners see the same ids.
    """

    task: str
    family: str
    index: int
    seed: int
    length_tokens: int  # prompt and answer together, as RULER counts
    document: str
    turns: tuple[Turn, ...]
    metric: str  # a name in metrics.METRICS
    max_new_tokens: int
    stop: tuple[str, ...] = ()
    is_chat: bool = True  # rendered with the model's chat template
    details: dict = dataclasses.field(default_factory=dict)
    messages: tuple[dict, ...] = ()  # a user's own chat in place of document and question; the only turn's prompt


class Rendered(NamedTuple):
    """A turn's prompt."""

    ids: list[int]
    boundary_tokens: int  # length of the document, template head included; 0: the prompt names none
    question_end_tokens: int  # where the last question ends; at least one token follows
    text: str


@dataclasses.dataclass(frozen=True)
class Request:
    """What a task's builder gets."""

    rng: random.Random
    size: int  # how much haystack to put in; at least 1
    length_tokens: int
    index: int
    sources: Sources
    seed: int = 1


class Draft(NamedTuple):
    """What a task's builder makes."""

    document: str
    turns: tuple[Turn, ...]
    details: dict = {}


class Task(NamedTuple):
    """A benchmark task."""

    name: str
    family: str
    metric: str
    max_new_tokens: int
    build: Callable[..., Draft]  # of a Request; RULER's also of a wording
    stop: tuple[str, ...] = ()
    is_chat: bool = True
    max_size: int = 1 << 20


def template_parts(tokenizer) -> tuple[str, str, str]:
    """Text before a first user message, between a user message and its answer, and before the next user message."""
    user, answer = {"role": "user", "content": MARK}, {"role": "assistant", "content": MARK}
    options = {"tokenize": False, "add_generation_prompt": True}
    head, tail = tokenizer.apply_chat_template([user], **options).split(MARK)
    _, middle, following, _ = tokenizer.apply_chat_template([user, answer, user], **options).split(MARK)
    return head, tail if tail.startswith(middle) else middle, following


def render(case: Case, turn: int, tokenizer) -> Rendered:
    """The token ids of a turn's prompt and where its document ends.

    An earlier turn stands there with its first answer; where the full cache answers (metric ``fidelity``), with that
    answer, which the runner has to put in (:func:`answered`).
    """
    if case.messages:
        return _render_messages(case.messages, tokenizer)
    if not case.document:
        return _render_text(case.turns[turn].question, tokenizer)
    head, tail, following = template_parts(tokenizer) if case.is_chat else ("", "", "")
    before = head + case.document
    asked = ""
    for earlier in case.turns[:turn]:
        answer = earlier.answers[0] if earlier.answers else ""
        space = "" if case.metric == FIDELITY else " "
        asked += earlier.question + tail + earlier.answer_prefix + space + answer + following
    asked += case.turns[turn].question
    after = tail + case.turns[turn].answer_prefix
    first, question, rest = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (before, asked, after))
    ids = first + question + rest
    return Rendered(ids, len(first), len(ids) - max(len(rest), 1), before + asked + after)


def _render_messages(messages: tuple[dict, ...], tokenizer) -> Rendered:
    """A chat: what stands before its last message, if that is not the first, is its document."""
    options = {"tokenize": False, "add_generation_prompt": True}
    *earlier, last = messages
    before, after = tokenizer.apply_chat_template([*earlier, last | {"content": MARK}], **options).split(MARK)
    parts = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in (before, last["content"], after)]
    ids: list[int] = parts[0] + parts[1] + parts[2]
    boundary = len(parts[0]) if earlier else 0
    return Rendered(ids, boundary, len(ids) - max(len(parts[2]), 1), before + last["content"] + after)


def _render_text(text: str, tokenizer) -> Rendered:
    """A prompt as it is, with the special tokens that the model wants at its beginning."""
    ids = tokenizer(text)["input_ids"]
    return Rendered(ids, 0, len(ids) - 1, text)


def answered(case: Case, turn: int, text: str) -> Case:
    """The case, with what a turn was answered, for later turns to stand on."""
    turns = list(case.turns)
    turns[turn] = turns[turn]._replace(answers=(text,))
    return dataclasses.replace(case, turns=tuple(turns))


def make_case(task: Task, tokenizer, sources, length_tokens: int, seed: int, index: int) -> Case:
    """The largest case of a task whose prompt and answer fit ``length_tokens``; the same for the same arguments.

    Raises:
        ValueError: not even the smallest case fits; the message says how many tokens that takes.
    """

    def build(size: int) -> tuple[Case, int]:
        rng = random.Random(f"{task.name}/{seed}/{index}/{length_tokens}")
        draft = task.build(Request(rng, size, length_tokens, index, sources, seed))
        case = Case(
            task.name, task.family, index, seed, length_tokens, draft.document, draft.turns,
            task.metric, task.max_new_tokens, task.stop, task.is_chat, draft.details,
        )  # fmt: skip
        answers = len(case.turns) if task.metric == FIDELITY else 1  # the earlier ones are not known yet
        used = len(render(case, len(case.turns) - 1, tokenizer).ids) + answers * task.max_new_tokens
        return case, used

    best, used = build(1)
    if used > length_tokens:
        raise ValueError(f"task {task.name!r} needs {used} tokens; length_tokens={length_tokens} is too short")
    low, high = 1, 2
    while high <= task.max_size and (found := build(high))[1] <= length_tokens:
        best, low, high = found[0], high, 2 * high
    high = min(high, task.max_size + 1)
    while high - low > 1:
        middle = (low + high) // 2
        case, used = build(middle)
        if used <= length_tokens:
            best, low = case, middle
        else:
            high = middle
    return best

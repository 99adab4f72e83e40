"""Needle tasks of RULER (arXiv 2404.06654), and the depth x length grid made of the same needle.

As in the benchmark's ``niah.py``, with two differences: the essays are Jane Austen's novels, entered at a random word,
and sentences are split by punctuation instead of NLTK's model.
"""

import re
import uuid
from functools import partial
from random import Random
from typing import Any, NamedTuple

from sglang_metasoft.eval.case import Draft, Request, Task, Turn


class Wording(NamedTuple):
    """The fixed text of a needle task: ``(for one answer, for several)`` where they differ."""

    needle: str
    head: tuple[str, str]
    question: tuple[str, str]
    prefix: tuple[str, str]
    noise: str
    kinds: dict[str, tuple[str, str]]  # by the kind of value


NEEDLE = "One of the special magic {type} for {key} is: {value}."
NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
RULERS = Wording(
    needle=NEEDLE,
    head=(
        "A special magic {type} is hidden within the following text. Make sure to memorize it. "
        "I will quiz you about the {type} afterwards.\n",
        "Some special magic {type} are hidden within the following text. Make sure to memorize it. "
        "I will quiz you about the {type} afterwards.\n",
    ),
    question=(
        "\nWhat is the special magic {type} for {query} mentioned in the provided text?",
        "\nWhat are all the special magic {type} for {query} mentioned in the provided text?",
    ),
    prefix=(
        " The special magic {type} for {query} mentioned in the provided text is",
        " The special magic {type} for {query} mentioned in the provided text are",
    ),
    noise=NOISE,
    kinds={"numbers": ("number", "numbers"), "uuids": ("uuid", "uuids")},
)
DEPTHS = [round(n * 100 / 39) for n in range(40)]
GRID_DEPTHS = tuple(range(0, 101, 10))
SENTENCE_END = re.compile(r"(?<=[.!?])\s+")


def draw(rng: Random, kind: str, sources) -> str:
    """A random key or value: seven-digit number, adjective-noun or UUID."""
    if kind == "numbers":
        return str(rng.randint(10**6, 10**7 - 1))
    if kind == "uuids":
        return str(uuid.UUID(int=rng.getrandbits(128), version=4))
    nouns, adjectives, _ = sources.word_lists()
    return f"{rng.choice(adjectives)}-{rng.choice(nouns)}"


def essay_sentences(rng: Random, words: list[str], count: int) -> list[str]:
    """Sentences of ``count`` words from a random place of a book, from its start on when it ends."""
    start = rng.randrange(len(words))
    taken = [words[(start + n) % len(words)] for n in range(count)]
    return SENTENCE_END.split(" ".join(taken))


def insert_at_depths(sentences: list[str], needles: list[str], depths: list[int]) -> str:
    """The text with one needle at each depth, in per cent of its sentences."""
    places = [0, *(int(len(sentences) * depth / 100) for depth in sorted(depths)), len(sentences)]
    parts = []
    for number, (start, end) in enumerate(zip(places, places[1:], strict=False)):
        parts.append(" ".join(sentences[start:end]))
        parts += needles[number : number + 1]
    return " ".join(part for part in parts if part)


def build(
    request: Request, *, haystack: str, key_type="words", value_type="numbers", keys=1, values=1, queries=1, depth=None,
    wording: Wording = RULERS,
) -> Draft:  # fmt: skip
    """A needle case; ``depth`` (per cent) places the only needle, else places are random."""
    rng, sources = request.rng, request.sources
    names = [draw(rng, key_type, sources) for _ in range(max(keys, queries))]
    facts = {name: [draw(rng, value_type, sources) for _ in range(values)] for name in names}
    kinds = wording.kinds[value_type]

    def needle(key: str, value: str) -> str:
        return wording.needle.format(type=kinds[1], key=key, value=value)

    needles = [needle(key, value) for key, all_ in facts.items() for value in all_]
    rng.shuffle(needles)
    if haystack == "essay":
        depths = rng.sample(DEPTHS, len(needles)) if depth is None else [depth]
        sentences = essay_sentences(rng, sources.words("austen.txt"), 20 * request.size)
        context = insert_at_depths(sentences, needles, depths)
    else:
        lines = [wording.noise] * (request.size + len(needles))
        if haystack == "needle":
            lines = [needle(draw(rng, key_type, sources), draw(rng, value_type, sources)) for _ in lines]
        for place, line in zip(sorted(rng.sample(range(len(lines)), len(needles)), reverse=True), needles):  # noqa: B905
            lines.insert(place, line)
        context = "\n".join(lines)
    asked = rng.sample(list(facts), queries)
    query = ", ".join(asked[:-1]) + ", and " + asked[-1] if len(asked) > 1 else asked[0]
    several = int(queries * values > 1)
    kind = kinds[several]
    turn = Turn(
        wording.question[several].format(type=kind, query=query),
        tuple(value for name in asked for value in facts[name]),
        wording.prefix[several].format(type=kind, query=query),
    )
    details = {} if depth is None else {"depth": depth}
    return Draft(wording.head[several].format(type=kind) + context, (turn,), details)


def build_grid(request: Request) -> Draft:
    """The classic test: one needle in a book, its depth given by the case's index."""
    return build(request, haystack="essay", depth=GRID_DEPTHS[request.index % len(GRID_DEPTHS)])


VARIANTS: dict[str, dict[str, Any]] = {
    "niah_single_1": dict(haystack="noise"),
    "niah_single_2": dict(haystack="essay"),
    "niah_single_3": dict(haystack="essay", value_type="uuids"),
    "niah_multikey_1": dict(haystack="essay", keys=4),
    "niah_multikey_2": dict(haystack="needle"),
    "niah_multikey_3": dict(haystack="needle", key_type="uuids", value_type="uuids"),
    "niah_multivalue": dict(haystack="essay", values=4),
    "niah_multiquery": dict(haystack="essay", queries=4),
}
TASKS = [
    Task(name, "needle", "string_match_all", 128, partial(build, **options)) for name, options in VARIANTS.items()
] + [Task("niah_grid", "needle", "string_match_all", 32, build_grid)]

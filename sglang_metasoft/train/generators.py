"""Built-in tasks with an answer that is known: look-ups, copying, gaps; :mod:`sglang_metasoft.train.requests` has those
that the model answers itself. Left out, to be tested unseen: tracing of variables, counting and code completion.

No sentence, question or filler is taken from a benchmark (``tests/train/test_wording.py`` compares).
"""

import json
import random
import re
import uuid

from sglang_metasoft.train.cases import RESPONSE, Task
from sglang_metasoft.train.words import ADJECTIVES, FILLERS, JOBS, NAMES, NOUNS, PLACES

QUESTIONS = 4


def _thing(rng: random.Random) -> str:
    return (
        f"{rng.choice(ADJECTIVES)} {rng.choice(NOUNS)}"
        if rng.random() < 0.5
        else f"{rng.choice(ADJECTIVES)}-{rng.choice(NOUNS)}"
    )


def _value(rng: random.Random, kind: str) -> str:
    if kind == "number":
        digits = rng.choice((3, 4, 5, 6, 7, 7, 7, 8))
        return str(rng.randrange(10 ** (digits - 1), 10**digits))
    if kind == "uuid":
        return str(uuid.UUID(int=rng.getrandbits(128), version=4))
    if kind == "code":
        return "".join(rng.choice("ABCDEFGHJKLMNPQRSTUVWXYZ23456789") for _ in range(rng.choice((5, 6, 8))))
    return f"{rng.choice(ADJECTIVES)}-{rng.choice(NOUNS)}"


KINDS = ("number", "number", "uuid", "word", "code")
# (sentence, question, start of the answer); {k} key, {v} value, {t} kind of value
NEEDLES = (
    ("The secret {t} of the {k} is {v}.", "What is the secret {t} of the {k}?", "The secret {t} of the {k} is"),
    ("Remember this: {k} has the {t} {v}.", "Which {t} does {k} have?", "{k} has the {t}"),
    ("The {t} assigned to {k} is {v}.", "Tell me the {t} that was assigned to {k}.", "The {t} assigned to {k} is"),
    ("To open the {k}, use the {t} {v}.", "Which {t} opens the {k}?", "The {k} opens with the {t}"),
    ("Note: the {k} was registered under {v}.", "Under which {t} was the {k} registered?",
     "The {k} was registered under"),
    ("({k}: {v})", "The text has a note in brackets about {k}. What does it say?", "{k}:"),
    ("{v} is the {t} that belongs to {k}.", "Find the {t} that belongs to {k}.", "The {t} that belongs to {k} is"),
    ("Among the {t}s kept for {k} there is {v}.", "Name the {t} kept for {k}.", "For {k} there is"),
    ("{k}, {t} {v}, was seen again later.", "With which {t} was {k} seen?", "{k} was seen with the {t}"),
    ("A label on the {k} reads {v}.", "What does the label on the {k} read?", "It reads"),
)  # fmt: skip
INTRODUCTIONS = (
    "", "", "Somewhere below are a few notes with {t}s. You will be asked about one or more of them.\n\n",
    "The pages that follow mention a {t} or several. Keep them in mind for a question at the end.\n",
    "Read this document carefully.\n\n", "Context:\n", "Document:\n\n",
)  # fmt: skip
CLOSINGS = ("", "", "", " Answer briefly.", " Give the {t} only.", " Use the text above.")


def needles(rng: random.Random, haystack: str) -> Task:
    """Facts scattered over prose, over a repeated filler, or over nothing but other facts."""
    kind = rng.choice(KINDS)
    named = {"word": rng.choice(("word", "name", "codeword")), "code": "code"}.get(kind, kind)
    sentence, question, start = rng.choice(NEEDLES)
    style = rng.random()
    if style < 0.25:
        haystack = rng.choice(FILLERS) * (len(haystack) // 90)
    keys = list(dict.fromkeys(_thing(rng) for _ in range(QUESTIONS + rng.choice((0, 0, 4, 12)))))
    values = {key: [_value(rng, kind)] for key in keys}
    for key in keys[:QUESTIONS]:
        if rng.random() < 0.2:
            values[key] += [_value(rng, kind) for _ in range(rng.choice((1, 3)))]
    facts = [sentence.format(k=key, v=value, t=named) for key in keys for value in values[key]]
    if style > 0.75:
        while sum(map(len, facts)) < 0.55 * len(haystack):  # digits cost more tokens than words
            facts.append(sentence.format(k=_thing(rng), v=_value(rng, kind), t=named))
        rng.shuffle(facts)
        document = "\n".join(facts)
    else:
        rng.shuffle(facts)
        document = scatter(rng, haystack, facts)
    questions = []
    for key in rng.sample(keys, min(QUESTIONS, len(keys))):
        ask = question.format(k=key, t=named) + rng.choice(CLOSINGS).format(t=named)
        answer = " " + ", ".join(values[key])
        if len(values[key]) > 1:
            ask = f"List every {named} that the text gives for {key}." + rng.choice(CLOSINGS).format(t=named)
            questions.append((ask + RESPONSE + f"The {named}s for {key} are", answer + "."))
        elif rng.random() < 0.6:
            questions.append((ask + RESPONSE + start.format(k=key, t=named), answer + "."))
        else:
            questions.append((ask, (start.format(k=key, t=named) + answer + ".") if rng.random() < 0.5 else answer[1:]))
    return Task("needles", rng.choice(INTRODUCTIONS).format(t=named) + document, questions)


def records(rng: random.Random, haystack: str) -> Task:
    """Rows of a table, as JSON, CSV, list or sentences; one field of one row is asked for."""
    rows, size = [], 0
    names = rng.sample(NAMES, len(NAMES))
    form = rng.choice(("json", "csv", "list", "prose", "pairs"))
    while size < len(haystack) * 0.6 and names:
        row = {
            "name": names.pop(),
            "age": str(rng.randrange(18, 90)),
            "job": rng.choice(JOBS),
            "city": rng.choice(PLACES),
            "id": _value(rng, rng.choice(("number", "code"))),
            "pet": f"{rng.choice(ADJECTIVES)} {rng.choice(NOUNS)}",
        }
        rows.append(row)
        size += 25 + sum(map(len, row.values()))
    if form == "json":
        document = json.dumps(rows, indent=rng.choice((None, 1)))
    elif form == "csv":
        document = ",".join(rows[0]) + "\n" + "\n".join(",".join(row.values()) for row in rows)
    elif form == "list":
        document = "\n".join(f"{n}. " + "; ".join(f"{k}: {v}" for k, v in row.items()) for n, row in enumerate(rows, 1))
    elif form == "prose":
        document = " ".join(
            f"{r['name']} is a {r['job']} of {r['age']} from {r['city']}, "
            f"has the number {r['id']} and keeps a {r['pet']}."
            for r in rows
        )
    else:
        document = "\n".join(f"{r['name']} -> {r['id']}" for r in rows)
    field_of = ("id",) if form == "pairs" else ("age", "job", "city", "id", "pet")
    questions = []
    for row in rng.sample(rows, min(QUESTIONS, len(rows))):
        field = rng.choice(field_of)
        label = rng.choice((f"What is the {field} of {row['name']}?", f"Look up {row['name']}: which {field}?"))
        if rng.random() < 0.5:
            questions.append((label + RESPONSE + f"The {field} of {row['name']} is", f" {row[field]}."))
        else:
            questions.append((label, f"{row[field]}"))
    return Task("records", rng.choice(("", "Here are some records.\n\n", "Data:\n")) + document, questions)


def pairs(rng: random.Random, haystack: str) -> Task:
    """A long JSON object or listing of random keys and values."""
    kind, keys = rng.choice(("uuid", "number", "word", "code")), rng.choice(("uuid", "word", "thing"))
    items, size = {}, 0
    while size < len(haystack) * 0.5:
        key = _thing(rng) if keys == "thing" else _value(rng, keys)
        items[key] = _value(rng, kind)
        size += (len(key) + len(items[key])) * (2 if "uuid" in (kind, keys) else 1) + 8
    if rng.random() < 0.5:
        document = json.dumps(items, indent=rng.choice((None, 0, 2)))
    else:
        document = "\n".join(f"{rng.choice(('', '- '))}{key}: {value}" for key, value in items.items())
    questions = []
    for key in rng.sample(list(items), min(QUESTIONS, len(items))):
        ask = rng.choice((f'What is the value of "{key}"?', f"Which value belongs to {key}?", f"Key: {key}"))
        questions.append((ask + (RESPONSE + f'"{key}":' if rng.random() < 0.4 else ""), f' "{items[key]}"'))
    return Task("pairs", document, questions)


def copying(rng: random.Random, haystack: str) -> Task:
    """Repeat the sentence or passage that begins with some words."""
    sentences = [s for s in sentences_of(haystack) if 60 < len(s) < 400]
    questions = []
    for sentence in rng.sample(sentences, min(QUESTIONS, len(sentences))):
        words = sentence.split()
        start = " ".join(words[: rng.choice((3, 4, 6))])
        ask = rng.choice(
            (
                f'Repeat the sentence that starts with "{start}".',
                f'Quote the passage beginning "{start}" exactly.',
                f'Continue word for word from the text: "{start}',
            )
        )
        questions.append((ask + RESPONSE + start, sentence[len(start) :] or " ."))
    return Task("copying", haystack, questions or [("Repeat the beginning of the text.", haystack[:200])])


def gaps(rng: random.Random, haystack: str) -> Task:
    """Fill the blank in a sentence of the text."""
    sentences = [s for s in sentences_of(haystack) if 60 < len(s) < 250]
    questions = []
    for sentence in rng.sample(sentences, min(QUESTIONS, len(sentences))):
        words = sentence.split()
        places = [n for n, word in enumerate(words) if n > 2 and len(word) > 4] or [len(words) - 1]
        at = rng.choice(places)
        width = rng.choice((1, 1, 2, 3))
        hidden = " ".join(words[at : at + width])
        blank = " ".join(words[:at] + ["____"] + words[at + width :])
        questions.append((f"Fill in the blank with the words of the text: {blank}", hidden))
    return Task("gaps", haystack, questions or [("Repeat the beginning of the text.", haystack[:200])])


def scatter(rng: random.Random, haystack: str, facts: list[str]) -> str:
    """Insert facts between sentences, at random depths."""
    sentences = sentences_of(haystack)
    for fact in facts:
        sentences.insert(rng.randrange(len(sentences) + 1), fact)
    return " ".join(sentences)


def sentences_of(text: str) -> list[str]:
    return [part for part in re.split(r"(?<=[.!?])\s+", text) if part]

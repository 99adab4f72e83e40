"""Everyday requests over a document, answered by the model itself: what its answers look at is what must stay."""

import random
import re

from sglang_metasoft.train.cases import Task
from sglang_metasoft.train.generators import sentences_of
from sglang_metasoft.train.words import ADJECTIVES, JOBS, NAMES, NOUNS, PLACES

REQUESTS = 4
# About the whole text.
WHOLE = (
    "Sum this up in two sentences.",
    "Give me the gist, please.",
    "Tell me in plain words what this is about.",
    "Which points matter most here? Answer as a short list.",
    "Shorten the text to one paragraph.",
    "What should somebody who has no time take away from this?",
    "Suggest a title and explain it.",
    "Who would want to read this, and why?",
    "What is the author trying to achieve?",
    "Describe the tone of the text with examples.",
    "What happens first, and what happens at the end?",
    "List names and places that appear in the text.",
    "Which numbers or dates come up, and what do they stand for?",
    "Write three questions that the text answers, with their answers.",
    "Explain this to a child of ten.",
    "Turn the most useful part into a step-by-step list.",
    "Is there anything one should be careful about according to this?",
    "What reasons does it give?",
    "Write an e-mail to a colleague that passes on what counts.",
    "Write the paragraph that could follow this text.",
    "What is unclear or missing in it?",
    "Find something surprising in it and quote the place.",
    "Make a table: a row for every thing described, with the remark made on it.",
    "What would you reply to the writer?",
)
# About one part: {name} occurs in the text, {start} begins one of its sentences.
PART = (
    "Sum up what stands here on {name}.",
    "Why is {name} brought up?",
    "How does {name} relate to the rest of the text?",
    "Explain the part that begins “{start}”.",
    "Put the passage from “{start}” on into simpler words.",
    "What comes right after the words “{start}”?",
    "Quote what is said about {name}.",
    "Write a headline and a first line of news about {name} from this.",
    "Does the text say anything about {name}? What exactly?",
    "Give the meaning of “{word}” as it is used above.",
    "Where does “{word}” come up, and in what connection?",
    "I only care about {name}. What do I have to know?",
)
EARLIER = ("Copy out one sentence that seems important to you.", "Pick a sentence from it and repeat it.")


def everyday(rng: random.Random, haystack: str) -> Task:
    """Questions, summaries, lists and letters about a natural text."""
    names = list(dict.fromkeys(re.findall(r"(?<=[a-z,] )[A-Z][a-z]{3,}(?: [A-Z][a-z]+)?", haystack))) or ["the subject"]
    words = list(dict.fromkeys(re.findall(r"\b[a-z]{7,12}\b", haystack))) or ["this"]
    sentences = [s for s in sentences_of(haystack) if 60 < len(s) < 250] or [haystack[:200]]
    requests = []
    for template in rng.sample(WHOLE, 2) + rng.sample(PART, REQUESTS - 2):
        start = " ".join(rng.choice(sentences).split()[:5])
        requests.append(template.format(name=rng.choice(names), start=start, word=rng.choice(words)))
    return Task("everyday", haystack, [(request, None) for request in requests])


def is_code(text: str) -> bool:
    """Whether it is a source file rather than prose."""
    return len(re.findall(r"^\s*(?:def|class|sub|function) +\w+", text, re.MULTILINE)) > 1


def code(rng: random.Random, haystack: str) -> Task:
    """Requests about a source file; ``haystack`` is one."""
    names = list(dict.fromkeys(re.findall(r"(?:def|class|sub|function) +(\w+)", haystack))) or ["the first part"]
    choices = [
        f"What does {rng.choice(names)} do?",
        f"Which arguments does {rng.choice(names)} take, and what are they for?",
        "Describe this file for somebody new to the project.",
        f"Write a docstring for {rng.choice(names)}.",
        "Which names are defined here? List them with one line each.",
        f"Where could {rng.choice(names)} fail?",
        f"Show how one would call {rng.choice(names)}.",
    ]
    return Task("code", haystack, [(choice, None) for choice in rng.sample(choices, REQUESTS)])


def labels(rng: random.Random, haystack: str) -> Task:
    """Short entries with a label each, and entries without one."""
    kinds = {"person": NAMES, "thing": NOUNS, "place": PLACES, "trade": JOBS, "quality": ADJECTIVES}
    chosen = rng.sample(sorted(kinds), rng.choice((2, 3, 5)))
    form = rng.choice(("{0} => {1}", "{0}\t{1}", "Entry: {0}\nLabel: {1}\n"))
    lines, size = [], 0
    while size < 0.6 * len(haystack):
        kind = rng.choice(chosen)
        lines.append(form.format(rng.choice(kinds[kind]), kind))
        size += len(lines[-1])
    asked = []
    for _ in range(REQUESTS):
        entry = rng.choice(kinds[rng.choice(chosen)])
        asked.append((f"Label the next entry in the same way: {entry}", None))
    return Task("labels", "\n".join(lines), asked)


def conversation(rng: random.Random, haystack: str) -> Task:
    """A made-up discussion: speakers take sentences of the text in turn."""
    speakers = rng.sample(NAMES, rng.choice((2, 3, 4)))
    lines = [f"{rng.choice(speakers)}: {sentence}" for sentence in sentences_of(haystack)]
    one = rng.choice(speakers)
    choices = [
        f"What does {one} say?",
        f"Sum up what {one} thinks.",
        "Who speaks, and what about?",
        "What did they agree on?",
        "Write minutes of this conversation.",
        f"How does the last speaker answer {one}?",
        "What is still open at the end?",
    ]
    return Task("conversation", "\n".join(lines), [(choice, None) for choice in rng.sample(choices, REQUESTS)])

"""Everyday questions and requests about natural documents of ten kinds, in two splits that share no document.

There is no reference answer: the measure is how well a compressed cache follows the full cache's own answer
(:mod:`sglang_metasoft.eval.fidelity`). ``natural`` is for development; ``natural_frozen``, of other documents and in
other wordings, is for a release. Training (``train/fetch_texts.py``) uses none of the sources.
"""

import re
from collections.abc import Callable
from functools import partial
from random import Random
from typing import NamedTuple

from sglang_metasoft.eval.case import Draft, Request, Task, Turn
from sglang_metasoft.eval.data import Sources
from sglang_metasoft.eval.metrics import FIDELITY

DEVELOPMENT, FROZEN = "development", "frozen"
ANSWER_TOKENS = 48
CHARS_PER_TOKEN = 6  # more than any kind has: a document that starts here does not end before the prompt is full
PIECE = re.compile(r".+?(?:[.!?:;](?=\s)|\n|$)\s*", re.DOTALL)
LICENSES = {
    DEVELOPMENT: (
        "GPL-2.0-only", "GPL-3.0-only", "LGPL-2.1-only", "AGPL-1.0-only", "MPL-1.1", "MPL-2.0", "NPL-1.1", "CPAL-1.0",
        "Apache-2.0", "ECL-2.0", "EPL-1.0", "EPL-2.0", "CPL-1.0", "IPL-1.0", "CC-BY-3.0", "CC-BY-4.0", "AFL-3.0",
        "OSL-3.0", "CC-BY-NC-SA-3.0", "Python-2.0",
    ),
    FROZEN: (
        "EUPL-1.2", "CECILL-2.1", "CECILL-B", "CDDL-1.0", "ODbL-1.0", "ODC-By-1.0", "GFDL-1.3-only", "APSL-2.0",
        "RPL-1.5", "RPSL-1.0", "Watcom-1.0", "Motosoto", "LPPL-1.3c", "CERN-OHL-S-2.0", "TAPR-OHL-1.0",
        "CDLA-Sharing-1.0", "Artistic-2.0", "Aladdin", "NASA-1.3", "CAL-1.0",
    ),
}  # fmt: skip
Document = tuple[str, str]  # a name that no other of its kind has, and a text


class Kind(NamedTuple):
    """One kind of document in one split."""

    name: str
    split: str
    load: Callable[[Sources], list[Document]]
    opening: str  # what stands before the document
    requests: tuple[str, ...]
    further: tuple[str, ...]  # for a second turn


def _file(name: str, sources: Sources) -> list[Document]:
    return [(f"{number} {title}", text) for number, (title, text) in enumerate(sources.documents(name))]


def _licenses(split: str, sources: Sources) -> list[Document]:
    texts = dict(sources.documents("licenses.json"))
    return [(name, texts[name]) for name in LICENSES[split] if name in texts]


def _halves(name: str, split: str, sources: Sources) -> list[Document]:
    return _file(name, sources)[split == FROZEN :: 2]


def _domain(name: str, sources: Sources) -> list[Document]:
    return [(title, text) for title, text in _file("coqa.json", sources) if title.endswith(name)]


def _code(sources: Sources) -> list[Document]:
    return [(str(number), text) for number, text in enumerate(sources.code()) if text.count("\n") > 40]


def _news(sources: Sources) -> list[Document]:
    return [(str(number), text) for number, (text, _) in enumerate(sources.xsum())]


def _articles(name: str, sources: Sources) -> list[Document]:
    return [
        (f"{number} {article['title']}", "\n\n".join(paragraph["context"] for paragraph in article["paragraphs"]))
        for number, article in enumerate(sources.squad(name))
    ]


KINDS = (
    Kind(
        "manual", DEVELOPMENT, partial(_file, "celery.json"), "I am reading this part of a manual.",
        (
            "What is this part about? Tell me in two or three sentences.",
            "Which steps would I have to take to set this up? Number them.",
            "What can go wrong here, and how do I avoid it?",
            "Explain the most important option that is described here, with an example.",
            "I have never used this software. What do I need to know first?",
            "Which commands or function names occur here? List them, each with a few words on what it does.",
        ),
        ("Can you say that in simpler words?", "Is there a warning in the text that I should not overlook?"),
    ),
    Kind(
        "licence", DEVELOPMENT, partial(_licenses, DEVELOPMENT), "Here is the text of a licence.",
        (
            "May I sell a product that contains software under this licence?",
            "What must I do when I pass on a changed version?",
            "What does this mean for me if I only use the program at home?",
            "Sum up my duties in a short list.",
            "Who is liable if the software does damage?",
            "Explain the part about patents to somebody who is not a lawyer.",
        ),
        ("And when do I lose these rights?", "Which paragraph says so?"),
    ),
    Kind(
        "essay", DEVELOPMENT, partial(_file, "editorials.json"), "These are comments from a newspaper.",
        (
            "What does the writer want to be done?",
            "Sum up the argument of the last comment in two sentences.",
            "Which people are named, and what is said about each?",
            "What facts does the writer give to support the opinion?",
            "What might somebody who disagrees reply?",
            "List the topics, one line each.",
        ),
        ("Which of these would you call the strongest point, and why?", "How would you put that in one headline?"),
    ),
    Kind(
        "tale", DEVELOPMENT, partial(_file, "mysteries.json"), "Please read this story.",
        (
            "Who are the people in it, and how are they related?",
            "What has happened so far? Keep it short.",
            "Where does the story take place?",
            "Whom would you suspect, and what speaks for that?",
            "Describe the main character in your own words.",
            "What is the problem that has to be solved?",
        ),
        ("What do you think happens next?", "Which sentence of the story shows that?"),
    ),
    Kind(
        "discussion", DEVELOPMENT, partial(_file, "mails.json"), "Below are messages from a mailing list.",
        (
            "What are these people talking about?",
            "Who holds which opinion? One line for each person.",
            "Has a solution been found, and which?",
            "Write minutes of this discussion in a few lines.",
            "Which questions stay open?",
            "Draft a short and friendly reply to the last message.",
        ),
        ("Who wrote first, and when?", "What would you suggest to them?"),
    ),
    Kind(
        "code", DEVELOPMENT, _code, "This is a piece of a Python module.",
        (
            "What does this code do?",
            "List the functions and classes, each with one line of explanation.",
            "Write a short test for the first function.",
            "Do you see a bug or something that could be made better?",
            "How would I call this from a program of my own?",
            "Explain the longest function step by step.",
        ),
        ("What happens there with empty input?", "Could you write a docstring for it?"),
    ),
    Kind(
        "log", DEVELOPMENT, partial(_halves, "logs.json", DEVELOPMENT), "These lines are from the log of a server.",
        (
            "What happened here? Give me a short account.",
            "Which addresses show up, and what did each of them try?",
            "Is there any sign of an attack?",
            "List the different kinds of errors.",
            "What should I look at first as an administrator?",
            "When did the first and the last of these events take place?",
        ),
        ("Which of these lines are harmless?", "What could I do against it?"),
    ),
    Kind(
        "table", DEVELOPMENT, partial(_file, "vega_tables.json"), "Here is a table in CSV form.",
        (
            "What does this table show?",
            "What do the columns mean? Explain each of them.",
            "Describe the last row in a full sentence.",
            "Which row stands out, and why?",
            "Pick three rows and compare them.",
            "Name the largest value that you can find in the last column.",
        ),
        ("And what is in the row before that?", "Which question could I answer with these data?"),
    ),
    Kind(
        "news", DEVELOPMENT, _news, "Here are a few reports from the news.",
        (
            "What are the reports about? One sentence for each.",
            "What happened in the last of them?",
            "Which places and people are mentioned?",
            "Which of them is the most important for people who live there, and why?",
            "Which numbers do the reports give, and for what?",
            "Tell me the first report as you would tell it a child.",
        ),
        ("Who is quoted there, and with which words?", "What will happen next, by what is said?"),
    ),
    Kind(
        "encyclopedia", DEVELOPMENT, partial(_articles, "squad.json"), "This is from an encyclopedia.",
        (
            "Sum up what I should remember of this.",
            "Which dates are given, and what happened then?",
            "Who played a part in this, and which?",
            "Explain one hard word of the text to me.",
            "Write three quiz questions about it, with their answers.",
            "Why does this subject matter?",
        ),
        ("Tell me more about the first point.", "What does the text leave out?"),
    ),
    Kind(
        "manual", FROZEN, partial(_file, "django.json"), "The following comes from a software guide:",
        (
            "Could you give me the gist of this page?",
            "How do I get started with what is explained above? Show the commands or the code.",
            "What are the limits or pitfalls mentioned?",
            "I get an error when I try this. What does the page suggest I check?",
            "Make me a cheat sheet out of this.",
            "When would I use this, and when rather not?",
        ),
        ("Shorter, please.", "Give a code example for that."),
    ),
    Kind(
        "licence", FROZEN, partial(_licenses, FROZEN), "I was sent these terms:",
        (
            "Our company wants to build this into a device. What are the conditions?",
            "Do I have to publish my own source code or data?",
            "In plain English: what am I allowed to do?",
            "How can this agreement come to an end?",
            "What does it say about warranty?",
            "How are the most important terms defined?",
        ),
        ("Does it matter which country I live in?", "Put this into a table with two columns: allowed, not allowed."),
    ),
    Kind(
        "essay", FROZEN, partial(_domain, "race"), "Some short texts from an English course:",
        (
            "What is the main idea of each text?",
            "Which lesson can be drawn from the final text?",
            "Give the outline of the first text.",
            "What reasons are given, and are they convincing?",
            "Write a title for each text.",
            "Rewrite the beginning in a more formal style.",
        ),
        ("How does the author feel about it?", "Now in no more than ten words."),
    ),
    Kind(
        "tale", FROZEN, partial(_domain, "gutenberg"), "A few pages from old books:",
        (
            "Retell what happens on these pages.",
            "Which mood does the author create, and how?",
            "Who speaks with whom, and about what?",
            "How does the hero of the last page behave?",
            "What do we learn about the time in which it is set?",
            "Name everyone who appears.",
        ),
        ("Why does he or she do that?", "Continue the last scene with a few sentences."),
    ),
    Kind(
        "discussion", FROZEN, partial(_file, "reddit.json"), "Posts from an internet forum:",
        (
            "What does each of the posters want to know?",
            "Which advice would you give the author of the last post?",
            "Summarize the thread for someone in a hurry.",
            "Is anybody here upset, and about what?",
            "List the products, places or people that are brought up.",
            "Answer the first post.",
        ),
        ("What else should they have told us?", "Make the answer more polite."),
    ),
    Kind(
        "code", FROZEN, partial(_file, "more_code.json"), "Source code that I have to review:",
        (
            "Walk me through this file.",
            "Which errors can be raised, and under what conditions?",
            "Suggest better names where you see the need.",
            "What are the inputs and outputs of the main parts?",
            "Add type hints or comments to the hardest piece.",
            "What other modules does it depend on?",
        ),
        ("Rewrite that part more simply.", "Is it safe to call from several threads?"),
    ),
    Kind(
        "log", FROZEN, partial(_halves, "logs.json", FROZEN), "Output of a system service:",
        (
            "Somebody reports that they cannot log in. Does this explain it?",
            "Group these messages by cause.",
            "Who or what caused most of the entries?",
            "Translate the technical messages into plain words.",
            "Write a report of three lines for my boss.",
            "Which user names turn up?",
        ),
        ("How sure are you of that?", "Write a regular expression that matches those lines."),
    ),
    Kind(
        "table", FROZEN, partial(_file, "r_tables.json"), "Data that a colleague exported:",
        (
            "Where might these numbers come from, and what do they describe?",
            "Give me an overview: columns, types of values, anything odd.",
            "Read out the first and the last record.",
            "Are two of the columns related?",
            "Turn three records into a Markdown table.",
            "Find the record with the smallest value in the first numeric column.",
        ),
        ("What is the range of that column?", "How would you plot this?"),
    ),
    Kind(
        "news", FROZEN, partial(_file, "nyt.json"), "From yesterday's paper:",
        (
            "Give me the headlines.",
            "What is new here, compared with what was known before?",
            "Which background does the reporter give?",
            "Who gains and who loses by what is reported?",
            "What do the people who were interviewed say?",
            "Brief me in five bullet points.",
        ),
        ("When exactly was that?", "Why should I care?"),
    ),
    Kind(
        "encyclopedia", FROZEN, partial(_articles, "new_wiki.json"), "An entry in a reference work:",
        (
            "Tell me the three most surprising facts.",
            "How did things develop over time?",
            "I have to give a talk on this. Sketch it.",
            "What causes and effects are described?",
            "Which places are named, and what is each known for?",
            "Define the subject in one sentence.",
        ),
        ("Which of these facts has a number in it?", "Can you put that as a question and an answer?"),
    ),
)  # fmt: skip


def pieces_of(text: str) -> list[str]:
    """Sentences and lines, each with the space after it."""
    return PIECE.findall(text.strip("\n") + "\n\n")


def _documents(kind: Kind, request: Request) -> list[Document]:
    """All documents of a kind: another first one for each index, as long as there are any, the rest at random."""
    documents = kind.load(request.sources)
    if not documents:
        raise ValueError(f"no documents of the kind {kind.name!r} in {str(request.sources.folder)!r}")
    Random(f"{kind.split}/{kind.name}/{request.seed}").shuffle(documents)
    first = documents.pop(request.index % len(documents))
    request.rng.shuffle(documents)
    return [first, *documents]


def build(kind: Kind, request: Request) -> Draft:
    """A part of a document, or several short ones in a row, and one or two turns about it."""
    rng, documents = request.rng, _documents(kind, request)
    needed = CHARS_PER_TOKEN * request.length_tokens
    name, text = documents[0]
    header = ""
    if len(text) > needed:  # from the beginning of a paragraph, or of a line, that leaves enough
        mark = "\n\n" if text.count("\n\n") > 20 else "\n"
        if kind.name == "table":
            header = text[: text.index("\n") + 1]
        start = text.find(mark, rng.randrange(len(text) - needed + 1))
        text = text[start:] if 0 < start < len(text) - needed // 2 else text
    first_turn, second_turn = rng.choice(kind.requests), rng.choice(kind.further)
    turns = (first_turn, second_turn)[: rng.choice((1, 2))]
    pieces: list[str] = []
    for part in (text, *(other for _, other in documents[1:])):
        pieces += pieces_of(part)
        if len(pieces) > request.size:
            break
    body = header + "".join(pieces[: request.size]).rstrip()
    return Draft(
        f"{kind.opening}\n\n{body}",
        tuple(Turn(f"\n\n{turn}" if number == 0 else turn, ()) for number, turn in enumerate(turns)),
        {"kind": kind.name, "split": kind.split, "document": f"{kind.split}/{kind.name}/{name}"},
    )


def task_name(kind: Kind) -> str:
    """``natural_tale`` or ``natural_frozen_tale``."""
    return f"natural_{'frozen_' if kind.split == FROZEN else ''}{kind.name}"


TASKS = [Task(task_name(kind), kind.name, FIDELITY, ANSWER_TOKENS, partial(build, kind)) for kind in KINDS]

"""RULER's other tasks (arXiv 2404.06654): variable tracking, word counting, question answering.

As in the benchmark's generators. ``qa_1`` takes SQuAD 1.1's development set (RULER: 2.0's answerable questions over the
same articles). ``qa_2`` takes HotpotQA if its file is in the data folder (``hotpotqa.json``, as RULER downloads it);
else SQuAD's new Wikipedia set (arXiv 2004.14444), which no package index lacks.
"""

import math
import string
from random import Random
from typing import NamedTuple

from sglang_metasoft.eval.case import Draft, Request, Task, Turn
from sglang_metasoft.eval.tasks.needle import NOISE


class Wording(NamedTuple):
    """The fixed text of these tasks."""

    vt_head: str
    vt_first: str  # of a chain; {name}, {value}
    vt_next: str  # {name}, {source}
    vt_question: str
    vt_prefix: str
    vt_noise: str
    cwe_head: str
    cwe_question: str
    cwe_prefix: str
    fwe_head: str
    fwe_question: str
    fwe_prefix: str
    qa_instruction: str
    qa_head: str
    qa_label: str
    qa_prefix: str


RULERS = Wording(
    vt_head="Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n",
    vt_first="VAR {name} = {value}",
    vt_next="VAR {name} = VAR {source} ",
    vt_question="\nQuestion: Find all variables that are assigned the value {value} in the text above.",
    vt_prefix=" Answer: According to the chain(s) of variable assignment in the text above, {count} variables are "
    "assigned the value {value}, they are: ",
    vt_noise=NOISE,
    cwe_head="Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones "
    "that appear most often.\n",
    cwe_question="\nQuestion: What are the 10 most common words in the above list?",
    cwe_prefix=" Answer: The top 10 words that appear most often in the list are:",
    fwe_head="Read the following coded text and track the frequency of each coded word. Find the three most frequently "
    "appeared coded words. ",
    fwe_question="\nQuestion: Do not provide any explanation. Please ignore the dots '....'. What are the three most "
    "frequently appeared words in the above coded text?",
    fwe_prefix=" Answer: According to the coded text above, the three most frequently appeared words are:",
    qa_instruction="Answer the question based on the given documents. Only give me the answer and do not output any "
    "other words.",
    qa_head="The following are given documents.",
    qa_label="Document",
    qa_prefix=" Answer:",
)
VT_HOPS, VT_EXAMPLE_LINES = 4, 5
FWE_ANSWER_TOKENS = 50
ZETA_2 = math.pi**2 / 6
SHORT_TOKENS = 4096  # below it, RULER's word lists are less repetitive


def _prefix(rng: Random, letters: int, wording: Wording) -> tuple[list[str], list[str], str]:
    names: list[str] = []
    while len(names) < VT_HOPS + 1:
        name = "".join(rng.choices(string.ascii_uppercase, k=letters))
        names += [name] if name not in names else []
    value = str(rng.randint(10_000, 99_998))
    lines = [wording.vt_first.format(name=names[0], value=value)]
    lines += [wording.vt_next.format(name=name, source=source) for source, name in zip(names, names[1:], strict=False)]
    return names, lines, value


def _tracking(rng: Random, noise_lines: int, letters: int, wording: Wording) -> tuple[str, Turn]:
    names, prefix, value = _prefix(rng, letters, wording)
    lines = [wording.vt_noise] * noise_lines
    places = sorted(rng.sample(range(len(lines)), len(prefix)))
    for number, (place, line) in enumerate(zip(places, prefix, strict=True)):
        lines.insert(place + number, line)
    document = wording.vt_head + "\n".join(lines).replace(". \n", ".\n")
    prefix_text = wording.vt_prefix.format(count=len(names), value=value)
    turn = Turn(wording.vt_question.format(value=value), tuple(names), prefix_text)
    return document, turn


def build_vt(request: Request, wording: Wording = RULERS) -> Draft:
    """One prefix of four hops in noise, after one worked example."""
    example, shown = _tracking(request.rng, VT_EXAMPLE_LINES, 3, wording)
    example += shown.question + shown.answer_prefix + " " + " ".join(shown.answers) + "\n"
    document, turn = _tracking(request.rng, request.size + VT_HOPS, 5, wording)
    return Draft(example + "\n" + document, (turn,))


def _word_list(rng: Random, words: list[str], count: int, common: int, uncommon: int) -> tuple[str, list[str]]:
    chosen = rng.sample(words, count)
    listed = chosen[:10] * common + chosen[10:] * uncommon
    rng.shuffle(listed)
    return " ".join(f"{number}. {word}" for number, word in enumerate(listed, 1)), chosen[:10]


def build_cwe(request: Request, wording: Wording = RULERS) -> Draft:
    """The ten words that are repeated most, after one worked example."""
    words = sorted({word for words in request.sources.word_lists() for word in words})
    is_short = request.length_tokens < SHORT_TOKENS
    example, shown = _word_list(request.rng, words, *((20, 3, 1) if is_short else (40, 10, 3)))
    listed, answers = _word_list(request.rng, words, 10 + request.size, *((6, 1) if is_short else (30, 3)))
    numbered = " ".join(f"{number}. {word}" for number, word in enumerate(shown, 1))
    head, question, prefix = wording.cwe_head, wording.cwe_question, wording.cwe_prefix
    document = f"{head}{example}{question}{prefix} {numbered}\n{head}{listed}"
    return Draft(document, (Turn(question, tuple(answers), prefix),))


def build_fwe(request: Request, wording: Wording = RULERS) -> Draft:
    """The three most frequent of random six-letter words whose frequencies follow a zeta distribution (alpha 2)."""
    rng = request.rng
    vocabulary: set[str] = set()
    while len(vocabulary) < (request.length_tokens - FWE_ANSWER_TOKENS) // 50:
        vocabulary.add("".join(rng.choices(string.ascii_lowercase, k=6)))
    ranked = sorted(vocabulary)
    rng.shuffle(ranked)
    ranked[0] = "..."
    # The top four must occur, and differ in number, for the question to have an answer.
    count = 200 + 10 * request.size
    words = [word for rank, word in enumerate(ranked, 1) for _ in range(int(count * rank**-2 / ZETA_2))]
    rng.shuffle(words)
    turn = Turn(wording.fwe_question, tuple(ranked[1:4]), wording.fwe_prefix)
    return Draft(wording.fwe_head + " ".join(words), (turn,))


def numbered_documents(documents: list[str], label: str = "Document") -> str:
    """Documents under numbered headings."""
    return "\n\n".join(f"{label} {number}:\n{text}" for number, text in enumerate(documents, 1))


def _qa_draft(
    rng: Random, documents: list[str], question: str, answers: list[str], details: dict, wording: Wording
) -> Draft:
    rng.shuffle(documents)
    given = numbered_documents(documents, wording.qa_label)
    asked = f"\n\n{wording.qa_instruction}\n\nQuestion: {question}"
    turn = Turn(asked, tuple(dict.fromkeys(answers)), wording.qa_prefix)
    return Draft(f"{wording.qa_instruction}\n\n{wording.qa_head}\n\n{given}", (turn,), details)


def _squad_qa(request: Request, name: str, wording: Wording) -> Draft:
    """A question, its paragraph, others of its article, then others of all articles."""
    rng, articles = request.rng, request.sources.squad(name)
    article = rng.choice(articles)
    paragraph = rng.choice([paragraph for paragraph in article["paragraphs"] if paragraph["qas"]])
    qa = rng.choice(paragraph["qas"])
    own = [other["context"] for other in article["paragraphs"] if other is not paragraph]
    rng.shuffle(own)
    rest = [other["context"] for a in articles if a is not article for other in a["paragraphs"]]
    distractors = own[: request.size - 1]
    distractors += rng.sample(rest, min(len(rest), request.size - 1 - len(distractors)))
    return _qa_draft(
        rng, [paragraph["context"], *distractors], qa["question"], [answer["text"] for answer in qa["answers"]],
        {"source": name}, wording,
    )  # fmt: skip


def build_qa_1(request: Request, wording: Wording = RULERS) -> Draft:
    """SQuAD."""
    return _squad_qa(request, "squad.json", wording)


def build_qa_2(request: Request, wording: Wording = RULERS) -> Draft:
    """HotpotQA where it is at hand, else SQuAD's new Wikipedia set."""
    items = request.sources.hotpot()
    if items is None:
        return _squad_qa(request, "new_wiki.json", wording)
    rng, item = request.rng, request.rng.choice(items)
    own = [f"{title}\n{''.join(text)}" for title, text in item["context"]]
    others = [f"{title}\n{''.join(text)}" for other in rng.sample(items, 50) for title, text in other["context"]]
    documents = own + rng.sample(others, min(len(others), request.size - 1))
    return _qa_draft(rng, documents, item["question"], [item["answer"]], {"source": "hotpotqa.json"}, wording)


TASKS = [
    Task("vt", "tracing", "string_match_all", 30, build_vt),
    Task("cwe", "counting", "string_match_all", 120, build_cwe, max_size=4000),
    Task("fwe", "counting", "string_match_all", FWE_ANSWER_TOKENS, build_fwe),
    Task("qa_1", "qa", "string_match_part", 32, build_qa_1),
    Task("qa_2", "qa", "string_match_part", 32, build_qa_2),
]

"""A data folder made of the shipped document, so that no test downloads anything."""

import json
import random

import pytest

from sglang_metasoft.eval.data import FETCHERS, Sources
from sglang_metasoft.eval.tasks.longbench import TREC_NAMES
from sglang_metasoft.eval.tasks.natural import LICENSES


@pytest.fixture(scope="session")
def data_folder(document, tmp_path_factory):
    """Texts of the right shape for every task; questions ask for words of the document."""
    folder = tmp_path_factory.mktemp("data")
    rng = random.Random(7)
    for name in ("austen.txt", "moby_dick.txt"):
        (folder / name).write_text(document * 6)
    paragraphs = [text.strip() for text in document.split("\n\n") if len(text.split()) > 30]
    for name in ("squad.json", "new_wiki.json"):
        articles = []
        for start in range(0, len(paragraphs), 4):
            items = []
            for number, text in enumerate(paragraphs[start : start + 4]):
                words = text.split()
                place = rng.randrange(5, len(words) - 4)
                answer = " ".join(words[place : place + 3])
                question = f"What follows “{words[place - 2]} {words[place - 1]}” in part {start + number}?"
                items.append({"context": text, "qas": [{"question": question, "answers": [{"text": answer}]}]})
            articles.append({"title": f"Part {start}", "paragraphs": items})
        (folder / name).write_text(json.dumps({"data": articles}))
    examples = [{"input": text, "target": [" ".join(text.split()[:12])]} for text in paragraphs]
    (folder / "xsum.json").write_text(json.dumps({"examples": examples}))
    lines = [f"{label} What is number {n} of {label[:4]} ?" for n in range(8) for label in TREC_NAMES]
    (folder / "trec.txt").write_text("\n".join(lines))
    code = "\n".join(f"def function_{n}(argument):\n    return argument + {n}" for n in range(60))
    (folder / "code.json").write_text(json.dumps([code] * 3))
    titles = {"licenses": sorted(set().union(*LICENSES.values())), "coqa": ["race", "gutenberg"] * 4}
    for name in FETCHERS:
        if not (folder / name).exists():
            # Each a text of its own: the document from another place on.
            listed = titles.get(name.removesuffix(".json"), [f"part {n}" for n in range(8)])
            starts = [rng.randrange(len(document)) for _ in listed]
            texts = [[title, document[at:] + document[:at]] for title, at in zip(listed, starts, strict=True)]
            (folder / name).write_text(json.dumps(texts))
    return folder


@pytest.fixture(scope="session")
def sources(data_folder):
    return Sources(data_folder)

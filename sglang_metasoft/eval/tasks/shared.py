"""One document, several turns, its KV reused: the shape of SCBench (arXiv 2412.10319).

Earlier turns stand in the prompt with their true answers, as in SCBench's multi-turn mode.
"""

import json
from collections.abc import Sequence
from random import Random

from sglang_metasoft.eval.case import Draft, Request, Task, Turn
from sglang_metasoft.eval.tasks.longbench import TREC_HEAD, TREC_NAMES, trec_shots, window_of_article
from sglang_metasoft.eval.tasks.needle import draw

TURNS = 4
KV_HEAD = "Extract the value corresponding to the specified key in the JSON object below.\n\nJSON data:\n"
KV_QUESTION = "\n\nKey: {key}"
KV_PREFIX = " The value associated with the specified key is:"
QA_HEAD = "Read the following text. I will ask you questions about it.\n\n"
QA_QUESTION = "\n\nAnswer with a few words of the text. Question: {question}"


def _turns(rng: Random, asked: Sequence[tuple[str, tuple[str, ...], str]]) -> tuple[Turn, ...]:
    return tuple(Turn(question, answers, prefix) for question, answers, prefix in asked)


def build_kv(request: Request) -> Draft:
    """Values of four keys of a JSON object of UUIDs."""
    rng, sources = request.rng, request.sources
    pairs = {draw(rng, "words", sources): draw(rng, "numbers", sources) for _ in range(request.size + TURNS)}
    keys = rng.sample(list(pairs), TURNS)
    asked = [(KV_QUESTION.format(key=key), (pairs[key],), KV_PREFIX) for key in keys]
    return Draft(KV_HEAD + json.dumps(pairs, indent=0), _turns(rng, asked))


def build_qa(request: Request) -> Draft:
    """Four questions over one Wikipedia article."""
    rng, articles = request.rng, request.sources.squad("squad.json")
    article = rng.randrange(len(articles))
    paragraphs = articles[article]["paragraphs"]
    must = rng.randrange(len(paragraphs))
    texts = window_of_article(rng, articles, article, must, request.size)
    inside = [qa for paragraph in paragraphs if paragraph["context"] in texts for qa in paragraph["qas"]]
    chosen = rng.sample(inside, min(TURNS, len(inside)))
    asked = [
        (QA_QUESTION.format(question=qa["question"]), tuple(dict.fromkeys(a["text"] for a in qa["answers"])), "")
        for qa in chosen
    ]
    return Draft(QA_HEAD + "\n".join(texts), _turns(rng, asked))


def build_many_shot(request: Request) -> Draft:
    """The types of four questions after many labelled ones."""
    rng = request.rng
    items = [item for item in request.sources.trec() if item[1] in TREC_NAMES]
    rng.shuffle(items)
    document = TREC_HEAD + trec_shots(rng, items[TURNS:], min(request.size, len(items) - TURNS))
    asked = [(f"\nQuestion: {text}\nType:", (TREC_NAMES[label],), "") for text, label in items[:TURNS]]
    return Draft(document, _turns(rng, asked), {"classes": list(TREC_NAMES.values())})


TASKS = [
    Task("sc_kv", "needle", "string_match_all", 32, build_kv),
    Task("sc_qa", "qa", "string_match_part", 32, build_qa),
    Task("sc_many_shot", "classification", "classification", 32, build_many_shot, stop=("\n",), is_chat=False),
]

"""LongBench's English data sets with their official data, where that can be had (arXiv 2308.14508).

The data is read from ``longbench/<name>.jsonl`` in the data folder; what is missing there is downloaded from the hub.
Contexts that are too long lose their middle, as the benchmark does.
"""

import json
from functools import cache, partial
from pathlib import Path

from sglang_metasoft.eval.case import Draft, Request, Task, Turn
from sglang_metasoft.eval.tasks.longbench import (
    CODE_HEAD,
    COUNT_HEAD,
    COUNT_QUESTION,
    MULTI_INSTRUCTION,
    RETRIEVAL_HEAD,
    RETRIEVAL_QUESTION,
    SINGLE_HEAD,
    SINGLE_QUESTION,
    TREC_HEAD,
)

REPOSITORY, ARCHIVE = "THUDM/LongBench", "data.zip"
_QASPER = (
    "concisely as you can, using a single phrase or sentence if possible. If the question cannot be answered based on "
    'the information in the article, write "unanswerable". If the question is a yes/no question, answer "yes", "no", '
    'or "unanswerable". Do not provide any explanation.'
)
_STORY = "concisely as you can, using a single phrase if possible. Do not provide any explanation."
_MULTI = (
    f"{MULTI_INSTRUCTION}\n\nThe following are given passages.\n",
    f"\n\n{MULTI_INSTRUCTION}\n\nQuestion: {{input}}\nAnswer:",
)
_QUERY = "one or more sentences"
# Name: family, metric, answer tokens, prompt before the context, prompt after it.
DATASETS = {
    "narrativeqa": (
        "qa", "qa_f1", 128,
        "You are given a story, which can be either a novel or a movie script, and a question. Answer the question as"
        f"{_STORY}\n\nStory: ",
        f"\n\nNow, answer the question based on the story as{_STORY}\n\nQuestion: {{input}}\n\nAnswer:",
    ),
    "qasper": (
        "qa", "qa_f1", 128,
        f"You are given a scientific article and a question. Answer the question as {_QASPER}\n\nArticle: ",
        f"\n\n Answer the question based on the above article as {_QASPER}\n\nQuestion: {{input}}\n\nAnswer:",
    ),
    "multifieldqa_en": ("qa", "qa_f1", 64, SINGLE_HEAD, SINGLE_QUESTION.replace("{question}", "{input}")),
    "hotpotqa": ("qa", "qa_f1", 32, *_MULTI),
    "2wikimqa": ("qa", "qa_f1", 32, *_MULTI),
    "musique": ("qa", "qa_f1", 32, *_MULTI),
    "gov_report": (
        "summary", "rouge_l", 512,
        "You are given a report by a government agency. Write a one-page summary of the report.\n\nReport:\n",
        "\n\nNow, write a one-page summary of the report.\n\nSummary:",
    ),
    "qmsum": (
        "summary", "rouge_l", 512,
        "You are given a meeting transcript and a query containing a question or instruction. Answer the query in "
        f"{_QUERY}.\n\nTranscript:\n",
        f"\n\nNow, answer the query based on the above meeting transcript in {_QUERY}.\n\nQuery: {{input}}\nAnswer:",
    ),
    "multi_news": (
        "summary", "rouge_l", 512,
        "You are given several news passages. Write a one-page summary of all news. \n\nNews:\n",
        "\n\nNow, write a one-page summary of all the news.\n\nSummary:",
    ),
    "trec": ("classification", "classification", 64, TREC_HEAD, "\n{input}"),
    "triviaqa": (
        "qa", "qa_f1", 32,
        "Answer the question based on the given passage. Only give me the answer and do not output any other words. "
        "The following are some examples.\n\n",
        "\n\n{input}",
    ),
    "samsum": (
        "summary", "rouge_l", 128,
        "Summarize the dialogue into a few short sentences. The following are some examples.\n\n",
        "\n\n{input}",
    ),
    "passage_count": ("counting", "count", 32, COUNT_HEAD, COUNT_QUESTION),
    "passage_retrieval_en": (
        "retrieval", "retrieval", 32,
        RETRIEVAL_HEAD.format(count=30), RETRIEVAL_QUESTION.replace("{abstract}", "{input}"),
    ),
    "lcc": ("code", "code_similarity", 64, CODE_HEAD, "Next line of code:\n"),
    "repobench-p": ("code", "code_similarity", 64, CODE_HEAD, "{input}Next line of code:\n"),
}  # fmt: skip
FEW_SHOT = {"trec", "triviaqa", "samsum"}
NO_CHAT = FEW_SHOT | {"lcc", "repobench-p"}


@cache
def load(name: str, folder: Path) -> list[dict]:
    """The items of a data set.

    Raises:
        ValueError: the file is missing and the hub could not be reached; the message names the file to provide.
    """
    path = folder / "longbench" / f"{name}.jsonl"
    if not path.is_file():
        import zipfile

        from huggingface_hub import hf_hub_download

        try:
            archive = zipfile.ZipFile(hf_hub_download(REPOSITORY, ARCHIVE, repo_type="dataset"))
            text = archive.read(f"data/{name}.jsonl")
        except Exception as error:
            raise ValueError(
                f"LongBench's {name!r} could not be downloaded from {REPOSITORY} ({error}); put it into {path}, or use "
                "the group longbench, which needs no hub"
            ) from None
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text)
    return [json.loads(line) for line in path.read_text().splitlines()]


def build(request: Request, *, name: str) -> Draft:
    """An item in the order of a shuffle that depends on the seed through the first draw; its middle left out to fit."""
    items = load(name, request.sources.folder)
    item = items[request.rng.randrange(len(items))]
    _, _, _, before, after = DATASETS[name]
    words, half = item["context"].split(" "), 10 * request.size
    context = item["context"] if 2 * half >= len(words) else " ".join(words[:half]) + " ".join(words[-half:])
    question = after.replace("{input}", item["input"])
    details = {"classes": item["all_classes"]} if item.get("all_classes") else {}
    return Draft(before + context, (Turn(question, tuple(item["answers"])),), details)


TASKS = [
    Task(
        f"longbench/{name}", family, metric, answer_tokens, partial(build, name=name),
        stop=("\n",) if name in FEW_SHOT else (), is_chat=name not in NO_CHAT, max_size=4096,
    )
    for name, (family, metric, answer_tokens, _, _) in DATASETS.items()
]  # fmt: skip

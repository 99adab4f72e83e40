"""LongBench's six categories (arXiv 2308.14508): its prompts and metrics over texts that packages hold.

Each task has the shape and the prompt of the data set it is named after in ``details["like"]``. The official data
itself: ``longbench_official.py``.
"""

from random import Random

from sglang_metasoft.eval.case import Draft, Request, Task, Turn
from sglang_metasoft.eval.tasks.ruler import numbered_documents

SINGLE_HEAD = "Read the following text and answer briefly.\n\n"
SINGLE_QUESTION = (
    "\n\nNow, answer the following question based on the above text, only give me the answer and do not output any "
    "other words.\n\nQuestion: {question}\nAnswer:"
)
MULTI_INSTRUCTION = (
    "Answer the question based on the given passages. Only give me the answer and do not output any other words."
)
SUMMARY_HEAD = "Summarize the article into one sentence. The following are some examples.\n\n"
TREC_HEAD = "Please determine the type of the question below. Here are some examples of questions.\n\n"
RETRIEVAL_HEAD = (
    "Here are {count} paragraphs from Wikipedia, along with an abstract. Please determine which paragraph the abstract "
    "is from.\n\n"
)
RETRIEVAL_QUESTION = (
    "\n\nThe following is an abstract.\n\n{abstract}\n\nPlease enter the number of the paragraph that the abstract is "
    'from. The answer format must be like "Paragraph 1", "Paragraph 2", etc.\n\nThe answer is: '
)
COUNT_HEAD = (
    "There are some paragraphs below sourced from Wikipedia. Some of them may be duplicates. Please carefully read "
    "these paragraphs and determine how many unique paragraphs there are after removing duplicates. In other words, "
    "how many non-repeating paragraphs are there in total?\n\n"
)
COUNT_QUESTION = (
    "\n\nPlease enter the final count of unique paragraphs after removing duplicates. The output format should only "
    "contain the number, such as 1, 2, 3, and so on.\n\nThe final answer is: "
)
CODE_HEAD = "Please complete the code given below. \n"
CODE_QUESTION = "{input}Next line of code:\n"
QUESTION_WORDS = 200  # a longer question would be compressed as a segment of its own
TREC_NAMES = {
    "ABBR:abb": "Abbreviation", "ABBR:exp": "Expression abbreviated", "DESC:def": "Definition of something",
    "DESC:desc": "Description of something", "DESC:manner": "Manner of an action", "DESC:reason": "Reason",
    "ENTY:animal": "Animal", "ENTY:body": "Organ of body", "ENTY:color": "Color",
    "ENTY:cremat": "Invention, book and other creative piece", "ENTY:currency": "Currency name",
    "ENTY:dismed": "Disease and medicine", "ENTY:event": "Event", "ENTY:food": "Food",
    "ENTY:instru": "Musical instrument", "ENTY:lang": "Language", "ENTY:letter": "Letter like a-z",
    "ENTY:other": "Other entity", "ENTY:plant": "Plant", "ENTY:product": "Product", "ENTY:religion": "Religion",
    "ENTY:sport": "Sport", "ENTY:substance": "Element and substance", "ENTY:symbol": "Symbols and sign",
    "ENTY:techmeth": "Techniques and method", "ENTY:termeq": "Equivalent term", "ENTY:veh": "Vehicle",
    "ENTY:word": "Word with a special property", "HUM:desc": "Description of a person",
    "HUM:gr": "Group or organization of person", "HUM:ind": "Individual", "HUM:title": "Title of a person",
    "LOC:city": "City", "LOC:country": "Country", "LOC:mount": "Mountain", "LOC:other": "Other location",
    "LOC:state": "State", "NUM:code": "Postcode or other code", "NUM:count": "Number of something",
    "NUM:date": "Date", "NUM:dist": "Distance, linear measure", "NUM:money": "Price", "NUM:ord": "Order, rank",
    "NUM:other": "Other number", "NUM:perc": "Percent", "NUM:period": "Lasting time of something",
    "NUM:speed": "Speed", "NUM:temp": "Temperature", "NUM:volsize": "Size, area and volume", "NUM:weight": "Weight",
}  # fmt: skip


def _pick_question(rng: Random, articles: list[dict]) -> tuple[int, int, dict]:
    article = rng.randrange(len(articles))
    number = rng.choice([n for n, paragraph in enumerate(articles[article]["paragraphs"]) if paragraph["qas"]])
    return article, number, rng.choice(articles[article]["paragraphs"][number]["qas"])


def _answers(qa: dict) -> tuple[str, ...]:
    return tuple(dict.fromkeys(answer["text"] for answer in qa["answers"]))


def window_of_article(rng: Random, articles: list[dict], article: int, must: int, size: int) -> list[str]:
    """``size`` paragraphs in order, ``must`` among them; the next articles follow where one is too short."""
    paragraphs = [paragraph["context"] for paragraph in articles[article]["paragraphs"]]
    step = 0
    while len(paragraphs) < size and step < len(articles) - 1:
        step += 1
        following = articles[(article + step) % len(articles)]["paragraphs"]
        paragraphs += [paragraph["context"] for paragraph in following]
    start = rng.randint(max(0, must - size + 1), min(must, max(0, len(paragraphs) - size)))
    return paragraphs[start : start + size]


def build_single_doc_qa(request: Request) -> Draft:
    """A question over one Wikipedia article."""
    rng, articles = request.rng, request.sources.squad("squad.json")
    article, number, qa = _pick_question(rng, articles)
    text = "\n".join(window_of_article(rng, articles, article, number, request.size))
    question = SINGLE_QUESTION.format(question=qa["question"])
    return Draft(SINGLE_HEAD + text, (Turn(question, _answers(qa)),), {"like": "multifieldqa_en"})


def build_multi_doc_qa(request: Request) -> Draft:
    """A question over passages of different articles, one of which answers it."""
    rng, articles = request.rng, request.sources.squad("new_wiki.json")
    article, number, qa = _pick_question(rng, articles)
    others = [n for n in range(len(articles)) if n != article]
    chosen = [(article, number)]
    for n in rng.choices(others, k=request.size - 1):
        chosen.append((n, rng.randrange(len(articles[n]["paragraphs"]))))
    rng.shuffle(chosen)
    passages = [f"{articles[a]['title']}\n{articles[a]['paragraphs'][n]['context']}" for a, n in chosen]
    document = f"{MULTI_INSTRUCTION}\n\nThe following are given passages.\n{numbered_documents(passages, 'Passage')}"
    question = f"\n\n{MULTI_INSTRUCTION}\n\nQuestion: {qa['question']}\nAnswer:"
    return Draft(document, (Turn(question, _answers(qa)),), {"like": "hotpotqa"})


def build_summary(request: Request) -> Draft:
    """The summary of a short news article after many solved ones."""
    items = request.rng.sample(request.sources.xsum(), len(request.sources.xsum()))
    text, summary = items.pop(next(n for n, (text, _) in enumerate(items) if len(text.split()) <= QUESTION_WORDS))
    shots = "\n\n".join(f"Article: {text}\nSummary: {summary}" for text, summary in items[: request.size])
    return Draft(SUMMARY_HEAD + shots, (Turn(f"\n\nArticle: {text}\nSummary:", (summary,)),), {"like": "samsum"})


def trec_shots(rng: Random, items: list[tuple[str, str]], count: int) -> str:
    """Labelled questions, one after the other."""
    return "\n".join(f"Question: {text}\nType: {TREC_NAMES[label]}" for text, label in rng.sample(items, count))


def build_few_shot(request: Request) -> Draft:
    """The type of a question after many labelled ones."""
    items = [item for item in request.sources.trec() if item[1] in TREC_NAMES]
    text, label = items.pop(request.rng.randrange(len(items)))
    document = TREC_HEAD + trec_shots(request.rng, items, min(request.size, len(items)))
    turn = Turn(f"\nQuestion: {text}\nType:", (TREC_NAMES[label],))
    return Draft(document, (turn,), {"like": "trec", "classes": list(TREC_NAMES.values())})


def _paragraphs(rng: Random, articles: list[dict], count: int) -> list[dict]:
    everything = [paragraph for article in articles for paragraph in article["paragraphs"] if paragraph["qas"]]
    return rng.sample(everything, min(count, len(everything)))


def build_retrieval(request: Request) -> Draft:
    """Which paragraph is meant; its questions stand for the abstract that the official data has a model write."""
    paragraphs = _paragraphs(request.rng, request.sources.squad("squad.json"), request.size)
    right = request.rng.randrange(len(paragraphs))
    abstract = " ".join(qa["question"] for qa in paragraphs[right]["qas"][:4])
    texts = "\n\n".join(f"Paragraph {n}: {paragraph['context']}" for n, paragraph in enumerate(paragraphs, 1))
    turn = Turn(RETRIEVAL_QUESTION.format(abstract=abstract), (f"Paragraph {right + 1}",))
    return Draft(RETRIEVAL_HEAD.format(count=len(paragraphs)) + texts, (turn,), {"like": "passage_retrieval_en"})


def build_count(request: Request) -> Draft:
    """How many different paragraphs there are among repeated ones."""
    rng = request.rng
    unique = _paragraphs(rng, request.sources.squad("squad.json"), max(1, round(request.size * rng.uniform(0.4, 1))))
    listed = unique + rng.choices(unique, k=max(0, request.size - len(unique)))
    rng.shuffle(listed)
    texts = "\n\n".join(f"Paragraph {n}: {paragraph['context']}" for n, paragraph in enumerate(listed, 1))
    return Draft(COUNT_HEAD + texts, (Turn(COUNT_QUESTION, (str(len(unique)),)),), {"like": "passage_count"})


def build_code(request: Request) -> Draft:
    """The next line of a source file; files that are too short follow one another."""
    rng = request.rng
    files = [text for text in request.sources.code() if text.count("\n") > 40]
    lines: list[str] = []
    for text in rng.sample(files, len(files)):
        lines = [*text.splitlines(), *lines]
        if len(lines) > request.size + 10:
            break
    last = max((n for n, line in enumerate(lines) if is_statement(line)), default=len(lines) - 1)
    start = max(0, last - request.size)
    near = max(start, last - 8)
    document = CODE_HEAD + "".join(line + "\n" for line in lines[start:near])
    question = CODE_QUESTION.format(input="".join(line + "\n" for line in lines[near:last]))
    return Draft(document, (Turn(question, (lines[last],)),), {"like": "lcc"})


def is_statement(line: str) -> bool:
    """Whether a line of code is long enough to be worth predicting and is no comment."""
    return len(line.strip()) > 10 and "#" not in line and "`" not in line and "//" not in line


TASKS = [
    Task("lb_single_doc_qa", "qa", "qa_f1", 64, build_single_doc_qa),
    Task("lb_multi_doc_qa", "qa", "qa_f1", 32, build_multi_doc_qa),
    Task("lb_summary", "summary", "rouge_l", 128, build_summary, stop=("\n",), is_chat=False, max_size=999),
    Task("lb_few_shot", "classification", "classification", 64, build_few_shot, stop=("\n",), is_chat=False),
    Task("lb_retrieval", "retrieval", "retrieval", 32, build_retrieval),
    Task("lb_count", "counting", "count", 32, build_count),
    Task("lb_code", "code", "code_similarity", 64, build_code, is_chat=False),
]

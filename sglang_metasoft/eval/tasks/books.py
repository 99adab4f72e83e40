"""Perplexity of a book's next tokens over its compressed beginning, as on PG19 (arXiv 1911.05507)."""

from sglang_metasoft.eval.case import Draft, Request, Task, Turn
from sglang_metasoft.eval.metrics import PERPLEXITY

SCORED_WORDS = 190  # about 256 tokens


def build(request: Request) -> Draft:
    """A passage of a novel, cut in two: what is compressed and what is scored."""
    book = ("austen.txt", "moby_dick.txt")[request.index % 2]
    text = request.sources.text(book)
    words = 20 * request.size
    # One start for all sizes, far enough from the end for the longest.
    start = text.index(" ", request.rng.randrange(len(text) - 8 * (8192 + SCORED_WORDS)))
    pieces = text[start : start + 12 * (words + SCORED_WORDS)].split(" ")
    document = " ".join(pieces[:words])
    following = " " + " ".join(pieces[words : words + SCORED_WORDS])
    return Draft(document, (Turn(following, ()),), {"book": book})


TASKS = [Task("book_perplexity", "language", PERPLEXITY, 0, build, is_chat=False)]

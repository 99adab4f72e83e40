"""Training text from disk, and the check that it shares nothing with held-out text."""

import gzip
import json
import random
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from sglang_metasoft.config import shown

NGRAM_WORDS = 13
TEXT_SUFFIXES = (".txt", ".md", ".rst", ".txt.gz", ".md.gz")
MIN_TEXT_CHARS = 400
Chat = list[dict]


def read_corpus(path: Path) -> tuple[list[str], list[Chat]]:
    """Texts and chats of a folder, searched through, or of one JSONL file.

    JSONL rows are objects with ``text``, or with ``messages`` (a list of ``role`` and ``content``), whose last user
    message is the question.

    Raises:
        ValueError: nothing there, or a row that is neither.
    """
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    texts: list[str] = []
    chats: list[Chat] = []
    for file in files:
        try:
            if file.name.endswith(".jsonl"):
                for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
                    _add_row(line, f"{file}:{number}", texts, chats)
            elif file.name.endswith(TEXT_SUFFIXES):
                data = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
                texts.append(data.decode("utf-8", errors="replace"))
        except (OSError, UnicodeDecodeError, EOFError) as error:
            raise ValueError(f"training data: {file} cannot be read: {error}") from None
    texts = [text for text in texts if len(text) >= MIN_TEXT_CHARS]
    if not texts and not chats:
        raise ValueError(
            f"training data: {str(path)!r} holds no text of {MIN_TEXT_CHARS} characters and no chat; allowed: a folder "
            f"of {', '.join(TEXT_SUFFIXES)} or .jsonl files, or one .jsonl file"
        )
    return texts, chats


def read_held_out(path: Path) -> Iterator[str]:
    """Every file of a folder, or one file, as it is, whatever its format; gzip is unpacked.

    Raises:
        ValueError: it is not there, or cannot be read.
    """
    try:
        for file in sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]:
            data = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
            yield data.decode("utf-8", errors="replace")
    except (OSError, EOFError) as error:
        raise ValueError(f"held-out text: {str(path)!r} cannot be read: {error}") from None


def _add_row(line: str, where: str, texts: list[str], chats: list[Chat]) -> None:
    if not line.strip():
        return
    try:
        row = json.loads(line)
        if isinstance(row.get("text"), str):
            texts.append(row["text"])
            return
        messages = [{"role": str(m["role"]), "content": str(m["content"])} for m in row["messages"]]
        if not any(message["role"] == "user" for message in messages):
            raise KeyError("a user message")
        chats.append(messages)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"training data: {where}: {shown(line)} ({error!r}); allowed: an object with text, or with messages"
        ) from None


def ngrams(text: str, words: int = NGRAM_WORDS) -> set[int]:
    """Hashes of all runs of ``words`` lower-cased words."""
    tokens = re.findall(r"\w+", text.lower())
    return {hash(tuple(tokens[n : n + words])) for n in range(len(tokens) - words + 1)}


class HeldOut:
    """Text that training must not see.

    Args:
        texts: the held-out texts.
        words: a run of this many words in common is an overlap.
    """

    def __init__(self, texts: Iterable[str] = (), words: int = NGRAM_WORDS) -> None:
        self.words = words
        self.known: set[int] = set()
        for text in texts:
            self.known |= ngrams(text, words)

    def overlaps(self, text: str) -> bool:
        """Whether ``text`` shares a run of words with any held-out text."""
        return bool(self.known) and not self.known.isdisjoint(ngrams(text, self.words))


def passage(rng: random.Random, texts: list[str], chars: int) -> str:
    """A run of about ``chars`` characters from a random text, white space evened out."""
    text = rng.choice(texts)
    begin = rng.randrange(max(1, len(text) - chars))
    begin = text.find(" ", begin) + 1 if begin else 0
    return re.sub(r"[ \t]+", " ", re.sub(r"\n{3,}", "\n\n", text[begin : begin + chars])).strip()

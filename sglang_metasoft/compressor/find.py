"""Which compressor belongs to a model: one that was fitted on this machine, else one that ships.

No name counts. Cheap, before any weights are loaded: the configuration has the model's shape. Then: the file's
``embedding_check`` are rows of the model's embedding table.
"""

import hashlib
import json
import logging
import os
import stat
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError

from sglang_metasoft.compressor import files
from sglang_metasoft.compressor.report import Report, read_report
from sglang_metasoft.types import Embed, ModelShape

logger = logging.getLogger(__name__)

GIVEN, FITTED, SHIPPED = "given", "fitted", "shipped"


class Compressor(NamedTuple):
    """Files that fit a model, as far as is known."""

    path: str
    origin: str  # given, fitted, shipped
    method: str  # that it was trained for
    soft_tokens: int
    report: Report | None

    @classmethod
    def of(cls, path: str, origin: str, config: dict) -> "Compressor":
        """From a checked configuration."""
        return cls(path, origin, files.method_of(config), config["sizes"]["count"], read_report(config))

    @property
    def description(self) -> str:
        """For logs and ``doctor``: from where it is, and what it kept."""
        summary = f"; {self.report.summary}" if self.report else ""
        return f"{self.origin} compressor {self.path} for {self.method}, {self.soft_tokens} soft tokens{summary}"


def cache_folder() -> Path:
    """Where fitted compressors lie, a folder each: ``$XDG_CACHE_HOME/sglang-metasoft/compressors``."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    root = base if os.path.isabs(base) else os.path.expanduser("~/.cache")  # the standard has relative ones ignored
    return Path(root, "sglang-metasoft", "compressors")


def given_compressor(path: str, shape: ModelShape, method: str | None = None) -> Compressor:
    """The one at a path, as ``--metasoft-path`` takes it.

    Args:
        method: what it has to be trained for; None: any.

    Raises:
        ValueError: nothing usable is there, or it is of another model or method.
    """
    return Compressor.of(path, GIVEN, files.check_compressor(path, shape, method=method))


def candidates(shape: ModelShape, method: str | None = None) -> list[Compressor]:
    """Those of the model's shape, best first: fitted ones, of several the newest, then shipped ones.

    Reads configurations and headers alone. What cannot be used in the cache is passed over with a warning.

    Args:
        method: what they have to be trained for; None: any.
    """
    found = [(folder, FITTED) for folder in _cached_folders()]
    if files.SHIPPED.is_dir():
        found += [(folder, SHIPPED) for folder in sorted(files.SHIPPED.iterdir()) if folder.is_dir()]
    compressors = []
    for folder, origin in found:
        try:
            config = files.check_compressor(str(folder), shape, folder, method)
        except files.OtherModel:
            continue
        except (OSError, ValueError) as error:
            _pass_over(error)
        else:
            compressors.append(Compressor.of(str(folder), origin, config))
    return compressors


def find_compressors(
    shape: ModelShape, embed: Embed, device: torch.device, method: str | None = None
) -> list[Compressor]:
    """Those of :func:`candidates` that were made for this very model and can be loaded.

    Args:
        embed: ids to embeddings, called once, whatever is found: on every rank at the same time.
        device: of the ids.
        method: as for :func:`candidates`.
    """
    rows = files.check_rows(shape, embed, device)
    found = []
    for compressor in candidates(shape, method):
        try:
            weights = files.read_weights(Path(compressor.path, files.WEIGHTS_NAME))
        except (SafetensorError, OSError, RuntimeError, ValueError) as error:
            _pass_over(f"{compressor.path}: {files.WEIGHTS_NAME} cannot be read: {error}")
            continue
        if files.smallest_cosine(rows, weights["embedding_check"]) >= files.CHECK_COSINE:
            found.append(compressor)
    return found


def check_given(compressor: Compressor, shape: ModelShape, embed: Embed, device: torch.device) -> None:
    """Raise ValueError unless the weights of a given compressor are sound and made for this very model."""
    folder = files.resolve_folder(compressor.path)
    config = json.loads((folder / files.CONFIG_NAME).read_text())
    try:
        weights = files.read_weights(folder / files.WEIGHTS_NAME)
    except (SafetensorError, OSError, RuntimeError, ValueError) as error:
        raise ValueError(f"metasoft path: {compressor.path!r}: {files.WEIGHTS_NAME} cannot be read: {error}") from None
    files.check_embedding(compressor.path, config, weights["embedding_check"], shape, embed, device)


def fingerprint(compressor: Compressor) -> str:
    """Digest of what a compressor computes with: equal ones on several machines give equal results."""
    folder = files.resolve_folder(compressor.path)
    sizes = json.loads((folder / files.CONFIG_NAME).read_text())["sizes"]
    digest = hashlib.sha256(json.dumps([compressor.method, sizes], sort_keys=True).encode())
    digest.update((folder / files.WEIGHTS_NAME).read_bytes())
    return digest.hexdigest()[:16]


def _cached_folders() -> list[Path]:
    """Folders of the cache that nobody else could have written, newest first; a draft's name starts with a dot."""
    cache, dated = cache_folder(), []
    try:
        folders = [folder for folder in cache.iterdir() if not folder.name.startswith(".")]
        if why := _untrusted(cache.parent) or _untrusted(cache):
            _pass_over(why)
            return []
    except FileNotFoundError:
        return []
    except OSError as error:
        _pass_over(f"the cache of compressors cannot be read: {error}")
        return []
    for folder in folders:
        try:
            if not stat.S_ISDIR(os.stat(folder).st_mode):
                continue
            weights = folder / files.WEIGHTS_NAME
            parts = [folder, folder / files.CONFIG_NAME, weights]
            if why := next(filter(None, map(_untrusted, parts)), None):
                _pass_over(why)
            else:
                dated.append((os.stat(weights).st_mtime_ns, folder.name, folder))
        except OSError as error:
            _pass_over(error)
    return [folder for _, _, folder in sorted(dated, reverse=True)]


def _untrusted(path: Path) -> str | None:
    """Why what lies here may be somebody else's; root could change it anyway."""
    found = os.stat(path)
    if found.st_uid not in (os.geteuid(), 0):
        return f"{path} belongs to user {found.st_uid}; allowed: this user, {os.geteuid()}, or root"
    if found.st_mode & stat.S_IWOTH:
        return f"{path} may be written by every user (mode {stat.S_IMODE(found.st_mode):o}); allowed: chmod o-w"
    return None


def _pass_over(why: object) -> None:
    logger.warning("MetaSoft: passed over in the search for a compressor: %s", why)

"""``--metasoft-fit``: where no compressor is found for a model, one is fitted before the server starts.

The fit runs in a process of its own, so that all its memory is free again when the model is loaded.
"""

import logging
import subprocess
import sys

import torch

from sglang_metasoft.compressor.find import Compressor
from sglang_metasoft.config import AUTO, MetaSoftConfig, shown
from sglang_metasoft.hf.rows import embed_from_files
from sglang_metasoft.methods import auto
from sglang_metasoft.types import ModelShape

logger = logging.getLogger(__name__)

FITTED_METHOD = "metasoft"  # what ``sglang-metasoft fit`` trains for
MOST_MINUTES = 60.0  # a start that takes longer is refused


def check(config: MetaSoftConfig, nodes: int) -> None:
    """Refuse ``--metasoft-fit`` where its compressor could not be served.

    Args:
        nodes: of the server.

    Raises:
        ValueError: one sentence with the setting and what is allowed.
    """
    if not config.fit:
        return
    if config.path is not None:
        raise ValueError(f"metasoft fit: there is a path, {shown(config.path)}; allowed: one of the two")
    if config.method not in (AUTO, FITTED_METHOD):
        raise ValueError(
            f"metasoft fit: nothing is fitted for method {config.method}; allowed: {AUTO}, {FITTED_METHOD}"
        )
    if nodes > 1:
        raise ValueError(
            f"metasoft fit: {nodes} nodes would each need its files; allowed: one node. Run `sglang-metasoft fit` once "
            "and give its folder to every node with --metasoft-path"
        )


def fit_if_missing(config: MetaSoftConfig, shape: ModelShape, model_path: str) -> None:
    """Fit a compressor unless one is there; its progress goes to the server's own output.

    Args:
        model_path: folder or hub id of the model that is served.

    Raises:
        ValueError: none was made; the reason stands above it in the output.
    """
    if not config.fit:
        return
    if (found := _found(config, shape, model_path)) is not None:
        logger.info("MetaSoft: nothing is fitted, there is a %s", found.description)
        return
    logger.info("MetaSoft: no compressor for %s yet; one is fitted now", shown(model_path))
    command = [
        sys.executable, "-m", "sglang_metasoft.cli", "fit", model_path, "--minutes", f"{config.fit_minutes:g}",
        "--most-minutes", f"{MOST_MINUTES:g}", "--if-missing",
    ]  # fmt: skip
    status = subprocess.run(command).returncode
    if status != 0:
        raise ValueError(
            f"metasoft fit: no compressor was made (exit status {status}), for the reason above; allowed: a model that "
            "can be fitted here, or no --metasoft-fit, which serves a method that needs no training"
        )


def _found(config: MetaSoftConfig, shape: ModelShape, model_path: str) -> Compressor | None:
    """None also where the model's files do not tell; the fit itself looks again, with the weights."""
    embed = embed_from_files(model_path, shape)
    return None if embed is None else auto.find(config, shape, embed, torch.device("cpu"))

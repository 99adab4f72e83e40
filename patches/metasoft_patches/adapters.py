"""Chooses the adapter of the installed SGLang."""

import functools
import importlib

from sglang_metasoft import compat
from sglang_metasoft.adapter import Adapter


@functools.cache
def load_adapter() -> Adapter:
    """The installed version's adapter, from ``sglang_<version>/``.

    Raises:
        ValueError: the version is not supported; names those that are.
    """
    installed = compat.check_sglang_version()
    return importlib.import_module(f"metasoft_patches.{folder_of(installed)}.adapter").SGLangAdapter()


def folder_of(version: str) -> str:
    """The package that holds a version's adapter."""
    return f"sglang_{version.replace('.', '_')}"

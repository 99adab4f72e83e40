"""The methods: each decides what probes the prompt and turns the probe's attention into importance.

A method is one short file; name it in :data:`sglang_metasoft.config.METHODS` and ``--metasoft-method`` takes it.
"""

import importlib

from sglang_metasoft.config import METHODS
from sglang_metasoft.methods.base import Method


def load_method(name: str) -> type[Method]:
    """The class of a method.

    Raises:
        ValueError: no method has this name; the message lists those that exist.
    """
    if name not in METHODS:
        raise ValueError(f"metasoft method: {name!r} is not allowed; allowed: one of: {', '.join(METHODS)}")
    module, attribute = METHODS[name].split(":")
    return getattr(importlib.import_module(module), attribute)

"""The consolidations: each decides what becomes of the entries that are dropped.

A consolidation is one short file; name it in :data:`sglang_metasoft.config.CONSOLIDATIONS` and ``--metasoft-config``
takes it.
"""

import importlib

from sglang_metasoft.config import CONSOLIDATIONS
from sglang_metasoft.consolidations.base import Consolidation


def load_consolidation(name: str) -> type[Consolidation]:
    """The class of a consolidation.

    Raises:
        ValueError: there is none of this name; the message lists those that exist.
    """
    if name not in CONSOLIDATIONS:
        raise ValueError(
            f"metasoft consolidation: {name!r} is not allowed; allowed: one of: {', '.join(CONSOLIDATIONS)}"
        )
    module, attribute = CONSOLIDATIONS[name].split(":")
    return getattr(importlib.import_module(module), attribute)

"""Prompt -> Probe: the method's probe tokens, and what the consolidation needs to know of the prompt."""

from sglang_metasoft.consolidations import Consolidation
from sglang_metasoft.methods.base import Method
from sglang_metasoft.types import Probe, Prompt


def make_probe(method: Method, prompt: Prompt, consolidation: Consolidation | None = None) -> Probe:
    """The method's probe, extended by the consolidation.

    Args:
        consolidation: as prepared for the LoRA adapter that the prompt runs under; None: the method's, for the model.
    """
    return (consolidation or method.consolidation).extend_probe(method.probe(prompt), prompt, method.embed)

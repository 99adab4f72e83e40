"""Prompt -> Probe: the method's probe tokens, and what the consolidation needs to know of the prompt."""

from sglang_metasoft.config import MetaSoftConfig
from sglang_metasoft.consolidations.key_directions import KeyDirections
from sglang_metasoft.consolidations.repeats import find_repeats
from sglang_metasoft.consolidations.reread import with_reread
from sglang_metasoft.merge import load_consolidation
from sglang_metasoft.methods.base import Method
from sglang_metasoft.types import Carrying, Probe, Prompt


def make_probe(
    method: Method, prompt: Prompt, config: MetaSoftConfig, directions: KeyDirections | None = None
) -> Probe:
    """The method's probe; behind it what is read again, if the consolidation refits; with it the prompt's repeats and
    the place for a bias, if the consolidation biases keys.

    Args:
        directions: for that bias; None: those of the base model, which the method was prepared with.
    """
    consolidation = load_consolidation(config.consolidation or method.default_consolidation)
    probe = method.probe(prompt)
    if consolidation.refits:
        probe = with_reread(probe, prompt, method.embed, config.reread_tokens)
    if consolidation.biases_keys:
        directions = directions or method.key_directions
        if directions is None:
            raise ValueError("a method has to be prepared for a consolidation that biases keys")
        carrying = Carrying(find_repeats(prompt.span_ids), directions.at(prompt.context_tokens))
        probe = probe._replace(carrying=carrying)
    return probe

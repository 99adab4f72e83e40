"""Which part of a prompt is compressed, and to how many entries: lengths in, a :class:`Plan` out."""

import math

from sglang_metasoft.config import NO_COMPRESSION, MetaSoftConfig
from sglang_metasoft.types import Bypass, Plan

MIN_KEPT_SLOTS = 16


def plan_span(
    config: MetaSoftConfig,
    *,
    prompt_tokens: int,
    page_size: int,
    chain_tokens: int = 0,
    chain_slots: int = 0,
    options: dict | None = None,
) -> Plan | Bypass:
    """Plan the next compressed span of a prompt.

    The span runs from the end of the already compressed chain to the raw window, floored to a page. The kept
    entries of the whole prompt, window included, are ``ceil(prompt_tokens / ratio)`` or the budget, whichever
    is set; the span gets what window and chain leave, rounded up to a page.

    Args:
        prompt_tokens: logical tokens of the prompt whose KV is, or will be, present.
        page_size: slots of a pool page.
        chain_tokens: logical tokens that earlier segments stand for.
        chain_slots: entries that earlier segments hold.
        options: per-request overrides of ``ratio`` or ``budget``.

    Returns:
        The plan, or why there is none.
    """
    options = options or {}
    if NO_COMPRESSION in options.values():
        return Bypass.OPTED_OUT
    ratio, budget = config.ratio, config.budget
    if "ratio" in options:
        ratio, budget = options["ratio"], None
    elif "budget" in options:
        budget = options["budget"]

    end = (prompt_tokens - config.window) // page_size * page_size
    span = (end - chain_tokens) // page_size * page_size
    if span < config.min_tokens:
        return Bypass.TOO_SHORT
    tail = prompt_tokens - chain_tokens - span
    wanted = budget if budget is not None else math.ceil(prompt_tokens / ratio)
    sink = config.sink if chain_slots == 0 else 0
    kept = max(wanted - tail - chain_slots, sink + 1, MIN_KEPT_SLOTS)
    kept = -(-kept // page_size) * page_size
    if kept >= span:
        if budget is None and ratio == NO_COMPRESSION:
            kept = span  # the whole path runs and keeps everything
        else:
            return Bypass.NOTHING_TO_DROP
    return Plan(start_slots=chain_slots, span_tokens=span, kept_slots=kept, sink_tokens=min(sink, kept))

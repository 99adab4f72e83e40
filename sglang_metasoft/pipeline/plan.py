"""Which part of a prompt is compressed, and to how many entries: lengths in, a :class:`Plan` out."""

import math
from typing import NamedTuple

from sglang_metasoft.config import NO_COMPRESSION, MetaSoftConfig
from sglang_metasoft.types import Bypass, Plan

MIN_KEPT_SLOTS = 16


def plan_span(
    config: MetaSoftConfig,
    *,
    prompt_tokens: int,
    page_size: int,
    whole_tokens: int | None = None,
    compressed_tokens: int = 0,
    compressed_slots: int = 0,
    reused_tokens: int = 0,
    reused_slots: int = 0,
    boundary_tokens: int | None = None,
    end_limit_tokens: int | None = None,
    sliding_window_tokens: int | None = None,
    options: dict | None = None,
) -> Plan | Bypass:
    """Plan the next compressed span of a prompt.

    The span runs from the end of the already compressed prefix to the boundary, if one lies ahead and far enough, else
    to the raw window; both floored to a page. It keeps entries, rounded up to a page:

    - by a ratio, so that everything up to the boundary holds ``ceil(boundary_tokens / ratio)``, and the whole prompt,
      window included, ``ceil(prompt_tokens / ratio)``: what prefix and window leave of that;
    - by a budget, the same share of all tokens up to its end, so that a prompt compressed anew, in however many spans,
      holds the budget, window included. A reused prefix stays what it is, and what follows it gets its share: where the
      prefix was made for a shorter prompt, this one holds more than the budget.

    Layers of a sliding window keep the last entries of every span, and what follows a span must find a whole window of
    them: nothing less is kept, whatever the ratio or the budget. So a span is at least twice as long, unless all of it
    is kept; and in the midst of a prefill it waits for the chunks that let the ratio have its way.

    Args:
        prompt_tokens: logical tokens of the prompt whose KV is, or will be, present.
        page_size: slots of a pool page.
        whole_tokens: those of the whole prompt, if only its first ``prompt_tokens`` are meant.
        compressed_tokens: logical tokens that earlier segments stand for.
        compressed_slots: entries that earlier segments hold.
        reused_tokens: of the prefix's, those that were compressed for an earlier prompt; reused_slots: their entries.
        boundary_tokens: where other prompts are known, or expected, to leave this one.
        end_limit_tokens: logical tokens that no span may pass, whatever the boundary.
        sliding_window_tokens: the longest window of the model's layers; None: every layer sees all tokens.
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

    # A token sees itself and what its window has before it.
    window_slots = max((sliding_window_tokens or 0) - 1, 0)
    least_span = config.min_tokens
    if budget is not None or ratio != NO_COMPRESSION:
        least_span = max(least_span, 2 * window_slots)
    limit = max(prompt_tokens, boundary_tokens or 0) if end_limit_tokens is None else end_limit_tokens
    end = min(prompt_tokens - config.window, limit) // page_size * page_size
    boundary = min(boundary_tokens or 0, limit) // page_size * page_size
    ends_at_boundary = False
    if boundary - compressed_tokens >= least_span:
        ends_at_boundary = boundary <= prompt_tokens
        if ends_at_boundary:
            end = boundary
        elif boundary - end < least_span:
            return Bypass.TOO_SHORT  # what would be left before the boundary; the next chunk completes it
    span = (end - compressed_tokens) // page_size * page_size
    if span < least_span:
        return Bypass.TOO_SHORT if span < config.min_tokens else Bypass.SLIDING_WINDOW
    end = compressed_tokens + span
    if budget is not None:
        # What stays raw in the end: all after the last span, which is this one unless another is long enough.
        whole = prompt_tokens if whole_tokens is None else whole_tokens
        last_end = whole - config.window if end_limit_tokens is None else min(whole - config.window, end_limit_tokens)
        last_end = last_end // page_size * page_size
        if end <= boundary <= whole and last_end - boundary < least_span:
            last_end = boundary
        raw = whole - (last_end if last_end - end >= least_span else end)
        own_slots = compressed_slots - reused_slots
        wanted = -(-(end - reused_tokens) * (budget - raw) // (whole - raw)) - own_slots
    else:
        tail = 0 if ends_at_boundary else prompt_tokens - end
        wanted = math.ceil((end if ends_at_boundary else prompt_tokens) / ratio) - tail - compressed_slots
    sink = config.sink if compressed_slots == 0 else 0
    is_part = not ends_at_boundary and whole_tokens is not None and prompt_tokens < whole_tokens
    if window_slots and is_part and wanted < window_slots:
        return Bypass.SLIDING_WINDOW  # the next chunk may be enough
    kept = max(wanted, sink + 1, MIN_KEPT_SLOTS, window_slots)
    kept = -(-kept // page_size) * page_size
    if kept >= span:
        if budget is None and ratio == NO_COMPRESSION:
            kept = span  # the whole path runs and keeps everything
        else:
            return Bypass.NOTHING_TO_DROP
    return Plan(
        start_slots=compressed_slots,
        span_tokens=span,
        kept_slots=kept,
        sink_tokens=min(sink, kept),
        ends_at_boundary=ends_at_boundary,
    )


class Footprint(NamedTuple):
    """Slots that a prompt holds when it is compressed chunk by chunk."""

    peak_slots: int  # at most at one time, entries being written included
    final_slots: int  # when it starts to decode


def chunked_footprint(
    config: MetaSoftConfig,
    *,
    prompt_tokens: int,
    chunk_tokens: int,
    compressed_tokens: int = 0,
    compressed_slots: int = 0,
    raw_tokens: int = 0,
    **plan,
) -> Footprint:
    """What a prompt holds if it is prefilled in chunks and each chunk is compressed at once.

    Args:
        chunk_tokens: tokens of a prefill chunk.
        raw_tokens: tokens after the prefix whose raw entries exist already; the first chunk follows them.
        plan: further arguments of :func:`plan_span`.
    """
    peak = compressed_slots
    computed = compressed_tokens + raw_tokens
    while computed < prompt_tokens:
        computed = min(computed + chunk_tokens, prompt_tokens)
        raw = computed - compressed_tokens
        peak = max(peak, compressed_slots + raw)
        while isinstance(
            span := plan_span(
                config,
                prompt_tokens=computed,
                whole_tokens=prompt_tokens,
                compressed_tokens=compressed_tokens,
                compressed_slots=compressed_slots,
                **plan,
            ),
            Plan,
        ):
            peak = max(peak, compressed_slots + computed - compressed_tokens + span.kept_slots)
            compressed_tokens += span.span_tokens
            compressed_slots += span.kept_slots
    return Footprint(peak, compressed_slots + prompt_tokens - compressed_tokens)

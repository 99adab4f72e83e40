"""How many prompts fit into a KV pool, with and without compression: lengths in, counts out."""

import dataclasses
from typing import Any, NamedTuple

from sglang_metasoft.config import MetaSoftConfig
from sglang_metasoft.pipeline.plan import chunked_footprint, plan_span
from sglang_metasoft.types import Plan


class Fit(NamedTuple):
    """Requests of one kind that decode at the same time."""

    ratio: float
    prompt_entries: int  # what a prompt holds while it decodes, per layer and head
    requests: int
    requests_during_prefill: int  # with ``--metasoft-during-prefill``
    bypass: str | None  # why such a prompt is not compressed


def fit_raw(pool_tokens: int, prompt_tokens: int, output_tokens: int) -> int:
    """Requests that plain SGLang holds."""
    return pool_tokens // (prompt_tokens + output_tokens)


def fit_compressed(
    config: MetaSoftConfig,
    ratio: float,
    *,
    pool_tokens: int,
    prompt_tokens: int,
    output_tokens: int,
    chunk_tokens: int,
    page_size: int = 1,
    sliding_window_tokens: int | None = None,
) -> Fit:
    """Requests that fit when each prompt is compressed.

    The last one to come in needs room for its raw prompt, its consolidated entries and its output side by side; with
    ``during_prefill`` for the larger of the peak while its chunks are compressed and what it decodes with.

    Args:
        ratio: replaces the one in ``config``.
        chunk_tokens: tokens of a prefill chunk.
        sliding_window_tokens: as :func:`sglang_metasoft.pipeline.plan.plan_span` takes them.
    """
    config = dataclasses.replace(config, ratio=ratio, budget=None)
    common: dict[str, Any] = dict(
        prompt_tokens=prompt_tokens, page_size=page_size, sliding_window_tokens=sliding_window_tokens
    )
    plan = plan_span(config, **common)
    if not isinstance(plan, Plan):
        count = fit_raw(pool_tokens, prompt_tokens, output_tokens)
        return Fit(ratio, prompt_tokens, count, count, plan.value)
    held = prompt_tokens - plan.saved_slots
    arriving = prompt_tokens + plan.kept_slots + output_tokens
    chunked = chunked_footprint(config, chunk_tokens=chunk_tokens, **common)
    chunked_held = chunked.final_slots + output_tokens
    return Fit(
        ratio=ratio,
        prompt_entries=held,
        requests=_count(pool_tokens, held + output_tokens, arriving),
        requests_during_prefill=_count(pool_tokens, chunked_held, max(chunked.peak_slots, chunked_held)),
        bypass=None,
    )


def _count(pool: int, held: int, arriving: int) -> int:
    """How many hold ``held`` each if the last one to come in needs ``arriving``."""
    return (pool - arriving) // held + 1 if arriving <= pool else 0

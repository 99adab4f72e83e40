"""Device memory that the fused stages of a compression take beside the pool: lengths in, bytes out.

What a layer needs is bounded whatever the prompts: beyond the bound its KV heads go through the stages a few at a time,
and where one head is too much, the prompts of a batch do. What has to be listed of each token grows with the prompts.
"""

from collections.abc import Callable, Sequence

from metasoft_kernels.probe.fused import scratch_bytes

WORKSPACE_BYTES = 64 * 2**20  # of a layer's stages, for all prompts that are compressed together
ENTRY_BYTES = 13  # of an entry of the spans and a KV head: attention, logs and rank in float32, and whether it stays
KEPT_BYTES = 12  # of a kept entry and a KV head: which it is, its bias, and that once more where heads are joined
LIST_BYTES = 128  # of a token: slots, ids and groups of repeats, while these are sorted, once for all layers


def heads_at_once(groups: int, span_tokens: int, kept_slots: int) -> int:
    """KV heads that go through the stages side by side, at least one.

    Args:
        groups: KV heads of this rank.
        span_tokens, kept_slots: entries before and after, of all prompts that are compressed together.
    """
    left = WORKSPACE_BYTES - KEPT_BYTES * groups * kept_slots
    return min(groups, max(1, left // (ENTRY_BYTES * span_tokens)))


def layer_bytes(groups: int, span_tokens: int, kept_slots: int) -> int:
    """What the stages after the probe take, with as many KV heads side by side as the bound allows."""
    heads = heads_at_once(groups, span_tokens, kept_slots)
    return KEPT_BYTES * groups * kept_slots + ENTRY_BYTES * heads * span_tokens


def batch_bytes(
    probes: Sequence[int], contexts: Sequence[int], lengths: Sequence[tuple[int, int]], heads: int, groups: int, d: int
) -> int:
    """The least that a layer of these prompts takes at a time: its probe, or its stages with one KV head at a time.

    Args:
        probes, contexts: of each prompt its probe's tokens, and the entries that they see.
        lengths: of each prompt its span's tokens and the entries that they become.
        heads: query heads of this rank, of size ``d``; groups: its KV heads.
    """
    kept = KEPT_BYTES * groups * sum(kept for _, kept in lengths)
    stages = kept + ENTRY_BYTES * sum(span for span, _ in lengths)
    return max(stages, scratch_bytes(probes, contexts, heads, groups, d))


def prompts_together(count: int, bytes_of: Callable[[slice], int]) -> list[slice]:
    """Which of ``count`` prompts are compressed together: in turn, as many as fit, at least one.

    Args:
        bytes_of: what some of them take.
    """
    parts, first = [], 0
    for number in range(1, count):
        if bytes_of(slice(first, number + 1)) > WORKSPACE_BYTES:
            parts.append(slice(first, number))
            first = number
    return [*parts, slice(first, count)]

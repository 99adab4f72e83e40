"""The stages of one layer for all jobs of a batch: one launch per stage by fused kernels, or job by job.

Both give the same results, and :func:`make_batch` chooses once. Fused, K and V are read where they lie, and what is
written goes from pool to pool; everything about lengths is known, and on the device, before the first layer.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from metasoft_kernels.move.fused import move, move_biased
from metasoft_kernels.parts import Scored
from metasoft_kernels.probe.naive import first_seen
from metasoft_kernels.ragged import Ragged, ragged, rows_of_each
from metasoft_kernels.refine.fused import log_importance
from metasoft_kernels.route.fused import route
from metasoft_kernels.score.fused import importance as mean_attention
from metasoft_kernels.select.fused import mark_top, split_top

from sglang_metasoft.consolidations.base import KeyBiases, RankedBatch, RoutedBatch
from sglang_metasoft.methods.base import Method
from sglang_metasoft.pipeline.clock import Clock, no_clock
from sglang_metasoft.pipeline.layer import compress_layer
from sglang_metasoft.pipeline.memory import heads_at_once
from sglang_metasoft.types import Job, LayerPool, LayerView, MergedKV


class Merged(NamedTuple):
    """What one layer of all jobs becomes, job by job."""

    kept: list[torch.Tensor]  # of each job [G, B] int64, counted from the start of its span
    entries: MergedKV  # [sum B, G, d] each


class Consolidated(NamedTuple):
    """What one layer of all jobs becomes, as far as it is not in the pool already."""

    kept_rows: torch.Tensor  # [G, sum B] int32, entries along the axis of all spans
    values: torch.Tensor | None  # [sum B, G, d] merged values; None: those of the kept entries
    key_biases: KeyBiases | None  # what kept keys are to carry; None: nothing


def join_heads(parts: list[KeyBiases | None]) -> KeyBiases | None:
    """What some KV heads after others carry, as one."""
    biases = [part for part in parts if part is not None]
    if len(biases) < 2:
        return biases[0] if biases else None
    return KeyBiases(torch.cat([part.biases for part in biases]), torch.cat([part.directions for part in biases], 1))


def is_fused(method: Method) -> bool:
    """Whether every stage runs for a whole batch at once; what a method or a consolidation has of its own in torch."""
    consolidation = method.consolidation
    # Behind a probe that is read again not all tokens rank, which no fused score knows.
    return method.needs_probe and consolidation.is_fused and not consolidation.needs_queries


def make_batch(
    jobs: list[Job], method: Method, attend: Callable | None, first_kv_head: int = 0
) -> "FusedBatch | LoopedBatch":
    """The jobs whose prompts finish together.

    Args:
        attend: the probe's fused attention; None: every stage runs job by job, by the kernels that the setting names.
    """
    return (
        LoopedBatch(jobs, method, first_kv_head) if attend is None else FusedBatch(jobs, method, attend, first_kv_head)
    )


class LoopedBatch:
    """Every method and consolidation, job by job."""

    def __init__(self, jobs: list[Job], method: Method, first_kv_head: int = 0) -> None:
        self.jobs, self.method, self.first_kv_head = jobs, method, first_kv_head
        self.lengths = [job.probe.embeds.shape[0] for job in jobs]
        self.new_slots = torch.cat([job.new_slots for job in jobs])

    def compress(
        self,
        q: torch.Tensor,
        k_new: torch.Tensor,
        v_new: torch.Tensor,
        pool: LayerPool,
        gate_scale,
        layer: int,
        clock: Clock = no_clock,
    ) -> tuple[torch.Tensor, Merged, list[torch.Tensor]]:
        """As :meth:`FusedBatch.compress`."""
        q_of, k_of, v_of = (tensor.split(self.lengths) for tensor in (q, k_new, v_new))
        outs, routes, merged, finite = zip(
            *(
                compress_layer(job, *own, pool, self.method, gate_scale, layer, self.first_kv_head, clock)
                for job, own in zip(self.jobs, zip(q_of, k_of, v_of, strict=True), strict=True)
            ),
            strict=True,
        )
        entries = MergedKV(*(torch.cat(tensors) for tensors in zip(*merged, strict=True)))
        return torch.cat(outs), Merged([route.kept for route in routes], entries), list(finite)

    def kept_of_jobs(self, merged: Merged) -> list[torch.Tensor]:
        """Each job's ``[G, B]`` int64 kept entries, counted from the start of its span."""
        return merged.kept


class FusedBatch:
    """One launch per stage.

    Args:
        attend: as :func:`metasoft_kernels.probe.fused.attend`.
        first_kv_head: of this rank.
    """

    def __init__(self, jobs: list[Job], method: Method, attend: Callable, first_kv_head: int = 0) -> None:
        self.jobs, self.method, self.attend = jobs, method, attend
        self.first_kv_head = first_kv_head
        plans = [job.plan for job in jobs]
        self.device = jobs[0].span_slots.device
        self.probe, self.context, self.span, self.kept, self.dropped, sinks, modes = ragged(
            self.device,
            [job.probe.embeds.shape[0] for job in jobs],
            [job.context_slots.numel() for job in jobs],
            [plan.span_tokens for plan in plans],
            [plan.kept_slots for plan in plans],
            [plan.saved_slots for plan in plans],
            [plan.sink_tokens for plan in plans],
            [int(plan.ends_at_boundary) for plan in plans],
        )
        self.sink_tokens, self.modes = sinks.starts.diff(), modes.starts.diff()
        self.context_slots, self.span_slots, self.new_slots = (
            torch.cat(slots) if len(jobs) > 1 else slots[0]
            for slots in zip(*((job.context_slots, job.span_slots, job.new_slots) for job in jobs), strict=True)
        )
        self.targets = min(method.consolidation.targets, method.config.route_band, self.kept.longest)
        self.noted = method.consolidation.note_batch(jobs)
        self._windows: dict[int, tuple[torch.Tensor, Ragged]] = {}  # by their tokens: slots and axis of what is seen
        self._last_rows: torch.Tensor | None = None

    def compress(
        self,
        q: torch.Tensor,
        k_new: torch.Tensor,
        v_new: torch.Tensor,
        pool: LayerPool,
        gate_scale,
        layer: int,
        clock: Clock = no_clock,
    ) -> tuple[torch.Tensor, Consolidated, list[torch.Tensor]]:
        """Probe one layer and consolidate all spans; arguments as for ``compress_layer``, all jobs' rows in turn.

        Returns:
            ``[sum t, H, d]`` attention output, what is to be written, and for each job, on a CPU alone, whether
            everything was finite (elsewhere nobody could read it without waiting).
        """
        if q.stride()[1:] != (q.shape[2], 1):  # rows of a wider tensor are read where they lie
            q = q.contiguous()
        slots, context = self._seen_in(pool.window_tokens)
        with clock("probe"):
            out, lse = self.attend(
                q, pool.key, pool.value, slots, k_new, v_new, self.probe, context, pool.scale, pool.key_scale,
                pool.value_scale, pool.window_tokens,
            )  # fmt: skip
        if pool.window_tokens is not None:
            return out, Consolidated(self._keep_last(pool.key.shape[1]), None, None), self._all_sound()
        if self.method.consolidation.ranks_by_kernels:
            return out, *self._rank_by_kernels(q, pool, lse, layer, clock)
        with clock("score"):
            raw = self._score(q, pool, lse, layer)
            mass = raw.attention.nan_to_num(0.0, 0.0, 0.0)
            is_one = raw.importance is raw.attention
            scored = raw._replace(importance=mass) if is_one else raw
            importance = self.method.consolidation.rank_batch(scored, self.span, self.jobs, self.noted)
        with clock("route"):
            kept_rows, dropped_rows = split_top(importance, self.sink_tokens, self.span, self.kept, self.dropped)
            targets, weights = None, None
            if self.targets and self.dropped.total:
                targets, weights = route(
                    pool.key, self.span_slots, kept_rows, dropped_rows, self.kept, self.dropped, self.targets,
                    pool.scale * pool.key_scale**2, q.dtype, self.method.config.route_band,
                )  # fmt: skip
        with clock("merge"):
            routed = RoutedBatch(
                self.jobs, pool, layer, self.span_slots, self.span, self.kept, mass, kept_rows, dropped_rows, targets,
                weights, gate_scale, q.dtype,
            )  # fmt: skip
            merged = self.method.consolidation.merge_batch(routed)
        consolidated = Consolidated(kept_rows, merged.values, merged.key_biases)
        return out, consolidated, self._finite(raw, merged.is_finite)

    def _seen_in(self, window: int | None) -> tuple[torch.Tensor, Ragged]:
        """What the probes see in a layer, at the most: all entries, or the last of each prompt's."""
        if window is None:
            return self.context_slots, self.context
        if window not in self._windows:
            seen = [job.context_slots[first_seen(job.context_slots.numel(), window) :] for job in self.jobs]
            (axis,) = ragged(self.device, [slots.numel() for slots in seen])
            self._windows[window] = torch.cat(seen), axis
        return self._windows[window]

    def _keep_last(self, groups: int) -> torch.Tensor:
        """``[G, sum B]`` int32: in a layer of a window each span's last entries stay, whatever they are worth."""
        if self._last_rows is None:
            ends = zip(self.span.ranges(), self.kept.lengths, strict=True)
            rows = [
                torch.arange(own.stop - kept, own.stop, dtype=torch.int32, device=self.device) for own, kept in ends
            ]
            self._last_rows = torch.cat(rows).expand(groups, -1).contiguous()
        return self._last_rows

    def _all_sound(self) -> list[torch.Tensor]:
        return [torch.ones((), dtype=torch.bool) for _ in self.jobs] if self.device.type == "cpu" else []

    def _rank_by_kernels(
        self, q: torch.Tensor, pool: LayerPool, lse: torch.Tensor, layer: int, clock: Clock
    ) -> tuple[Consolidated, list[torch.Tensor]]:
        """What follows the probe where the consolidation ranks and merges by kernels of its own.

        As many KV heads at a time as the workspace holds; all of them where a method has a score of its own.
        """
        groups = pool.key.shape[1]
        heads = groups
        if self.method.scores_together or self.method.scores_by_attention or self.method.entry_scorer is not None:
            heads = heads_at_once(groups, self.span.total, self.kept.total)
        kept_rows = torch.empty(groups, self.kept.total, dtype=torch.int32, device=self.device)
        merged, finite = [], []
        for first in range(0, groups, heads):
            some = slice(first, min(first + heads, groups))
            part, flags = self._rank_heads(q, pool, lse, layer, some, kept_rows[some], clock)
            merged.append(part)
            finite.append(flags)
        flags = [torch.stack(each).all() for each in zip(*finite, strict=True)]
        return Consolidated(kept_rows, None, join_heads(merged)), flags

    def _rank_heads(
        self, q, pool: LayerPool, lse: torch.Tensor, layer: int, heads: slice, kept_rows: torch.Tensor, clock: Clock
    ) -> tuple[KeyBiases | None, list[torch.Tensor]]:
        """Some KV heads of a layer; ``kept_rows`` ``[heads, sum B]`` is filled."""
        consolidation = self.method.consolidation
        if heads.stop - heads.start < pool.key.shape[1]:
            r = q.shape[1] // pool.key.shape[1]
            queries = slice(heads.start * r, heads.stop * r)
            q, lse = q[:, queries], lse[:, queries].contiguous()
            pool = pool._replace(key=pool.key[:, heads], value=pool.value[:, heads])
        with clock("score"):
            scored = self._score(q, pool, lse, layer, heads.start)
            ranked = consolidation.rank_batch(scored, self.span, self.jobs, self.noted)
        with clock("route"):
            is_kept = mark_top(ranked, self.sink_tokens, self.span, self.kept, kept_rows)
        with clock("merge"):
            routed = RoutedBatch(
                self.jobs, pool, layer, self.span_slots, self.span, self.kept, None, kept_rows, None, None, None, 1.0,
                q.dtype, RankedBatch(self.noted, scored, is_kept, self.sink_tokens, ranked, heads),
            )  # fmt: skip
            merged = consolidation.merge_batch(routed)
        return merged.key_biases, self._finite(scored, merged.is_finite)

    def _score(self, q: torch.Tensor, pool: LayerPool, lse: torch.Tensor, layer: int, first_head: int = 0) -> Scored:
        """What the entries are worth; a method with a score of its own is asked job by job.

        Args:
            first_head: of this rank's KV heads the pool's first.
        """
        scorer, by_kernels = self.method.entry_scorer, self.method.consolidation.ranks_by_kernels
        together = self.method.scores_together
        if together or self.method.scores_by_attention or (scorer is not None and by_kernels):
            mass = mean_attention(
                q, pool.key, self.span_slots, lse, self.probe, self.span, pool.scale, pool.key_scale
            )  # fmt: skip
            if together:
                return self.method.score_together(mass, pool, self.span_slots, self.span)
            if scorer is None:
                return Scored(mass, mass)
            return log_importance(
                mass, pool.key, pool.value, self.span_slots, scorer.weights, self.modes, layer,
                self.first_kv_head + first_head, self.span, pool.key_scale, pool.value_scale,
            )  # fmt: skip
        parts = [
            self.method.score_layer(LayerView(job, pool, q[own], lse[own], layer, self.first_kv_head))
            for job, own in zip(self.jobs, self.probe.ranges(), strict=True)
        ]
        masses = torch.cat([part.importance if part.mass is None else part.mass for part in parts], dim=1)
        return Scored(masses, torch.cat([part.importance for part in parts], dim=1), may_be_negative=True)

    def _finite(self, scored: Scored, is_finite: torch.Tensor | None) -> list[torch.Tensor]:
        if self.device.type != "cpu":
            return []
        flags = [(scored.attention[:, own] + scored.importance[:, own]).isfinite().all() for own in self.span.ranges()]
        if is_finite is not None:
            flags = [flag & is_finite[:, own].all() for flag, own in zip(flags, self.kept.ranges(), strict=True)]
        return flags

    def write(self, pool: LayerPool, consolidated: Consolidated) -> None:
        """One layer's consolidated entries into the jobs' new slots, straight from pool to pool."""
        if consolidated.key_biases is None:
            move(
                pool.key, pool.value, self.span_slots, consolidated.kept_rows, self.new_slots, consolidated.values,
                pool.value_scale,
            )  # fmt: skip
            return
        move_biased(
            pool.key, pool.value, self.span_slots, consolidated.kept_rows, self.new_slots, *consolidated.key_biases,
            self.kept, pool.scale, pool.key_scale,
        )  # fmt: skip

    def kept_of_jobs(self, consolidated: Consolidated) -> list[torch.Tensor]:
        """Each job's ``[G, B]`` int64 kept entries, counted from the start of its span."""
        return rows_of_each(consolidated.kept_rows, self.kept, self.span)

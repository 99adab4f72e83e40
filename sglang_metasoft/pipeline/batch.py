"""The stages of one layer for all jobs of a batch: one launch per stage by fused kernels, or job by job.

Both give the same results, and :func:`make_batch` chooses once. Fused, K and V are read where they lie, and what is
written goes from pool to pool; everything about lengths is known, and on the device, before the first layer.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from metasoft_kernels.ragged import ragged, rows_of_each
from metasoft_kernels.route.fused import route
from metasoft_kernels.score.fused import importance as mean_attention
from metasoft_kernels.select.fused import split_top

from sglang_metasoft.consolidations.base import RoutedBatch
from sglang_metasoft.methods.base import Method
from sglang_metasoft.pipeline.clock import Clock, no_clock
from sglang_metasoft.pipeline.layer import compress_layer
from sglang_metasoft.types import Job, LayerPool, LayerView, MergedKV


class Merged(NamedTuple):
    """What one layer of all jobs becomes, job by job."""

    kept: list[torch.Tensor]  # of each job [G, B] int64, counted from the start of its span
    entries: MergedKV  # [sum B, G, d] each


class Consolidated(NamedTuple):
    """What one layer of all jobs becomes, as far as it is not in the pool already."""

    kept_rows: torch.Tensor  # [G, sum B] int32, entries along the axis of all spans
    values: torch.Tensor | None  # [sum B, G, d] merged values; None: those of the kept entries
    key_moves: torch.Tensor | None  # [sum B, G, d] float32, added to the kept keys; None: nothing


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
        self.probe, self.context, self.span, self.kept, self.dropped, sinks = ragged(
            self.device,
            [job.probe.embeds.shape[0] for job in jobs],
            [job.context_slots.numel() for job in jobs],
            [plan.span_tokens for plan in plans],
            [plan.kept_slots for plan in plans],
            [plan.saved_slots for plan in plans],
            [plan.sink_tokens for plan in plans],
        )
        self.sink_tokens = sinks.starts.diff()
        self.context_slots, self.span_slots, self.new_slots = (
            torch.cat(slots)
            for slots in zip(*((job.context_slots, job.span_slots, job.new_slots) for job in jobs), strict=True)
        )
        self.targets = min(method.consolidation.targets, method.config.route_band, self.kept.longest)

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
        q = q.contiguous()
        with clock("probe"):
            out, lse = self.attend(
                q, pool.key, pool.value, self.context_slots, k_new, v_new, self.probe, self.context, pool.scale,
                pool.key_scale, pool.value_scale,
            )  # fmt: skip
        with clock("score"):
            raw, raw_mass = self._score(q, pool, lse, layer)
            mass = raw_mass.nan_to_num(0.0, 0.0, 0.0)
            importance = self._rank(mass if raw is raw_mass else raw.nan_to_num(0.0, 0.0, 0.0))
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
        consolidated = Consolidated(kept_rows, merged.values, merged.key_moves)
        return out, consolidated, self._finite(raw, raw_mass, merged.is_finite)

    def _score(
        self, q: torch.Tensor, pool: LayerPool, lse: torch.Tensor, layer: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Importance and mass, ``[G, sum S]`` each; a method with a score of its own is asked job by job."""
        if self.method.scores_by_attention:
            mass = mean_attention(
                q, pool.key, self.span_slots, lse, self.probe, self.span, pool.scale, pool.key_scale
            )  # fmt: skip
            return mass, mass
        parts = [
            self.method.score_layer(LayerView(job, pool, q[own], lse[own], layer, self.first_kv_head))
            for job, own in zip(self.jobs, self.probe.ranges(), strict=True)
        ]
        masses = [part.importance if part.mass is None else part.mass for part in parts]
        return torch.cat([part.importance for part in parts], dim=1), torch.cat(masses, dim=1)

    def _rank(self, importance: torch.Tensor) -> torch.Tensor:
        consolidation = self.method.consolidation
        if not consolidation.ranks:
            return importance
        parts = [
            consolidation.rank(importance[:, own], job.probe)
            for job, own in zip(self.jobs, self.span.ranges(), strict=True)
        ]
        return torch.cat(parts, dim=1)

    def _finite(self, raw: torch.Tensor, raw_mass: torch.Tensor, is_finite: torch.Tensor | None) -> list[torch.Tensor]:
        if self.device.type != "cpu":
            return []
        flags = [(raw[:, entries] + raw_mass[:, entries]).isfinite().all() for entries in self.span.ranges()]
        if is_finite is not None:
            flags = [flag & is_finite[:, own].all() for flag, own in zip(flags, self.kept.ranges(), strict=True)]
        return flags

    def kept_of_jobs(self, consolidated: Consolidated) -> list[torch.Tensor]:
        """Each job's ``[G, B]`` int64 kept entries, counted from the start of its span."""
        return rows_of_each(consolidated.kept_rows, self.kept, self.span)

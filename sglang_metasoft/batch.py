"""The stages of one layer for all jobs of a batch at once, with fused kernels: one launch per stage.

Same results as :func:`sglang_metasoft.pipeline.compress_layer` job by job, but K and V are read where they lie, and
what is written goes from pool to pool. Everything about lengths is known, and on the device, before the first layer.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from metasoft_kernels.merge import gate_of_heads
from metasoft_kernels.merge.fused import attention_flow
from metasoft_kernels.merge.key_bias import key_bias
from metasoft_kernels.ragged import ragged
from metasoft_kernels.route.fused import route
from metasoft_kernels.score.fused import importance as mean_attention
from metasoft_kernels.select.fused import split_top

from sglang_metasoft.clock import Clock, no_clock
from sglang_metasoft.config import MetaSoftConfig
from sglang_metasoft.consolidations.repeats import favour_one_of_each
from sglang_metasoft.methods.base import Method
from sglang_metasoft.types import Job, LayerPool, LayerView

FUSED_CONSOLIDATIONS = ("none", "attention_flow", "key_bias")  # the last ranks and biases in torch, job by job


class Consolidated(NamedTuple):
    """What one layer of all jobs becomes."""

    kept_rows: torch.Tensor  # [G, sum B] int32, entries along the axis of all spans
    values: torch.Tensor | None  # [sum B, G, d] merged values; None: those of the kept entries
    key_moves: torch.Tensor | None  # [sum B, G, d] float32, added to the kept keys; None: nothing


def is_fused(method: Method, config: MetaSoftConfig) -> bool:
    """Whether every stage of these settings has a fused kernel; a method's own score may be torch."""
    return method.needs_probe and (config.consolidation or method.default_consolidation) in FUSED_CONSOLIDATIONS


class FusedBatch:
    """The jobs whose prompts finish together.

    Args:
        attend: as :func:`metasoft_kernels.probe.fused.attend`.
        first_kv_head: of this rank.
    """

    def __init__(
        self, jobs: list[Job], method: Method, config: MetaSoftConfig, attend: Callable, first_kv_head: int = 0
    ) -> None:
        self.jobs, self.method, self.config, self.attend = jobs, method, config, attend
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
        consolidation = config.consolidation or method.default_consolidation
        targets = min(config.route_targets, config.route_band, self.kept.longest)
        self.targets = targets if consolidation == "attention_flow" else 0
        self.carrying = [job.probe.carrying for job in jobs if job.probe.carrying is not None]
        self.biases_keys = consolidation == "key_bias"

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
            importance = mass if raw is raw_mass else raw.nan_to_num(0.0, 0.0, 0.0)
            if self.biases_keys:
                importance = self._without_repeats(importance)
        with clock("route"):
            kept_rows, dropped_rows = split_top(importance, self.sink_tokens, self.span, self.kept, self.dropped)
            is_merged = bool(self.targets and self.dropped.total)
            if is_merged:
                target, weight = route(
                    pool.key, self.span_slots, kept_rows, dropped_rows, self.kept, self.dropped, self.targets,
                    pool.scale * pool.key_scale**2, q.dtype, self.config.route_band,
                )  # fmt: skip
        values, key_moves, is_finite = None, None, None
        if is_merged:
            with clock("merge"):
                values, is_finite = attention_flow(
                    pool.value, self.span_slots, mass, kept_rows, dropped_rows, target, weight, self.kept,
                    gate_of_heads(gate_scale, pool.key.shape[1], self.device), pool.value_scale, q.dtype,
                )  # fmt: skip
        if self.biases_keys:
            with clock("merge"):
                key_moves = self._key_moves(mass, kept_rows, pool.scale, layer)
        return out, Consolidated(kept_rows, values, key_moves), self._finite(raw, raw_mass, is_finite)

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

    def _without_repeats(self, importance: torch.Tensor) -> torch.Tensor:
        parts = [
            favour_one_of_each(importance[:, own], carrying.repeats[0])
            for carrying, own in zip(self.carrying, self.span.ranges(), strict=True)
        ]
        return torch.cat(parts, dim=1)

    def _key_moves(self, mass: torch.Tensor, kept_rows: torch.Tensor, scale: float, layer: int) -> torch.Tensor:
        moves = [
            key_bias(mass[:, own], kept, carrying.repeats, carrying.directions[layer], scale, job.plan.sink_tokens)
            for job, carrying, own, kept in zip(
                self.jobs, self.carrying, self.span.ranges(), self.kept_of_jobs(kept_rows), strict=True
            )
        ]
        return torch.cat(moves)

    def _finite(self, raw: torch.Tensor, raw_mass: torch.Tensor, is_finite: torch.Tensor | None) -> list[torch.Tensor]:
        if self.device.type != "cpu":
            return []
        flags = [(raw[:, entries] + raw_mass[:, entries]).isfinite().all() for entries in self.span.ranges()]
        if is_finite is not None:
            flags = [flag & is_finite[:, own].all() for flag, own in zip(flags, self.kept.ranges(), strict=True)]
        return flags

    def kept_of_jobs(self, kept_rows: torch.Tensor) -> list[torch.Tensor]:
        """Each job's ``[G, B]`` int64 kept entries, counted from the start of its span."""
        return [
            kept_rows[:, own].to(torch.int64) - entries.start
            for own, entries in zip(self.kept.ranges(), self.span.ranges(), strict=True)
        ]

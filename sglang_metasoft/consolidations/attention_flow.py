"""Attention flow (Meta-Soft, arXiv 2605.22337): dropped values flow into the kept entries that they are routed to."""

from metasoft_kernels.merge import attention_flow, fused, gate_of_heads, gather

from sglang_metasoft.consolidations.base import Consolidation, MergedBatch, RoutedBatch
from sglang_metasoft.types import MergedKV


class AttentionFlow(Consolidation):
    """Routing by k·k among the nearest kept entries, load balance, and a gate by the attention mass that moved."""

    is_fused = True

    @property
    def targets(self) -> int:
        return self.config.route_targets

    def merge(self, view, keys, values, scores, routes, gate_scale) -> MergedKV:
        merged = attention_flow(
            values,
            scores.mass,
            routes.kept,
            routes.dropped,
            routes.targets,
            routes.weights,
            gate_scale,
            self.config.kernels,
        )
        return MergedKV(gather(keys, routes.kept), merged.to(values.dtype))

    def merge_batch(self, batch: RoutedBatch) -> MergedBatch:
        if batch.targets is None:
            return MergedBatch()
        pool = batch.pool
        gate = gate_of_heads(batch.gate_scale, pool.key.shape[1], pool.key.device)
        values, is_finite = fused.attention_flow(
            pool.value, batch.span_slots, batch.mass, batch.kept_rows, batch.dropped_rows, batch.targets, batch.weights,
            batch.kept, gate, pool.value_scale, batch.dtype,
        )  # fmt: skip
        return MergedBatch(values=values, is_finite=is_finite)

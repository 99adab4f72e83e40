"""Attention Matching (arXiv 2602.16284, section 3): kept values are refitted so that the probe's output stays."""

from metasoft_kernels.merge import gather
from metasoft_kernels.merge.least_squares import least_squares

from sglang_metasoft.consolidations.base import Consolidation
from sglang_metasoft.types import MergedKV


class LeastSquares(Consolidation):
    """A ridge regression over the queries of the probe and of the prompt tokens that are read again behind it."""

    needs_probe = True
    needs_queries = True

    def merge(self, view, keys, values, scores, routes, gate_scale) -> MergedKV:
        refitted = least_squares(
            keys, values, routes.kept, view.q, view.lse, view.pool.scale, view.seen_tokens, view.job.plan.sink_tokens
        )
        return MergedKV(gather(keys, routes.kept), refitted.to(values.dtype))

"""ZeroMerge (arXiv 2503.10714): a few residual entries hold the means of what was dropped."""

from metasoft_kernels.merge import gather
from metasoft_kernels.merge.zeromerge import zeromerge

from sglang_metasoft.consolidations.base import Consolidation
from sglang_metasoft.types import MergedKV


class ZeroMerge(Consolidation):
    """Means by count, of values alone; the residual entries are those with the least attention mass."""

    def merge(self, view, keys, values, scores, routes, gate_scale) -> MergedKV:
        merged = zeromerge(keys, values, scores.mass, routes.kept, routes.dropped)
        return MergedKV(gather(keys, routes.kept), merged.to(values.dtype))

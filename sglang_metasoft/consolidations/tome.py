"""ToMe (arXiv 2210.09461) and D2O (arXiv 2406.13035): a dropped value goes into the kept entry of the likest key."""

from metasoft_kernels.merge import gather
from metasoft_kernels.merge.tome import tome

from sglang_metasoft.consolidations.base import Consolidation
from sglang_metasoft.types import MergedKV


class ToMe(Consolidation):
    """A weighted mean of values; keys stay."""

    def merge(self, view, keys, values, scores, routes, gate_scale) -> MergedKV:
        merged = tome(keys, values, routes.kept, routes.dropped)
        return MergedKV(gather(keys, routes.kept), merged.to(values.dtype))

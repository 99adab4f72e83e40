"""SnapKV and KeyDiff together (this project's; arXiv 2404.14469 and 2504.15364): each keeps its own best entries."""

from metasoft_kernels.standing import fused, naive

from sglang_metasoft.methods.base import Method
from sglang_metasoft.types import LayerView, Scores


class SnapKVKeyDiff(Method):
    """An entry counts for the better of two standings: by the window's attention, and by how unlike others its key is.

    About a quarter of the budget goes to what the prompt's end looks at, three quarters to what stands out, whoever may
    ask for it; what is good at both leaves room for more of each. An entry stands for the window's attention.
    """

    default_consolidation = "none"

    @property
    def scores_together(self) -> bool:
        """Unless a subclass scores otherwise."""
        cls = type(self)
        return cls.score is Method.score and cls.score_layer is SnapKVKeyDiff.score_layer

    def score_layer(self, view: LayerView) -> Scores:
        mass = super().score_layer(view).importance
        keys = view.pool.key[view.job.span_slots].transpose(0, 1)
        return Scores(naive.better_standing(mass, keys), mass)

    def score_together(self, mass, pool, span_slots, span):
        return fused.better_standing(mass, pool.key, span_slots, span)

"""What only the in-process runner knows: a bound, and other ways to take importance from soft tokens, for ablations."""

from metasoft_kernels.score import probability_blocks
from torch.nn.functional import max_pool1d

from sglang_metasoft.eval.oracle import Oracle
from sglang_metasoft.methods.base import Method
from sglang_metasoft.methods.metasoft import MetaSoft
from sglang_metasoft.types import LayerView, Scores

NEIGHBOURS = 7


class OfBareSoftTokens(MetaSoft):
    """Base: the ranking is the soft tokens' attention alone.

    Raises:
        ValueError: the compressor has an entry scorer.
    """

    def __init__(self, config, shape, embed, device) -> None:
        super().__init__(config, shape, embed, device)
        if self.soft_tokens.scorer is not None:
            raise ValueError(
                f"{config.path!r} ranks by its entry scorer; allowed: a compressor trained with --scorer-width 0"
            )


class Largest(OfBareSoftTokens):
    """The largest attention that any soft token pays, in place of the mean; over the group of query heads the mean."""

    def score_layer(self, view: LayerView) -> Scores:
        pool = view.pool
        blocks = probability_blocks(
            view.q, pool.key, view.job.span_slots, view.lse, pool.scale, pool.key_scale, view.seen_tokens
        )
        largest = None
        for block in blocks:
            found = block.mean(1).amax(1)
            largest = found if largest is None else largest.maximum(found)
        return Scores(largest)


class Pooled(OfBareSoftTokens):
    """The largest mean attention of an entry and its neighbours, as SnapKV pools."""

    def score_layer(self, view: LayerView) -> Scores:
        mass = super().score_layer(view).importance
        return Scores(max_pool1d(mass, NEIGHBOURS, 1, NEIGHBOURS // 2), mass)


VARIANTS: dict[str, type[Method]] = {"oracle": Oracle, "metasoft_max": Largest, "metasoft_pooled": Pooled}

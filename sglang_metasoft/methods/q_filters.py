"""Q-Filters (arXiv 2503.02812, section 3): a key is worth its projection on the queries' main direction."""

import torch

from sglang_metasoft.consolidations.calibration import calibration_ids
from sglang_metasoft.methods.base import Method
from sglang_metasoft.types import LayerView, Scores, ServedModel


class QFilters(Method):
    """No probe: the filters come from the queries of one text, at start-up.

    A query head's filter is the first right singular vector of its queries after RoPE (not centered), turned to the
    side on which most of them lie; a KV head's is the mean over its group. The paper stores it with the other sign and
    keeps small products. It takes 3,000 queries from a corpus, we the first of the shipped public-domain text.
    Nothing attends, so every entry stands for the same mass.
    """

    default_consolidation = "none"
    needs_probe = False

    def prepare(self, model: ServedModel) -> None:
        super().prepare(model)
        ids = torch.tensor(calibration_ids(model), device=self.device)
        self.filters = [main_directions(queries.float()) for queries in model.queries(ids)]

    def score_layer(self, view: LayerView) -> Scores:
        keys = view.pool.key[view.job.span_slots].float()  # [S, G, d]
        filters = self.filters[view.layer].unflatten(0, (keys.shape[1], -1)).mean(1)
        projection = (keys * filters).sum(-1).t()
        return Scores(projection, torch.full_like(projection, 1 / projection.shape[1]))


def main_directions(queries: torch.Tensor) -> torch.Tensor:
    """``[n, H, d]`` float32 queries of one layer to ``[H, d]`` unit vectors that most of them point along."""
    u, _, vh = torch.linalg.svd(queries.permute(1, 0, 2), full_matrices=False)
    majority = (u[..., 0] > 0).float().mean(-1, keepdim=True)
    return torch.where(majority > 0.5, vh[:, 0], -vh[:, 0])

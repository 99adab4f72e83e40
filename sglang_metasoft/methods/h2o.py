"""H2O (arXiv 2306.14048, section 4): heavy hitters of the accumulated attention, and the most recent entries."""

import torch
from metasoft_kernels.score import probability_blocks

from sglang_metasoft.methods.base import Method
from sglang_metasoft.types import LayerView, Probe, Prompt, Scores


class H2O(Method):
    """Attention that the prompt's own tokens pay an entry, summed up; half of the budget goes to recency, as there.

    A server does not store attention, so the last ``observed_tokens`` of the segment run once more under their causal
    mask: all of a segment that is no longer, else its later part. The window counts as recent. The paper has no grouped
    heads; the mean over the group stands for one. Its greedy eviction token by token becomes one choice at the end.
    """

    default_consolidation = "none"

    def probe(self, prompt: Prompt) -> Probe:
        return self.rerun(prompt, prompt.last_raw_ids(self.config.observed_tokens))

    def score_layer(self, view: LayerView) -> Scores:
        pool, job = view.pool, view.job
        blocks = probability_blocks(
            view.q, pool.key, job.span_slots, view.lse, pool.scale, pool.key_scale, view.seen_tokens
        )
        mass = sum(block.mean(1).sum(1) for block in blocks) / view.q.shape[0]
        window = 0 if job.plan.ends_at_boundary else self.config.window
        recent = max(0, (job.plan.kept_slots + window) // 2 - window)
        is_recent = torch.arange(mass.shape[1], device=mass.device) >= mass.shape[1] - recent
        return Scores(mass + 2 * is_recent, mass)  # a mean probability is at most 1

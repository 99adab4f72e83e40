"""KVCompose (arXiv 2509.05165): each head chooses its own tokens, slot by slot they form composite tokens."""

from functools import reduce

import torch
from metasoft_kernels.score import probability_blocks

from sglang_metasoft.methods.base import Method
from sglang_metasoft.types import LayerView, Probe, Prompt, Scores


class KVCompose(Method):
    """The segment's tokens follow the prompt once more; the most attention that one of them pays is the score.

    The aggregation is the default of its authors' code: maximum over tokens, mean over the group, plus the mean over KV
    heads. Its budgets differ between layers, which one ``req_to_token`` row cannot hold: here every layer keeps B. At
    most the last ``observed_tokens`` are repeated, where the paper repeats the whole context.
    """

    default_consolidation = "none"
    needs_all_heads = True

    def probe(self, prompt: Prompt) -> Probe:
        return Probe(
            embeds=self.embed(prompt.last_raw_ids(self.config.observed_tokens)),
            context_slots=prompt.context_slots,
            first_position=prompt.context_tokens,
        )

    def score_layer(self, view: LayerView) -> Scores:
        pool = view.pool
        blocks = probability_blocks(
            view.q, pool.key, view.job.span_slots, view.lse, pool.scale, pool.key_scale, view.seen_tokens
        )
        peak = reduce(torch.maximum, (block.amax(2) for block in blocks)).mean(1)  # [G, S]
        return Scores(peak + peak.mean(0, keepdim=True))

"""Keys that carry a bias: what is kept counts for what is dropped (this project's; biases as in arXiv 2602.16284)."""

from typing import NamedTuple

import torch
from metasoft_kernels.merge import gather
from metasoft_kernels.merge.key_bias import key_bias

from sglang_metasoft.consolidations.base import Consolidation, MergedBatch, RoutedBatch
from sglang_metasoft.consolidations.key_directions import KeyDirections, fit_key_directions
from sglang_metasoft.consolidations.repeats import demote_repeats, find_repeats
from sglang_metasoft.types import MergedKV, Probe, Prompt


class KeyBiasInputs(NamedTuple):
    """What has to be known of a prompt."""

    repeats: torch.Tensor  # [n, S] int64, of find_repeats
    directions: torch.Tensor  # [layers, G, d] float32, of KeyDirections, where this prompt ends


class KeyBias(Consolidation):
    """Repeats stand back in the ranking; the kept entries' keys carry the attention of what was dropped.

    The bias lies along a direction that is fitted to the model's queries, so a model has to have one rotary embedding.
    It ranks and merges in torch, job by job, in a fused batch too.
    """

    needs_probe = True  # of prompts, not for its queries
    is_fused = True

    def __init__(self, config, shape, device) -> None:
        super().__init__(config, shape, device)
        self.directions: KeyDirections | None = None

    def prepare(self, model) -> None:
        self.directions = fit_key_directions(model, self.shape, self.device)

    def extend_probe(self, probe: Probe, prompt: Prompt, embed) -> Probe:
        if self.directions is None:
            raise ValueError("consolidation key_bias has to be prepared with the model before it sees a prompt")
        inputs = KeyBiasInputs(find_repeats(prompt.span_ids), self.directions.at(prompt.context_tokens))
        return probe._replace(consolidation_inputs=inputs)

    def mass(self, attention: torch.Tensor, estimate: torch.Tensor) -> torch.Tensor:
        """The geometric mean of the two, nearer to the attention of answers than either."""
        return (attention * estimate).sqrt()

    def rank(self, importance: torch.Tensor, probe: Probe) -> torch.Tensor:
        return demote_repeats(importance, probe.consolidation_inputs.repeats[0])

    def merge(self, view, keys, values, scores, routes, gate_scale) -> MergedKV:
        inputs, sink_tokens = view.job.probe.consolidation_inputs, view.job.plan.sink_tokens
        moves = key_bias(
            scores.mass, routes.kept, inputs.repeats, inputs.directions[view.layer], view.pool.scale, sink_tokens
        )
        moved = gather(keys, routes.kept).float() + moves
        return MergedKV(moved.to(keys.dtype), gather(values, routes.kept))

    def merge_batch(self, batch: RoutedBatch) -> MergedBatch:
        moves = []
        for job, own, kept in zip(batch.jobs, batch.span.ranges(), batch.kept_of_jobs(), strict=True):
            inputs, sink_tokens = job.probe.consolidation_inputs, job.plan.sink_tokens
            direction = inputs.directions[batch.layer]
            moves.append(key_bias(batch.mass[:, own], kept, inputs.repeats, direction, batch.pool.scale, sink_tokens))
        return MergedBatch(key_moves=torch.cat(moves))

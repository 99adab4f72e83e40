"""Keys that carry a bias: what is kept counts for what is dropped (this project's; biases as in arXiv 2602.16284)."""

from typing import NamedTuple

import torch
from metasoft_kernels.bias.fused import log_biases
from metasoft_kernels.bias.naive import key_bias
from metasoft_kernels.merge import gather
from metasoft_kernels.parts import Scored
from metasoft_kernels.ragged import Ragged
from metasoft_kernels.repeats.fused import demote
from metasoft_kernels.repeats.naive import Groups

from sglang_metasoft.consolidations.base import Consolidation, KeyBiases, MergedBatch, RoutedBatch
from sglang_metasoft.consolidations.key_directions import KeyDirections, fit_key_directions
from sglang_metasoft.consolidations.repeats import Repeats, from_the_smallest
from sglang_metasoft.types import Job, MergedKV, Probe, Prompt


class KeyBiasInputs(NamedTuple):
    """What has to be known of a prompt."""

    repeats: Repeats  # of its span
    directions: torch.Tensor  # [layers, G, d] float32, of KeyDirections, where this prompt ends


class NotedPrompts(NamedTuple):
    """The same of all prompts of a batch."""

    groups: Groups  # [n, sum S] int32, each prompt's in turn
    directions: torch.Tensor  # [J, layers, G, d] float32


class KeyBias(Consolidation):
    """Repeats stand back in the ranking; the kept entries' keys carry the attention of what was dropped.

    The bias lies along a direction that is fitted to a layer's queries. Where a position does more to them than to turn
    them there is none, and keys stay as they are.
    """

    needs_probe = True  # of prompts, not for its queries
    is_fused = True
    ranks_by_kernels = True

    def __init__(self, config, shape, device) -> None:
        super().__init__(config, shape, device)
        self.directions: KeyDirections | None = None

    def prepare(self, model) -> None:
        self.directions = fit_key_directions(model, self.shape, self.device)

    def extend_probe(self, probe: Probe, prompt: Prompt, embed) -> Probe:
        if self.directions is None:
            raise ValueError("consolidation key_bias has to be prepared with the model before it sees a prompt")
        inputs = KeyBiasInputs(Repeats(prompt.span_ids), self.directions.at(prompt.context_tokens))
        return probe._replace(consolidation_inputs=inputs)

    def mass(self, attention: torch.Tensor, estimate: torch.Tensor) -> torch.Tensor:
        """The geometric mean of the two, nearer to the attention of answers than either."""
        return (attention * estimate).sqrt()

    def rank(self, importance: torch.Tensor, probe: Probe) -> torch.Tensor:
        return probe.consolidation_inputs.repeats.demote(importance)

    def merge(self, view, keys, values, scores, routes, gate_scale) -> MergedKV:
        inputs, sink_tokens = view.job.probe.consolidation_inputs, view.job.plan.sink_tokens
        moves = key_bias(
            scores.mass, routes.kept, inputs.repeats.numbers, inputs.directions[view.layer], view.pool.scale,
            sink_tokens,
        )  # fmt: skip
        moved = gather(keys, routes.kept).float() + moves
        return MergedKV(moved.to(keys.dtype), gather(values, routes.kept))

    def note_batch(self, jobs: list[Job]) -> NotedPrompts:
        inputs = [job.probe.consolidation_inputs for job in jobs]
        groups = zip(*(each.repeats.groups for each in inputs), strict=True)
        return NotedPrompts(
            Groups(*(torch.cat(parts, dim=1) for parts in groups)), torch.stack([each.directions for each in inputs])
        )

    def rank_batch(self, scored: Scored, span: Ragged, jobs: list[Job], noted: NotedPrompts) -> torch.Tensor:
        if scored.may_be_negative:
            parts = scored.importance.nan_to_num(0.0, 0.0, 0.0).split(span.lengths, dim=1)
            scored = scored._replace(importance=torch.cat([from_the_smallest(part) for part in parts], dim=1))
        return demote(scored, noted.groups, span)

    def merge_batch(self, batch: RoutedBatch) -> MergedBatch:
        ranked = batch.ranked
        assert ranked is not None
        biases = log_biases(
            ranked.scored, ranked.is_kept, batch.kept_rows, ranked.noted.groups, ranked.sink_tokens, batch.span,
            batch.kept, ranked.scratch,
        )  # fmt: skip
        return MergedBatch(key_biases=KeyBiases(biases, ranked.noted.directions[:, batch.layer, ranked.heads]))

"""What a consolidation has to say: what of the dropped entries the kept ones take over."""

from typing import Any, NamedTuple

import torch
from metasoft_kernels.merge import gather
from metasoft_kernels.parts import Scored, importance_of
from metasoft_kernels.ragged import Ragged, rows_of_each

from sglang_metasoft.config import MetaSoftConfig
from sglang_metasoft.consolidations.reread import with_reread
from sglang_metasoft.types import (
    Embed,
    Job,
    LayerPool,
    LayerView,
    MergedKV,
    ModelShape,
    Probe,
    Prompt,
    Routes,
    Scores,
    ServedModel,
)


class RoutedBatch(NamedTuple):
    """One layer of all jobs of a batch, after its routing: what a fused merge may look at."""

    jobs: list[Job]
    pool: LayerPool
    layer: int
    span_slots: torch.Tensor  # [sum S] int64
    span: Ragged  # the axis of all spans
    kept: Ragged  # the axis of all kept entries
    mass: torch.Tensor | None  # [G, sum S] float32, at least 0; None: ranked.scored says it
    kept_rows: torch.Tensor  # [G, sum B] int32, entries along the span axis
    dropped_rows: torch.Tensor | None  # [G, sum N] int32; None: is_kept says it
    targets: torch.Tensor | None  # [G, sum N, m] int32, rows along the kept axis; None: nothing is routed
    weights: torch.Tensor | None  # [G, sum N, m] float32
    gate_scale: torch.Tensor | float  # a number or [G, 1]
    dtype: torch.dtype  # of the model
    ranked: "RankedBatch | None" = None  # of a consolidation that ranks by kernels; else None

    def kept_of_jobs(self) -> list[torch.Tensor]:
        """Each job's ``[G, B]`` int64 kept entries, counted from the start of its span."""
        return rows_of_each(self.kept_rows, self.kept, self.span)


class RankedBatch(NamedTuple):
    """What a consolidation that ranks by kernels is given to merge by."""

    noted: Any  # of the batch, by :meth:`Consolidation.note_batch`
    scored: Scored
    is_kept: torch.Tensor  # [G, sum S] int8
    sink_tokens: torch.Tensor  # [J] int32
    scratch: torch.Tensor  # [G, sum S] float32 that may be written
    heads: slice  # these among the rank's KV heads


class KeyBiases(NamedTuple):
    """What kept keys are to carry."""

    biases: torch.Tensor  # [G, sum B] float32, to be added to the logits
    directions: torch.Tensor  # [J, G, d] float32 with q·u near 1 for every query to come


class MergedBatch(NamedTuple):
    """What a fused merge changes of the kept entries."""

    values: torch.Tensor | None = None  # [sum B, G, d] finite, in the model's dtype; None: as they were
    key_biases: KeyBiases | None = None  # None: keys as they were; not together with values
    is_finite: torch.Tensor | None = None  # [G, sum B] bool, where the merged values were; None: nothing was merged


class Consolidation:
    """Base of all consolidations. Its method constructs it once; each LoRA adapter may have one of its own."""

    needs_probe = False  # there has to be a probe, whatever the method
    needs_queries = False  # it merges by the probe's queries: prompt tokens run once more behind it (and needs_probe)
    is_fused = False  # :meth:`merge_batch` is there; else every stage runs job by job
    ranks_by_kernels = False  # :meth:`rank_batch` is there, and merges by a RankedBatch; logs of importance included

    def __init__(self, config: MetaSoftConfig, shape: ModelShape, device: torch.device) -> None:
        """
        Args:
            config: the server's settings.
            shape: the served model.
            device: where probes are made.
        """
        self.config = config
        self.shape = shape
        self.device = device

    @property
    def targets(self) -> int:
        """Kept entries that a dropped one is routed to, at most; 0: the routing is spared."""
        return 0

    @property
    def ranks(self) -> bool:
        """Whether it has a say in the ranking."""
        return type(self).rank is not Consolidation.rank

    @property
    def learns_from_model(self) -> bool:
        """Whether :meth:`prepare` learns something, which is another thing under each LoRA adapter."""
        return type(self).prepare is not Consolidation.prepare

    def prepare(self, model: ServedModel) -> None:
        """Learn from the loaded model what does not depend on a prompt; once, and again after a change of weights.

        Raises:
            ValueError: the model lacks what is needed; what was learned before stays.
        """

    def prepared_for(self, model: ServedModel) -> "Consolidation":
        """Another one with these settings, prepared for ``model``: for the probes that run under a LoRA adapter."""
        other = type(self)(self.config, self.shape, self.device)
        other.prepare(model)
        return other

    def extend_probe(self, probe: Probe, prompt: Prompt, embed: Embed) -> Probe:
        """The probe with what has to be known of the prompt: more tokens, or ``consolidation_inputs``.

        Must depend on its arguments alone and not wait for the device.

        Args:
            probe: ``[t, D]``, of the method.
            embed: ids to ``[n, D]``; on every rank at the same time.
        """
        return with_reread(probe, prompt, embed, self.config.reread_tokens) if self.needs_queries else probe

    def mass(self, attention: torch.Tensor, estimate: torch.Tensor) -> torch.Tensor:
        """The attention that an entry stands for, where a method has two opinions: here the first.

        Args:
            attention: ``[G, S]`` float32, the probe's.
            estimate: ``[G, S]`` float32, of what answers will pay.
        """
        return attention

    def rank(self, importance: torch.Tensor, probe: Probe) -> torch.Tensor:
        """The ``[G, S]`` float32 importance that entries are kept by, from the method's: here the same."""
        return importance

    def merge(
        self,
        view: LayerView,
        keys: torch.Tensor,
        values: torch.Tensor,
        scores: Scores,
        routes: Routes,
        gate_scale: torch.Tensor | float,
    ) -> MergedKV:
        """The kept entries of one layer of one job: here as they were. At least one entry is dropped.

        Args:
            view: the layer's probe: ``q`` ``[t, H, d]``, ``lse`` ``[t, H]``, ``pool.scale`` and ``seen_tokens``.
            keys, values: ``[S, G, d]`` of the span.
            scores: finite importance and mass, ``[G, S]`` each.
            routes: ``kept`` and ``dropped``; targets and weights too, if :attr:`targets` is not 0.
            gate_scale: the method's factor on a gate, a number or ``[G, 1]``.

        Returns:
            ``[B, G, d]`` keys and values in the dtype of the input; a value that is not finite is not written.
        """
        return as_they_were(keys, values, routes)

    def note_batch(self, jobs: list[Job]) -> Any:
        """What :meth:`rank_batch` and :meth:`merge_batch` need to know of these jobs, once for all layers."""

    def rank_batch(self, scored: Scored, span: Ragged, jobs: list[Job], noted: Any) -> torch.Tensor:
        """:meth:`rank` for all jobs at once: here job by job.

        Args:
            scored: logs are there only if :attr:`ranks_by_kernels`.
            span: the jobs' rows on the axis of all spans.
            noted: by :meth:`note_batch`.

        Returns:
            ``[G, sum S]`` float32.
        """
        importance = importance_of(scored, span)
        if not self.ranks:
            return importance
        parts = [self.rank(importance[:, own], job.probe) for job, own in zip(jobs, span.ranges(), strict=True)]
        return torch.cat(parts, dim=1)

    def merge_batch(self, batch: RoutedBatch) -> MergedBatch:
        """:meth:`merge` for one layer of all jobs at once; called if :attr:`is_fused`, nothing dropped included."""
        return MergedBatch()


def as_they_were(keys: torch.Tensor, values: torch.Tensor, routes: Routes) -> MergedKV:
    """Each head's kept entries, out of ``[S, G, d]`` keys and values."""
    return MergedKV(gather(keys, routes.kept), gather(values, routes.kept))

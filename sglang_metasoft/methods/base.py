"""What a method has to say: which tokens probe the prompt, and how their attention becomes importance."""

from functools import cached_property

import torch
from metasoft_kernels.parts import Scored
from metasoft_kernels.ragged import Ragged
from metasoft_kernels.score import importance

from sglang_metasoft.compressor.entry_scorer import EntryScorer
from sglang_metasoft.config import MetaSoftConfig
from sglang_metasoft.consolidations import Consolidation, load_consolidation
from sglang_metasoft.types import Embed, LayerPool, LayerView, ModelShape, Probe, Prompt, Scores, ServedModel


class Method:
    """Base of all methods. Constructed once per scheduler process, from the same inputs on every rank."""

    needs_probe = True  # else the entries alone decide, and the model does not run
    needs_all_heads = False  # a head's importance depends on other heads, which other ranks may hold
    reads_path = False  # loads a trained compressor from ``--metasoft-path``

    @classmethod
    def check(cls, config: MetaSoftConfig, shape: ModelShape, tp_size: int) -> None:
        """Refuse settings before any model loads.

        Raises:
            ValueError: one sentence with the setting and what is allowed.
        """
        if config.path is not None and not cls.reads_path:
            raise ValueError(
                f"metasoft path: {config.path!r} is given, but method {config.method} is not trained and reads no path"
            )
        if cls.needs_all_heads and tp_size > 1:
            raise ValueError(
                f"metasoft method: {config.method} compares heads that tensor parallelism spreads over ranks; "
                f"allowed: --tp-size 1, not {tp_size}"
            )

    def __init__(self, config: MetaSoftConfig, shape: ModelShape, embed: Embed, device: torch.device) -> None:
        """
        Args:
            config: the server's settings.
            shape: the served model.
            embed: ``[n]`` int64 ids on ``device`` to ``[n, D]`` embeddings; on every rank at the same time.
            device: where probes are made.

        Raises:
            ValueError: the method cannot serve this model, both named.
        """
        self.config = config
        self.shape = shape
        self.embed = embed
        self.device = device

    @property
    def default_consolidation(self) -> str:
        """The name of the one in use if the settings name none; a method may say just ``= "none"``."""
        return "attention_flow"

    @property
    def consolidation_name(self) -> str:
        """The name of the one in use."""
        return self.config.consolidation or self.default_consolidation

    @cached_property
    def consolidation(self) -> Consolidation:
        """The one in use."""
        return load_consolidation(self.consolidation_name)(self.config, self.shape, self.device)

    @property
    def runs_model(self) -> bool:
        """Whether a probe runs through the model, for the method's sake or the consolidation's."""
        return self.needs_probe or self.consolidation.needs_probe

    def prepare(self, model: ServedModel) -> None:
        """Learn from the loaded model what does not depend on a prompt; once, and again after a change of weights.

        Raises:
            ValueError: the model lacks what the method or the consolidation needs.
        """
        self.consolidation.prepare(model)

    def follow_weights(self, model: ServedModel) -> "Method":
        """The method for the weights that the model has now: after a change of weights; it may be this one, changed.

        Raises:
            ValueError: it cannot serve them; this one is as it was.
        """
        method = type(self)(self.config, self.shape, self.embed, self.device)
        method.prepare(model)
        return method

    @property
    def identity(self) -> str:
        """What makes this compressor's results its own; prefixes with different identities are never shared."""
        return type(self).__name__

    @property
    def scores_by_attention(self) -> bool:
        """Whether importance is the probe's mean attention and nothing else."""
        return type(self).score is Method.score and type(self).score_layer is Method.score_layer

    @property
    def scores_together(self) -> bool:
        """Whether :meth:`score_together` says, by kernels, what :meth:`score_layer` says."""
        return False

    @property
    def entry_scorer(self) -> EntryScorer | None:
        """What refines the probe's mean attention, if importance is that and nothing else; else None."""
        return None

    @property
    def description(self) -> str:
        """For the start-up log."""
        return self.identity

    def probe(self, prompt: Prompt) -> Probe:
        """The probe tokens for a prompt: here its last window once more.

        Must depend on its arguments alone and not wait for the device.
        """
        return self.rerun(prompt, prompt.last_ids(self.config.window))

    def rerun(self, prompt: Prompt, ids: torch.Tensor) -> Probe:
        """The prompt's last tokens ``ids`` once more, over the entries before them and at their own positions."""
        tokens = ids.numel()
        return Probe(
            embeds=self.embed(ids),
            context_slots=prompt.context_slots - tokens,
            first_position=prompt.context_tokens - tokens,
        )

    def score_layer(self, view: LayerView) -> Scores:
        """What the span is worth at one layer; for methods that look at more than the probe's attention."""
        pool = view.pool
        return self.score(view.q, pool.key, view.job.span_slots, view.lse, pool.scale, pool.key_scale)

    def score(
        self,
        q: torch.Tensor,
        k_buffer: torch.Tensor,
        span_slots: torch.Tensor,
        lse: torch.Tensor,
        scale: float,
        k_scale: float,
    ) -> Scores:
        """Importance of the span at one layer; shapes as :func:`metasoft_kernels.score.importance`."""
        return Scores(importance(q, k_buffer, span_slots, lse, scale, k_scale, self.config.kernels))

    def score_together(self, mass: torch.Tensor, pool: LayerPool, span_slots: torch.Tensor, span: Ragged) -> Scored:
        """What :meth:`score_layer` says of all prompts at once, where the stages run by kernels.

        Args:
            mass: ``[G, sum S]`` float32 mean attention of the probes to the spans.
            pool: with some of the rank's KV heads, perhaps.
            span_slots: ``[sum S]``.
            span: whose rows of ``span_slots`` are whose.
        """
        raise NotImplementedError

    def gate_scale(self, layer: int, first_kv_head: int, num_kv_heads: int) -> torch.Tensor | float:
        """Factor on the consolidation gate at ``layer`` for a rank's KV heads: a number or ``[G, 1]``."""
        return 1.0 if self.config.gate_scale is None else self.config.gate_scale

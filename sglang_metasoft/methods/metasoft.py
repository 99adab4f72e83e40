"""Meta-Soft (arXiv 2605.22337): soft tokens, composed from an orthogonal meta-library, probe the prompt."""

from sglang_metasoft.compressor.files import check_compressor
from sglang_metasoft.compressor.soft_tokens import TAIL_TOKENS, SoftTokens
from sglang_metasoft.methods.base import Method
from sglang_metasoft.types import LayerView, ModelShape, Probe, Prompt, Scores


class MetaSoft(Method):
    """Soft tokens appended after the prompt; what they attend to stays.

    A trained compressor may bring an entry scorer, which refines the ranking. What an entry stands for is then up to
    the consolidation: the soft tokens' attention, or that and the scorer's.
    """

    reads_path = True

    @classmethod
    def check(cls, config, shape: ModelShape, tp_size: int) -> None:
        super().check(config, shape, tp_size)
        if config.path is not None:
            check_compressor(config.path, shape)

    def __init__(self, config, shape: ModelShape, embed, device) -> None:
        super().__init__(config, shape, embed, device)
        if config.path is None:
            self.soft_tokens = SoftTokens.untrained(shape, config.soft_tokens, embed, device)
            self.is_gate_shut = False
        else:
            self.soft_tokens = SoftTokens.load(config.path, shape, embed, device)
            self.is_gate_shut = not self.soft_tokens.gate_scale.any()

    @property
    def default_consolidation(self) -> str:
        """Attention flow; where nothing would flow the routing is spared."""
        if self.config.gate_scale == 0:
            return "none"
        return self.consolidation_of_gate(self.config.gate_scale is None and self.is_gate_shut)

    @staticmethod
    def consolidation_of_gate(is_shut: bool) -> str:
        """What a compressor is served with: where its own gate lets nothing through, keys carry the attention."""
        return "key_bias" if is_shut else "attention_flow"

    def follow_weights(self, model):
        if self.config.path is None:
            return super().follow_weights(model)
        self.soft_tokens.check_again()  # the file is as it was
        self.prepare(model)
        return self

    @property
    def identity(self) -> str:
        return f"MetaSoft:{self.soft_tokens.fingerprint}"

    @property
    def scores_by_attention(self) -> bool:
        return self.soft_tokens.scorer is None

    @property
    def entry_scorer(self):
        return self.soft_tokens.scorer

    @property
    def description(self) -> str:
        kind = "untrained" if self.config.path is None else f"trained ({self.config.path})"
        return f"{self.soft_tokens.count} {kind} soft tokens, consolidation {self.consolidation_name}"

    def probe(self, prompt: Prompt) -> Probe:
        mode = int(prompt.tail_ids.numel() == 0)
        return Probe(
            embeds=self.soft_tokens(self.embed, prompt.span_ids, prompt.last_raw_ids(TAIL_TOKENS), mode),
            context_slots=prompt.context_slots,
            first_position=prompt.context_tokens,
        )

    def score_layer(self, view: LayerView) -> Scores:
        mass = super().score_layer(view).importance
        scorer = self.soft_tokens.scorer
        if scorer is None:
            return Scores(mass)
        pool, slots = view.pool, view.job.span_slots
        heads = slice(view.first_kv_head, view.first_kv_head + mass.shape[0])
        log_importance = scorer(
            mass,
            pool.key[slots].float().transpose(0, 1) * pool.key_scale,
            pool.value[slots].float().transpose(0, 1) * pool.value_scale,
            mode=int(view.job.plan.ends_at_boundary),
            where=(view.layer, heads),
        )
        importance = log_importance.softmax(-1)
        return Scores(importance, self.consolidation.mass(mass, importance))

    def gate_scale(self, layer, first_kv_head, num_kv_heads):
        if self.config.gate_scale is not None:
            return self.config.gate_scale
        return self.soft_tokens.gate_scale[layer, first_kv_head : first_kv_head + num_kv_heads].unsqueeze(1)

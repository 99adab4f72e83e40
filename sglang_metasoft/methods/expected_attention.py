"""Expected Attention (arXiv 2510.00636, section 3): the attention that future queries can be expected to pay."""

import torch

from sglang_metasoft.methods.base import Method
from sglang_metasoft.rope import rotate
from sglang_metasoft.types import LayerKind, LayerView, Probe, Prompt, Rope, Scores, ServedModel, Turning

FUTURE_TOKENS = 512


class ExpectedAttention(Method):
    """Queries before RoPE are taken for Gaussian; RoPE is averaged over the next positions.

    Importance: softmax over the span of ``mu·k s + s^2 k^T Sigma k / 2``, mean over the group, times the value's norm.
    The paper takes mean and covariance over all prompt tokens from their hidden states, which a server does not keep;
    here the last ``observed_tokens`` of the segment run once more and their queries are turned back.
    """

    default_consolidation = "none"

    def prepare(self, model: ServedModel) -> None:
        super().prepare(model)
        self.ropes = []
        for number, layer in enumerate(model.layers()):
            if layer.turning is Turning.OTHER and layer.kind is LayerKind.FULL:
                raise ValueError(
                    f"method expected_attention: layer {number} of this model does more to a query by its position "
                    "than to turn it; allowed: layers that turn it, or do nothing"
                )
            self.ropes.append(layer.rope)

    def probe(self, prompt: Prompt) -> Probe:
        return self.rerun(prompt, prompt.last_raw_ids(self.config.observed_tokens))

    def score_layer(self, view: LayerView) -> Scores:
        pool, job = view.pool, view.job
        t, heads, d = view.q.shape
        first = job.probe.first_position
        is_start = view.seen_tokens == 0 and job.plan.sink_tokens < t
        skipped = job.plan.sink_tokens if is_start else 0  # the paper leaves the sinks' queries out
        queries = view.q[skipped:].float()
        rope = self.ropes[view.layer]
        if rope is not None:
            queries = rotate(queries, rope, first + skipped, backwards=True)
        mean = queries.mean(0)  # [H, d]
        centered = (queries - mean).transpose(0, 1)
        covariance = centered.transpose(1, 2) @ centered / centered.shape[1]  # [H, d, d]
        if rope is not None:
            turn = mean_rotation(rope, first + t, d)
            mean, covariance = mean @ turn.t(), turn @ covariance @ turn.t()

        groups = pool.key.shape[1]
        keys = (pool.key[job.span_slots].float() * pool.key_scale).permute(1, 0, 2)  # [G, S, d]
        keys = keys.repeat_interleave(heads // groups, dim=0) * pool.scale
        logits = (keys @ mean.unsqueeze(-1)).squeeze(-1) + (keys @ covariance * keys).sum(-1) / 2  # [H, S]
        sink = job.plan.sink_tokens
        attention = logits[:, sink:].softmax(-1).unflatten(0, (groups, -1)).mean(1)
        sizes = pool.value[job.span_slots[sink:]].float().norm(dim=-1).t() * pool.value_scale
        rest = attention * sizes
        return Scores(torch.cat([rest.amax(1, keepdim=True).expand(-1, sink), rest], dim=1))


def mean_rotation(rope: Rope, first_position: int, d: int) -> torch.Tensor:
    """``[d, d]`` mean of the rotation matrices of the next positions, as far as the table goes."""
    first = min(first_position, rope.cos_sin.shape[0] - 1)
    table = rope.cos_sin[first : first + FUTURE_TOKENS].float().mean(0, keepdim=True)
    axes = torch.eye(d, device=table.device).unsqueeze(0)  # [1, d, d]: each axis a head
    return rotate(axes, Rope(table, rope.is_neox), 0).squeeze(0).t()

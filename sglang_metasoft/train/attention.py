"""Attention with its probabilities at hand: what answers look at (targets), what a probe looks at (with gradients), and
what answers see when entries fade (with gradients to the fading).

All are attend functions for :meth:`sglang_metasoft.train.backbone.Backbone.rows`.
"""

import torch

ROW_BLOCK = 256


def attention_map(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float):
    """Causal attention of the last rows of a sequence.

    Args:
        q: ``[H, t, d]``; k, v: ``[G, C + t, d]``, the rows' own entries last.

    Returns:
        Output ``[H, t, d]`` and probabilities ``[G, r, t, C + t]`` in float32.
    """
    heads, rows, d = q.shape
    groups, length = k.shape[:2]
    logits = (q.float() * scale).reshape(groups, -1, d) @ k.float().transpose(1, 2)  # [G, r t, C + t]
    logits = logits.view(groups, heads // groups, rows, length)
    future = torch.ones(rows, length, dtype=torch.bool, device=q.device).triu(length - rows + 1)
    probabilities = logits.masked_fill(future, float("-inf")).softmax(-1)
    out = probabilities.reshape(groups, -1, length) @ v.float()
    return out.view(heads, rows, d).to(q.dtype), probabilities


class Watch:
    """Records what rows pay to the context, per layer: the mean over marked rows, and the maximum over them.

    Args:
        context: C, entries before the rows.
        marked: ``[n, t]`` bool: n sets of rows; each gets a mean map of its own.
        maximum: also keep the maximum over the rows of the last set.
    """

    def __init__(self, context: int, marked: torch.Tensor, maximum: bool = False) -> None:
        self.context, self.weights, self.maximum = context, marked.float(), maximum
        self.weights = self.weights / self.weights.sum(1, keepdim=True).clamp_min(1)
        self.means: list[torch.Tensor] = []  # [n, G, C + t] a layer, averaged over the group's heads
        self.maxima: list[torch.Tensor] = []  # [G, C] a layer

    def __call__(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
        rows, before = q.shape[1], k.shape[1] - q.shape[1]
        outs = []
        means = k.new_zeros(self.weights.shape[0], k.shape[0], k.shape[1], dtype=torch.float32)
        largest = k.new_zeros(k.shape[0], self.context, dtype=torch.float32)
        for begin in range(0, rows, ROW_BLOCK):
            end = min(begin + ROW_BLOCK, rows)
            out, probabilities = attention_map(q[:, begin:end], k[:, : before + end], v[:, : before + end], scale)
            outs.append(out)
            means[..., : before + end] += torch.einsum("nt,gts->ngs", self.weights[:, begin:end], probabilities.mean(1))
            if self.maximum:
                seen = probabilities[..., : self.context] * (self.weights[-1, begin:end, None] > 0)
                largest = torch.maximum(largest, seen.amax(dim=(1, 2)))
        self.means.append(means)
        self.maxima.append(largest)
        return torch.cat(outs, dim=1)


class Probing:
    """Importance of the span under a probe, with gradients, as the server computes it.

    Args:
        span: S, first entries of the context that may be dropped.
    """

    def __init__(self, span: int) -> None:
        self.span = span
        self.importance: list[torch.Tensor] = []  # [G, S] a layer

    def __call__(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
        heads, rows, d = q.shape
        groups, length = k.shape[:2]
        # The context's own entries need no gradients, which would be as large as they are.
        (old_k, new_k), (old_v, new_v) = (_split(entries.float(), length - rows) for entries in (k, v))
        queries = (q.float() * scale).reshape(groups, -1, d)
        seen = (queries @ old_k.transpose(1, 2)).view(groups, -1, rows, length - rows)
        future = torch.ones(rows, rows, dtype=torch.bool, device=q.device).triu(1)
        own = (queries @ new_k.transpose(1, 2)).view(groups, -1, rows, rows).masked_fill(future, float("-inf"))
        probabilities = torch.cat([seen, own], -1).softmax(-1)
        self.importance.append(probabilities[..., : self.span].mean(dim=(1, 2)))
        seen, own = probabilities.flatten(1, 2).split((length - rows, rows), -1)
        return (seen @ old_v + own @ new_v).view(heads, rows, d).to(q.dtype)


class Fading:
    """Attention to a context whose entries are faded out, or made to carry others, with gradients to how much.

    Args:
        log_keep: ``[layers, G, S]``, added to the logits of the context's first S entries: at most 0 for what fades,
            -inf for what is gone, above 0 for what carries more than itself.
    """

    def __init__(self, log_keep: torch.Tensor) -> None:
        self.log_keep = log_keep

    def __call__(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
        (heads, rows, d), (groups, length) = q.shape, k.shape[:2]
        faded = self.log_keep[layer]
        logits = (q.float() * scale).reshape(groups, -1, d) @ k.float().transpose(1, 2)
        first, rest = logits.split((faded.shape[1], length - faded.shape[1]), -1)
        future = torch.ones(rows, rest.shape[-1], dtype=torch.bool, device=q.device).triu(rest.shape[-1] - rows + 1)
        rest = rest.view(groups, -1, rows, rest.shape[-1]).masked_fill(future, float("-inf")).flatten(1, 2)
        probabilities = torch.cat([first + faded.unsqueeze(1), rest], -1).softmax(-1)
        return (probabilities @ v.float()).view(heads, rows, d).to(q.dtype)


def _split(entries: torch.Tensor, context: int) -> tuple[torch.Tensor, torch.Tensor]:
    return entries[:, :context].detach(), entries[:, context:]

"""Drop entries of a context and see what is left of its answers: the check on tasks, not on maps."""

import math
from typing import NamedTuple

import torch
from metasoft_kernels.bias.naive import log_biases
from metasoft_kernels.merge import gather
from metasoft_kernels.select import split_top
from torch.nn.functional import avg_pool1d, cross_entropy

from sglang_metasoft.consolidations.repeats import demote_repeats
from sglang_metasoft.pipeline.plan import MIN_KEPT_SLOTS
from sglang_metasoft.train.attention import Fading, Probing
from sglang_metasoft.train.backbone import Attend, Backbone, Layers
from sglang_metasoft.train.prepare import SINKS, Context

SNAPKV_POOL = 5


class AnswerScore(NamedTuple):
    """How well answers survive, over their tokens."""

    loss: float  # mean negative log-probability
    exact: float  # share of answers whose every token is the greedy one


def kept_slots(context: Context, ratio: float) -> int:
    """B, as the server's policy sets it."""
    span, tail = len(context.span_ids), context.layers.length - len(context.span_ids)
    return min(span, max(math.ceil((span + tail) / ratio) - tail, MIN_KEPT_SLOTS))


def cut_slots(context: Context, ratio: float, by: str = "span") -> int:
    """Entries that the answers' cut leaves of the span.

    Args:
        by: ``prompt`` for B as the server's policy sets it, ``span`` for that share of the span: training prompts are
            shorter than those served, and with the raw window taken off their budget they keep next to nothing.
    """
    if by == "prompt":
        return kept_slots(context, ratio)
    span = len(context.span_ids)
    return min(span, max(math.ceil(span / ratio), MIN_KEPT_SLOTS))


def top(importance: torch.Tensor, kept: int, repeats: torch.Tensor | None = None) -> torch.Tensor:
    """``[layers, G, B]`` indices kept of ``[layers, G, S]``, sinks included; ``repeats`` stand back (``key_bias``)."""
    layers = importance.float()
    if repeats is not None:
        layers = [demote_repeats(layer, repeats[0]) for layer in layers]
    return torch.stack([split_top(layer, kept, SINKS)[0] for layer in layers])


def overlap(ours: torch.Tensor, theirs: torch.Tensor, span: int) -> float:
    """Share of ``[layers, G, B]`` indices in common."""
    marks = [torch.zeros(*i.shape[:2], span, dtype=torch.bool).scatter_(2, i.cpu(), True) for i in (ours, theirs)]
    return ((marks[0] & marks[1]).sum() / marks[0].sum()).item()


@torch.no_grad()
def snapkv(backbone: Backbone, context: Context) -> torch.Tensor:
    """``[layers, G, S]`` importance under SnapKV's window, pooled over neighbours; of layers that see all tokens."""
    window, length = len(context.last_ids), context.layers.length
    probing = Probing(len(context.span_ids))
    before = Layers((k[:, : length - window], v[:, : length - window]) for k, v in context.layers)
    backbone.rows(context.last_ids.to(backbone.device), before, probing)
    raw = torch.stack(probing.importance)
    return avg_pool1d(raw.flatten(0, 1), SNAPKV_POOL, 1, SNAPKV_POOL // 2).view_as(raw)


def shorten(context: Context, kept: torch.Tensor, full_layers: list[int]) -> Layers:
    """The context with the kept entries of its span and all of its tail; all entries in layers of a window."""
    span, indices_of = len(context.span_ids), dict(zip(full_layers, kept.to(context.layers[0][0].device), strict=True))
    layers = []
    for number, (keys, values) in enumerate(context.layers):
        if number not in indices_of:
            layers.append((keys, values))
            continue
        indices = indices_of[number]
        picked = (gather(entries[:, :span].transpose(0, 1), indices).transpose(0, 1) for entries in (keys, values))
        layers.append(tuple(torch.cat([p, e[:, span:]], 1) for p, e in zip(picked, (keys, values), strict=True)))
    return Layers(layers)


def with_biases(mass: torch.Tensor, kept: torch.Tensor, repeats: torch.Tensor) -> Fading:
    """Attention to kept entries ``[layers, G, B]`` alone, each with what ``key_bias`` lets it carry.

    Args:
        mass: ``[layers, G, S]`` attention that entries stand for.
        repeats: as :func:`sglang_metasoft.consolidations.repeats.find_repeats` gives.
    """
    biases = torch.stack([log_biases(m.float(), k, repeats, SINKS) for m, k in zip(mass, kept, strict=True)])
    return Fading(torch.full_like(mass.float(), float("-inf")).scatter_(2, kept, biases))


@torch.no_grad()
def answer_score(
    backbone: Backbone, context: Context, layers: Layers | None = None, attend: Attend | None = None
) -> AnswerScore:
    """Answers over ``layers`` in place of the context's own; the last prompt token is run again over them."""
    losses, hits, tokens = 0.0, 0, 0
    for number, (_, answer) in enumerate(context.answers):
        logits = answer_logits(backbone, context, number, layers, attend).float()
        wanted = backbone.tensor(answer)
        losses += cross_entropy(logits, wanted, reduction="sum").item()
        hits += bool((logits.argmax(-1) == wanted).all())
        tokens += len(answer)
    return AnswerScore(losses / tokens, hits / len(context.answers))


def answer_logits(
    backbone: Backbone, context: Context, number: int, layers: Layers | None = None, attend: Attend | None = None
) -> torch.Tensor:
    """``[t, vocab]`` logits for answer ``number`` of the context, teacher-forced, over ``layers`` or its own KV."""
    layers = context.layers if layers is None else layers
    length = context.layers.length
    question, answer = context.answers[number]
    past, start = layers, length
    if not question:
        question = context.last_ids[-1:].tolist()
        past, start = Layers((k[:, :-1], v[:, :-1]) for k, v in layers), length - 1
    rows = backbone.tensor(question + answer[:-1])
    return backbone.rows(rows, past, attend, start=start, logits=True)[0][-len(answer) :]

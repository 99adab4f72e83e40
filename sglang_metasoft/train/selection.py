"""Drop entries of a context and see what is left of its answers: the check on tasks, not on maps."""

import math
from typing import NamedTuple

import torch
from metasoft_kernels.merge import gather
from metasoft_kernels.merge.key_bias import shares, towards_repeats
from metasoft_kernels.select import split_top
from torch.nn.functional import avg_pool1d, cross_entropy

from sglang_metasoft.policy import MIN_KEPT_SLOTS
from sglang_metasoft.repeats import favour_one_of_each
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
        layers = [favour_one_of_each(layer, repeats[0]) for layer in layers]
    return torch.stack([split_top(layer, kept, SINKS)[0] for layer in layers])


def overlap(ours: torch.Tensor, theirs: torch.Tensor, span: int) -> float:
    """Share of ``[layers, G, B]`` indices in common."""
    marks = [torch.zeros(*i.shape[:2], span, dtype=torch.bool).scatter_(2, i.cpu(), True) for i in (ours, theirs)]
    return ((marks[0] & marks[1]).sum() / marks[0].sum()).item()


@torch.no_grad()
def snapkv(backbone: Backbone, context: Context) -> torch.Tensor:
    """``[layers, G, S]`` importance under SnapKV's window, pooled over neighbours."""
    window, length = len(context.last_ids), context.layers.length
    probing = Probing(len(context.span_ids))
    before = Layers((k[:, : length - window], v[:, : length - window]) for k, v in context.layers)
    backbone.rows(context.last_ids.to(backbone.device), before, probing)
    raw = torch.stack(probing.importance)
    return avg_pool1d(raw.flatten(0, 1), SNAPKV_POOL, 1, SNAPKV_POOL // 2).view_as(raw)


def shorten(context: Context, kept: torch.Tensor) -> Layers:
    """The context with the kept entries of its span and all of its tail."""
    span = len(context.span_ids)
    layers = []
    for (keys, values), indices in zip(context.layers, kept.to(context.layers[0][0].device), strict=True):
        picked = (gather(entries[:, :span].transpose(0, 1), indices).transpose(0, 1) for entries in (keys, values))
        layers.append(tuple(torch.cat([p, e[:, span:]], 1) for p, e in zip(picked, (keys, values), strict=True)))
    return Layers(layers)


def with_biases(
    context: Context, mass: torch.Tensor, kept: torch.Tensor, repeats: torch.Tensor
) -> tuple[Layers, Fading]:
    """The context as ``key_bias`` leaves it, for :func:`answer_score`: moved entries, and attention to them alone.

    Args:
        mass: ``[layers, G, S]`` attention that entries stand for.
        kept: ``[layers, G, B]``.
        repeats: as :func:`sglang_metasoft.repeats.find_repeats` gives.
    """
    layers, biases = [], []
    for (keys, values), weights, indices in zip(context.layers, mass.float(), kept, strict=True):
        entries = [part[:, : weights.shape[1]].transpose(0, 1).to(mass.device) for part in (keys, values)]
        found = shares(weights, indices, repeats, SINKS)
        moved = towards_repeats(*entries, indices, repeats, found)
        place = indices.unsqueeze(-1).expand(-1, -1, keys.shape[-1])
        moves = moved.key_moves.transpose(0, 1).to(keys)
        layers.append(
            (keys.scatter_add(1, place.to(keys.device), moves),
             values.scatter(1, place.to(keys.device), moved.values.transpose(0, 1).to(values)))
        )  # fmt: skip
        biases.append(torch.full_like(weights, float("-inf")).scatter_(1, indices, found.bias))
    return Layers(layers), Fading(torch.stack(biases))


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

"""Validation: overlap with the true-attention oracle, and answers over the compressed context, beside other methods."""

from collections.abc import Callable, Iterable
from statistics import mean

import torch

from sglang_metasoft.train.backbone import Backbone
from sglang_metasoft.train.dataset import Dataset
from sglang_metasoft.train.prepare import Context, Store
from sglang_metasoft.train.selection import answer_score, kept_slots, overlap, shorten, snapkv, top
from sglang_metasoft.train.settings import TrainSettings
from sglang_metasoft.train.student import Student

RATIOS = (4, 8)
FIRST_VALIDATION_CASE = 1_000_000
Ranker = Callable[[Backbone, Context], torch.Tensor]  # -> [layers, G, S]


@torch.no_grad()
def ranking(student: Student) -> Ranker:
    """The student's log importance."""
    return lambda backbone, context: student.refine(student.probe(backbone, context), context, backbone)


RANKERS: dict[str, Ranker] = {"snapkv": snapkv, "oracle": lambda backbone, context: context.target}


@torch.no_grad()
def evaluate(
    backbone: Backbone, contexts: Iterable[Context], rankers: dict[str, Ranker], ratios=RATIOS
) -> dict[str, float]:
    """Mean scores over contexts.

    Returns:
        For each ranker, mode and ratio: ``overlap`` with the oracle's choice, the rise of the answers' ``loss`` over
        the uncompressed context, and the share of ``exact`` answers among those exact without compression.
    """
    rows: dict[str, list[float]] = {}
    for context in contexts:
        mode = "boundary" if context.at_boundary else "inside"
        full = answer_score(backbone, context)
        span = len(context.span_ids)
        for ratio in ratios:
            kept = kept_slots(context, ratio)
            oracle = top(context.target, kept)
            for name, ranker in rankers.items():
                chosen = top(ranker(backbone, context).cpu(), kept)
                score = answer_score(backbone, context, shorten(context, chosen))
                key = f"{name} {mode} {ratio}x"
                rows.setdefault(f"overlap {key}", []).append(overlap(chosen, oracle, span))
                rows.setdefault(f"answer loss {key}", []).append(score.loss - full.loss)
                if full.exact:
                    rows.setdefault(f"exact {key}", []).append(score.exact / full.exact)
    return {name: mean(values) for name, values in rows.items()}


def validation_contexts(dataset: Dataset, store: Store, settings: TrainSettings) -> Iterable[Context]:
    """Two contexts of each validation case: a question inside, and the boundary before all questions."""
    for number in range(settings.validation_cases):
        prepared = store.get(dataset[FIRST_VALIDATION_CASE + number])
        yield prepared.inside(0, settings.window)
        yield prepared.boundary(settings.window)

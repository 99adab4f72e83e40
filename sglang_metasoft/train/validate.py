"""Validation: overlap with the true-attention oracle, and answers over the compressed context, beside other methods."""

from collections.abc import Callable, Iterable
from statistics import mean

import torch

from sglang_metasoft.consolidations.repeats import find_repeats
from sglang_metasoft.train.answer_check import answer_score, kept_slots, overlap, shorten, snapkv, top, with_biases
from sglang_metasoft.train.backbone import Backbone
from sglang_metasoft.train.dataset import Dataset
from sglang_metasoft.train.prepare import Context, Store
from sglang_metasoft.train.settings import TrainSettings
from sglang_metasoft.train.student import Student
from sglang_metasoft.types import Scores

RATIOS = (4, 8)
FIRST_VALIDATION_CASE = 1_000_000
Ranker = Callable[[Backbone, Context], Scores]  # of all layers: [layers, G, S]


def ranking(student: Student) -> Ranker:
    """The student's view of a context."""

    def scores(backbone: Backbone, context: Context) -> Scores:
        mass = student.probe(backbone, context)
        log_importance = student.refine(mass, context, backbone)
        return Scores(log_importance.softmax(-1), student.carried(mass, log_importance))

    return scores


RANKERS: dict[str, Ranker] = {
    "snapkv": lambda backbone, context: Scores(snapkv(backbone, context)),
    "oracle": lambda backbone, context: Scores(context.target),
}


@torch.no_grad()
def evaluate(
    backbone: Backbone,
    contexts: Iterable[Context],
    rankers: dict[str, Ranker],
    ratios=RATIOS,
    biases_keys: bool = False,
) -> dict[str, float]:
    """Mean scores over contexts.

    Args:
        biases_keys: rank and bias as ``key_bias`` does; the biases are added to logits, where the server writes them
            into keys.

    Returns:
        For each ranker, mode and ratio: ``overlap`` with the oracle's choice, the rise of the answers' ``loss`` over
        the uncompressed context, and the share of ``exact`` answers among those exact without compression.
    """
    rows: dict[str, list[float]] = {}
    for context in contexts:
        mode = "boundary" if context.at_boundary else "inside"
        full = answer_score(backbone, context)
        span = len(context.span_ids)
        device = backbone.device
        repeats = find_repeats(context.span_ids.to(device)) if biases_keys else None
        for name, ranker in rankers.items():
            importance, mass = (part if part is None else part.to(device) for part in ranker(backbone, context))
            for ratio in ratios:
                kept = kept_slots(context, ratio)
                oracle = top(context.target.to(device), kept, repeats)
                chosen = top(importance, kept, repeats)
                if repeats is None:
                    score = answer_score(backbone, context, shorten(context, chosen, backbone.full_layers))
                else:
                    carried = with_biases(importance if mass is None else mass, chosen, repeats)
                    score = answer_score(backbone, context, attend=carried)
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

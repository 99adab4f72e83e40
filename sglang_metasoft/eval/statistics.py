"""Means, retention and confidence intervals of evaluation records."""

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from sglang_metasoft.eval.metrics import FIDELITY, PERPLEXITY
from sglang_metasoft.eval.records import FULL

RESAMPLES = 2000
ABLE = 0.3  # a task counts once the full cache reaches this score
CASE = ("task", "seed", "length_tokens", "index", "turn")
Pairs = dict[str, np.ndarray]  # task -> [cases, 2] score of the method and of the full cache


def case_of(record: dict) -> tuple:
    """What identifies a case's turn, whatever answered it."""
    return tuple(record[name] for name in CASE)


def full_scores(records: Iterable[dict], mode: str) -> dict[tuple, float]:
    """The full cache's score of each case, from the mode itself or, where that lacks it, from any other."""
    found: dict[tuple, float] = {}
    for record in records:
        if record["method"] == FULL and record["score"] is not None and record["metric"] not in (PERPLEXITY, FIDELITY):
            if record["mode"] == mode or case_of(record) not in found:
                found[case_of(record)] = record["score"]
    return found


def able_tasks(full: dict[tuple, float]) -> list[str]:
    """Tasks whose mean score with the full cache is at least :data:`ABLE`."""
    by_task = defaultdict(list)
    for case, value in full.items():
        by_task[case[0]].append(value)
    return sorted(task for task, values in by_task.items() if np.mean(values) >= ABLE)


def paired(records: Iterable[dict], full: dict[tuple, float], tasks: Iterable[str]) -> Pairs:
    """Scores beside the full cache's, for the cases that both have."""
    wanted, found = set(tasks), defaultdict(list)
    for record in records:
        case = case_of(record)
        if record["task"] in wanted and record["score"] is not None and case in full:
            found[record["task"]].append((record["score"], full[case]))
    return {task: np.array(values) for task, values in sorted(found.items())}


def task_means(pairs: Pairs) -> np.ndarray:
    """``[1, tasks, 2]`` mean scores."""
    return np.array([[values.mean(axis=0) for values in pairs.values()]])


def resampled_means(pairs: Pairs, seed: int = 0) -> np.ndarray:
    """``[resamples, tasks, 2]`` mean scores of bootstrap samples; cases are drawn within their task, as pairs."""
    rng = np.random.default_rng(seed)
    drawn = [values[rng.integers(len(values), size=(RESAMPLES, len(values)))].mean(axis=1) for values in pairs.values()]
    return np.stack(drawn, axis=1)


def score(means: np.ndarray) -> np.ndarray:
    """Mean over tasks of the method's mean score, for each sample."""
    return means[:, :, 0].mean(axis=1)


def retention(means: np.ndarray) -> np.ndarray:
    """The method's mean over tasks, over the same of the full cache, for each sample."""
    method, full = means.mean(axis=1).T
    return np.divide(method, full, out=np.full_like(method, np.nan), where=full > 0)


def advantage(means: np.ndarray) -> np.ndarray:
    """What the second of each pair has over the first, mean over tasks, for each sample."""
    method, reference = means.mean(axis=1).T
    return reference - method


def estimate(pairs: Pairs, statistic: Callable[[np.ndarray], np.ndarray]) -> tuple[float, tuple[float, float]]:
    """A statistic and its 95 % bootstrap interval."""
    samples = statistic(resampled_means(pairs))
    interval = float(np.nanpercentile(samples, 2.5)), float(np.nanpercentile(samples, 97.5))
    return float(statistic(task_means(pairs))[0]), interval


def perplexity(records: Iterable[dict]) -> dict[tuple[str, float], float]:
    """Perplexity by method and ratio, each token once."""
    sums: dict[tuple[str, float], list[float]] = defaultdict(lambda: [0.0, 0.0])
    for record in records:
        if record["metric"] == PERPLEXITY and record["score"] is not None:
            entry = sums[record["method"], record["ratio"]]
            entry[0] += record["score"] * record["scored_tokens"]
            entry[1] += record["scored_tokens"]
    return {key: float(np.exp(-total / tokens)) for key, (total, tokens) in sums.items() if tokens}


def by_document(records: Iterable[dict]) -> dict[str, np.ndarray]:
    """For each document tokens counted, first choices kept and the rise of the loss in nats, summed over its turns."""
    sums: dict[str, np.ndarray] = defaultdict(lambda: np.zeros(3))
    for record in records:
        if record["metric"] == FIDELITY and record["score"] is not None:
            tokens = record["tokens"]
            sums[record["document"]] += tokens, record["agreed"], record["nats"] * tokens
    return dict(sums)


def fidelity(documents: dict[str, np.ndarray], seed: int = 0) -> dict:
    """Share of first choices kept and rise of the loss per token, with 95 % bootstrap intervals.

    Whole documents are drawn, not tokens: the tokens of one answer stand and fall together.

    Args:
        documents: of :func:`by_document`; at least one.
    """
    values = np.stack(list(documents.values()))
    drawn = values[np.random.default_rng(seed).integers(len(values), size=(RESAMPLES, len(values)))].sum(axis=1)
    tokens, agreed, nats = values.T
    names = list(documents)
    result: dict[str, Any] = {"documents": len(names), "tokens": int(tokens.sum())}
    for name, part, worst in (("kept", agreed, np.argmin), ("nats", nats, np.argmax)):
        column = 1 if name == "kept" else 2
        shares = drawn[:, column] / drawn[:, 0]
        last = int(worst(part / tokens))
        result |= {
            name: float(part.sum() / tokens.sum()),
            f"{name}_interval": (float(np.percentile(shares, 2.5)), float(np.percentile(shares, 97.5))),
            f"{name}_worst": float(part[last] / tokens[last]),
            f"{name}_worst_document": names[last],
        }
    return result

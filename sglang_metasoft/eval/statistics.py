"""Means, retention and confidence intervals of evaluation records."""

from collections import defaultdict
from collections.abc import Callable, Iterable

import numpy as np

from sglang_metasoft.eval.metrics import PERPLEXITY
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
        if record["method"] == FULL and record["score"] is not None and record["metric"] != PERPLEXITY:
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


def retention(pairs: Pairs) -> float:
    """Mean over tasks of the method's mean score, over the same of the full cache."""
    means = np.array([values.mean(axis=0) for values in pairs.values()])
    method, full = means.mean(axis=0)
    return float(method / full) if full else float("nan")


def mean_score(pairs: Pairs) -> float:
    """Mean over tasks of the method's mean score."""
    return float(np.mean([values[:, 0].mean() for values in pairs.values()]))


def interval(pairs: Pairs, statistic: Callable[[Pairs], float], seed: int = 0) -> tuple[float, float]:
    """95 % bootstrap interval; cases are drawn within their task, each with its full cache's score."""
    rng = np.random.default_rng(seed)
    drawn = []
    for _ in range(RESAMPLES):
        sample = {task: values[rng.integers(len(values), size=len(values))] for task, values in pairs.items()}
        drawn.append(statistic(sample))
    low, high = np.nanpercentile(drawn, [2.5, 97.5])
    return float(low), float(high)


def perplexity(records: Iterable[dict]) -> dict[tuple[str, float], float]:
    """Perplexity by method and ratio, each token once."""
    sums: dict[tuple[str, float], list[float]] = defaultdict(lambda: [0.0, 0.0])
    for record in records:
        if record["metric"] == PERPLEXITY and record["score"] is not None:
            entry = sums[record["method"], record["ratio"]]
            entry[0] += record["score"] * record["scored_tokens"]
            entry[1] += record["scored_tokens"]
    return {key: float(np.exp(-total / tokens)) for key, (total, tokens) in sums.items() if tokens}

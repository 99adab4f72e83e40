"""What a compressor keeps, measured on prompts that it never saw: the report that goes with it."""

import html
import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from sglang_metasoft.consolidations.repeats import find_repeats
from sglang_metasoft.train.answer_check import answer_logits, kept_slots, snapkv, top, with_biases
from sglang_metasoft.train.backbone import Backbone
from sglang_metasoft.train.prepare import Context
from sglang_metasoft.train.validate import Ranker
from sglang_metasoft.types import Scores

RATIOS = (2, 4, 8, 16)
MODES = {True: "after", False: "inside"}  # where the question stands: unknown at compression, or in the prompt
KEPT_SHARE = 0.98  # of the full cache's first choices: the limit that the server warns of
ANSWERS_A_CONTEXT = 2
RESAMPLES = 1000
LENGTH_STEP_TOKENS = 1024
ORACLE, WINDOW, NOTHING = "oracle", "snapkv", "window"
NAMES = {
    ORACLE: "attention of the answer itself (bound)",
    WINDOW: "training-free (SnapKV)",
    NOTHING: "last tokens only",
}


class Row(NamedTuple):
    """One context, ranking and ratio; sums over its answers."""

    ranker: str
    ratio: int
    mode: str
    family: str
    prompt_tokens: int
    tokens: int  # of the answers
    kept: int  # tokens whose first choice is that of the full cache
    rise: float  # of the negative log-likelihood, nats
    answers: int
    whole: int  # answers that keep all first choices


def last_first(backbone: Backbone, context: Context) -> Scores:
    """Sinks and the last entries: what a cache keeps that knows nothing."""
    return Scores(torch.arange(1.0, len(context.span_ids) + 1).expand(context.target.shape))


BASELINES: dict[str, Ranker] = {
    ORACLE: lambda backbone, context: Scores(context.target),
    WINDOW: lambda backbone, context: Scores(snapkv(backbone, context)),
    NOTHING: last_first,
}


@torch.no_grad()
def measure(
    backbone: Backbone,
    contexts: Iterable[tuple[str, Context]],
    rankers: dict[str, Ranker],
    ratios: Sequence[int] = RATIOS,
) -> list[Row]:
    """Teacher-force each context's answers over its own entries and over what each ranking keeps, as ``key_bias``.

    Args:
        contexts: with the family of their task.
    """
    rows = []
    for family, context in tqdm(contexts, desc="report", unit="prompt"):
        repeats = find_repeats(context.span_ids.to(backbone.device))
        numbers = range(min(len(context.answers), ANSWERS_A_CONTEXT))
        full = [_choices(backbone, context, number) for number in numbers]
        for name, ranker in rankers.items():
            importance, mass = (
                part if part is None else part.to(backbone.device) for part in ranker(backbone, context)
            )
            for ratio in ratios:
                chosen = top(importance, kept_slots(context, ratio), repeats)
                attend = with_biases(importance if mass is None else mass, chosen, repeats)
                sums = np.zeros(5)
                for number, (first, loss) in zip(numbers, full, strict=True):
                    own, own_loss = _choices(backbone, context, number, attend)
                    same = (own == first).sum().item()
                    sums += [len(first), same, own_loss - loss, 1, same == len(first)]
                tokens, kept, rise, answers, whole = sums.tolist()
                rows.append(
                    Row(
                        name, ratio, MODES[context.at_boundary], family, context.layers.length,
                        int(tokens), int(kept), rise, int(answers), int(whole),
                    )
                )  # fmt: skip
    return rows


def _choices(backbone: Backbone, context: Context, number: int, attend=None) -> tuple[torch.Tensor, float]:
    """First choices at each token of an answer, and the answer's negative log-likelihood."""
    logits = answer_logits(backbone, context, number, attend=attend).float()
    wanted = backbone.tensor(context.answers[number][1])
    return logits.argmax(-1), cross_entropy(logits, wanted, reduction="sum").item()


def summarize(rows: list[Row]) -> list[dict]:
    """Cells by ranking, ratio and mode; of all prompts, and by family and length.

    Returns:
        Dicts with ``kept`` (share of first choices), ``kept_low`` and ``kept_high`` (95 %, prompts resampled), ``rise``
        (nats a token) with its interval, ``whole`` (share of answers), ``worst`` (lowest share of one prompt), ``n``.
    """
    cells = defaultdict(list)
    for row in rows:
        lower = row.prompt_tokens // LENGTH_STEP_TOKENS * LENGTH_STEP_TOKENS
        for group in ("all", f"task {row.family}", f"from {lower} tokens"):
            cells[row.ranker, row.ratio, row.mode, group].append(row)
    return [
        {"ranker": ranker, "ratio": ratio, "mode": mode, "group": group} | _cell(members)
        for (ranker, ratio, mode, group), members in cells.items()
    ]


def _cell(rows: list[Row]) -> dict:
    values = np.array([[row.kept, row.rise, row.whole, row.tokens, row.answers] for row in rows], dtype=float)
    drawn = np.random.default_rng(0).integers(len(rows), size=(RESAMPLES, len(rows)))
    samples = values[drawn].sum(1)
    total = values.sum(0)
    (low, high), (rise_low, rise_high) = (_interval(samples[:, which] / samples[:, 3]) for which in (0, 1))
    return {
        "kept": total[0] / total[3], "kept_low": low, "kept_high": high, "rise": total[1] / total[3],
        "rise_low": rise_low, "rise_high": rise_high, "whole": total[2] / total[4],
        "worst": float((values[:, 0] / values[:, 3]).min()), "n": len(rows), "tokens": int(total[3]),
    }  # fmt: skip


def _interval(samples: np.ndarray) -> tuple[float, float]:
    return float(np.percentile(samples, 2.5)), float(np.percentile(samples, 97.5))


def limit_ratio(cells: list[dict], ranker: str) -> int | None:
    """The highest ratio up to which the lower bounds of both modes keep ``KEPT_SHARE`` of the first choices."""
    limit = None
    for ratio in sorted({cell["ratio"] for cell in cells}):
        found = [c for c in cells if (c["ranker"], c["ratio"], c["group"]) == (ranker, ratio, "all")]
        if not all(cell["kept_low"] >= KEPT_SHARE for cell in found):
            break
        limit = ratio
    return limit


def short(cells: list[dict], ranker: str) -> dict:
    """What the compressor's configuration says of it: shares kept by ratio and mode, and the limit."""
    kept: dict[str, dict[str, float]] = {}
    for cell in cells:
        if cell["ranker"] == ranker and cell["group"] == "all":
            kept.setdefault(str(cell["ratio"]), {})[cell["mode"]] = round(cell["kept"], 4)
    return {"kept": kept, "limit_ratio": limit_ratio(cells, ranker)}


def text(cells: list[dict], ranker: str) -> str:
    """A few lines for the terminal."""
    lines = [f"{'first choices kept':40}" + "".join(f"{f'{ratio}x {mode}':>12}" for ratio, mode in _columns(cells))]
    for name in dict.fromkeys(cell["ranker"] for cell in cells):
        found = {
            (c["ratio"], c["mode"]): f"{c['kept']:.1%}" for c in cells if c["ranker"] == name and c["group"] == "all"
        }
        lines.append(f"{NAMES.get(name, name):40}" + "".join(f"{found[column]:>12}" for column in _columns(cells)))
    limit = limit_ratio(cells, ranker)
    share = f"{KEPT_SHARE:.0%} of the first choices, lower bound"
    lines.append(f"highest ratio that keeps {share}: {limit or 'none of those measured'}")
    return "\n".join(lines)


def _columns(cells: list[dict]) -> list[tuple[int, str]]:
    return sorted({(cell["ratio"], cell["mode"]) for cell in cells}, key=lambda column: (column[1] != "inside", column))


def write(folder: Path, cells: list[dict], facts: dict, ranker: str) -> None:
    """``report.json`` and ``report.html``."""
    found = {"facts": facts | short(cells, ranker), "cells": cells}
    (folder / "report.json").write_text(json.dumps(found, indent=1) + "\n")
    limit = limit_ratio(cells, ranker)
    named = {f"highest ratio that keeps {KEPT_SHARE:.0%} of first choices, lower bound": limit or "none of those below"}
    (folder / "report.html").write_text(_page(cells, facts | named, ranker))


def _page(cells: list[dict], facts: dict, ranker: str) -> str:
    head = "<tr><th>" + "<th>".join(
        ("ranking", "ratio", "question", "first choices kept", "rise of the loss, nats a token", "answers kept whole",
         "worst prompt", "prompts")
    )  # fmt: skip
    parts = []
    for group in sorted({cell["group"] for cell in cells}, key=lambda name: (name != "all", name)):
        lines = [
            f"<tr><td>{html.escape(NAMES.get(c['ranker'], c['ranker']))}<td>{c['ratio']}<td>{c['mode']}"
            f"<td>{c['kept']:.1%} ({c['kept_low']:.1%} to {c['kept_high']:.1%})"
            f"<td>{c['rise']:+.3f} ({c['rise_low']:+.3f} to {c['rise_high']:+.3f})"
            f"<td>{c['whole']:.0%}<td>{c['worst']:.0%}<td>{c['n']}"
            for c in cells
            if c["group"] == group and (group == "all" or c["ranker"] == ranker)
        ]
        title = "All prompts" if group == "all" else group.capitalize()
        parts.append(f"<h2>{html.escape(title)}</h2><table>{head}{''.join(lines)}</table>")
    listed = "".join(f"<li>{html.escape(str(name))}: {html.escape(str(value))}" for name, value in facts.items())
    return (
        "<!doctype html><meta charset=utf-8><title>Compressor report</title>"
        "<style>body{font:16px sans-serif;max-width:60em;margin:2em auto}td,th{padding:.2em .8em;text-align:left}"
        "table{border-collapse:collapse}tr:nth-child(even){background:#eee}</style>"
        "<h1>What this compressor keeps</h1><p>The full cache's own answers, or known ones, read again over the "
        "compressed cache. “inside”: the question is part of the prompt; “after”: it comes when the document is "
        f"compressed already.</p><ul>{listed}</ul>{''.join(parts)}\n"
    )

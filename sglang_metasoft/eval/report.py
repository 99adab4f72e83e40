"""From result files to JSON, a Markdown table and plots."""

import json
from collections import Counter, defaultdict
from pathlib import Path

from sglang_metasoft.eval.metrics import FIDELITY
from sglang_metasoft.eval.records import FULL, key_of, read_records
from sglang_metasoft.eval.statistics import (
    able_tasks,
    advantage,
    by_document,
    case_of,
    estimate,
    fidelity,
    full_scores,
    paired,
    perplexity,
    retention,
    score,
)
from sglang_metasoft.eval.tasks import TRAINED_FAMILIES

ALL, SEEN, UNSEEN = "all", "seen", "unseen"
FIDELITY_PLACE = ("split", "length_tokens", "mode", "method", "ratio")


def load(paths: list[Path]) -> list[dict]:
    """The records of several files; of a key that occurs twice the last one counts.

    Raises:
        ValueError: a file is missing or is no result file.
    """
    records: dict[tuple, dict] = {}
    for path in paths:
        if not path.is_file():
            raise ValueError(f"{path} does not exist; allowed: result files of sglang-metasoft eval")
        for record in read_records(path):
            records[key_of(record)] = record
    if not records:
        raise ValueError(f"no records in {', '.join(map(str, paths))}")
    return list(records.values())


def summarise(records: list[dict], reference: str | None = None) -> dict:
    """Everything the report shows, as plain data.

    Args:
        reference: a method that all others are compared with.

    Returns:
        ``cells``: one entry for each length, mode, group of families, method and ratio, with mean score, retention and
        their 95 % intervals; ``tasks``: mean score of each task; ``fidelity``: one entry for each split, length, mode,
        method, ratio and kind of document (``all``: together); ``perplexity``; ``problems``: answers that were not
        scored, by method and reason.
    """
    cells, tasks, books, comparisons = [], [], [], []
    settings = sorted({(record["length_tokens"], record["mode"]) for record in records})
    for length, mode in settings:
        here = [record for record in records if record["length_tokens"] == length]
        full = full_scores(here, mode)
        able = able_tasks(full)
        families = {record["task"]: record["family"] for record in here}
        groups = {
            ALL: able,
            SEEN: [task for task in able if families[task] in TRAINED_FAMILIES],
            UNSEEN: [task for task in able if families[task] not in TRAINED_FAMILIES],
        }
        here = [record for record in here if record["mode"] == mode]
        place = {"length_tokens": length, "mode": mode}
        for method, ratio in sorted({(r["method"], r["ratio"]) for r in here if r["method"] != FULL}):
            mine = [record for record in here if (record["method"], record["ratio"]) == (method, ratio)]
            where = place | {"method": method, "ratio": ratio}
            for group, members in groups.items():
                if pairs := paired(mine, full, members):
                    cells.append(where | {"group": group} | _cell(pairs))
            for task, values in paired(mine, full, families).items():
                tasks.append(where | {"task": task, "family": families[task], "cases": len(values)} | _means(values))
        if reference is not None:
            comparisons += [place | row for row in _compare(here, reference, able)]
        books += [
            place | {"method": method, "ratio": ratio, "perplexity": value}
            for (method, ratio), value in sorted(perplexity(here).items())
        ]
    problems = Counter((r["method"], r["mode"], r["problem"]) for r in records if r.get("problem"))
    return {
        "cells": cells,
        "tasks": tasks,
        "fidelity": _fidelity(records),
        "comparisons": comparisons,
        "reference": reference,
        "perplexity": books,
        "problems": [
            {"method": method, "mode": mode, "problem": problem, "answers": count}
            for (method, mode, problem), count in sorted(problems.items())
        ],
    }


def _cell(pairs) -> dict:
    (mean, mean_interval), (kept, kept_interval) = estimate(pairs, score), estimate(pairs, retention)
    return {
        "tasks": list(pairs),
        "cases": sum(len(values) for values in pairs.values()),
        "score": mean,
        "score_interval": mean_interval,
        "retention": kept,
        "retention_interval": kept_interval,
    }


def _fidelity(records: list[dict]) -> list[dict]:
    groups = defaultdict(list)
    for record in records:
        if record["metric"] == FIDELITY:
            place = tuple(record[name] for name in FIDELITY_PLACE)
            groups[*place, ALL].append(record)
            groups[*place, record["kind"]].append(record)
    rows = []
    for place, members in sorted(groups.items()):
        if documents := by_document(members):
            exact = [record["exact"] for record in members if record.get("exact") is not None]
            row = dict(zip((*FIDELITY_PLACE, "kind"), place, strict=True)) | fidelity(documents)
            rows.append(row | ({"exact": sum(exact), "references": len(exact)} if exact else {}))
    return rows


def _compare(here: list[dict], reference: str, able: list[str]) -> list[dict]:
    """What the reference method has over each other at the same ratio, case by case."""
    rows = []
    for method, ratio in sorted({(r["method"], r["ratio"]) for r in here if r["method"] not in (FULL, reference)}):
        at_ratio = [r for r in here if r["ratio"] == ratio and r["score"] is not None and r["task"] in able]
        theirs = {case_of(r): r["score"] for r in at_ratio if r["method"] == reference}
        if pairs := paired([r for r in at_ratio if r["method"] == method], theirs, able):
            value, interval = estimate(pairs, advantage)
            rows.append({"method": method, "ratio": ratio, "advantage": value, "interval": interval})
    return rows


def _means(values) -> dict:
    method, full = values.mean(axis=0)
    return {"score": float(method), "full_score": float(full)}


def _percent(value: float) -> str:
    return f"{100 * value:.1f}"


def markdown(summary: dict) -> str:
    """Tables of the summary: retention by group, scores by task, perplexity, what was not scored."""
    lines = []
    for length, mode in sorted({(cell["length_tokens"], cell["mode"]) for cell in summary["cells"]}):
        here = [c for c in summary["cells"] if (c["length_tokens"], c["mode"]) == (length, mode)]
        lines += [f"\n### {length} tokens, question {mode}\n"]
        lines += ["Share of the full cache's score that is kept, in per cent (95 % interval).\n"]
        groups = [group for group in (ALL, SEEN, UNSEEN) if any(cell["group"] == group for cell in here)]
        lines += ["| method | ratio | " + " | ".join(groups) + " | answers |", "|---|---|" + "---|" * (len(groups) + 1)]
        for method, ratio in sorted({(c["method"], c["ratio"]) for c in here}, key=lambda pair: (pair[1], pair[0])):
            mine = {c["group"]: c for c in here if (c["method"], c["ratio"]) == (method, ratio)}
            row = [_kept(mine.get(group)) for group in groups]
            lines.append(f"| {method} | {ratio:g} | " + " | ".join(row) + f" | {mine[ALL]['cases']} |")
        members = {group: next((c["tasks"] for c in here if c["group"] == group), ()) for group in (SEEN, UNSEEN)}
        lines += [""] + [f"{group}: {', '.join(names)}" for group, names in members.items() if names]
        lines += _task_table([t for t in summary["tasks"] if (t["length_tokens"], t["mode"]) == (length, mode)])
    lines += _fidelity_tables(summary["fidelity"])
    if summary["comparisons"]:
        lines += [f"\n### What {summary['reference']} has over others\n"]
        lines += ["Points of the mean score at the same ratio, case by case (95 % interval).\n"]
        lines += ["| tokens | question | method | ratio | points |", "|---|---|---|---|---|"]
        for row in summary["comparisons"]:
            low, high = row["interval"]
            where = f"| {row['length_tokens']} | {row['mode']} | {row['method']} | {row['ratio']:g} |"
            lines.append(f"{where} {_percent(row['advantage'])} ({_percent(low)} to {_percent(high)}) |")
    if summary["perplexity"]:
        lines += [
            "\n### Perplexity of a book's next tokens\n",
            "| tokens | method | ratio | perplexity |",
            "|---|---|---|---|",
        ]
        lines += [
            f"| {p['length_tokens']} | {p['method']} | {p['ratio']:g} | {p['perplexity']:.2f} |"
            for p in summary["perplexity"]
        ]
    if summary["problems"]:
        lines += ["\n### Not scored\n", "| method | mode | why | answers |", "|---|---|---|---|"]
        lines += [f"| {p['method']} | {p['mode']} | {p['problem']} | {p['answers']} |" for p in summary["problems"]]
    return "\n".join(lines).strip() + "\n"


def _fidelity_tables(rows: list[dict]) -> list[str]:
    lines = []
    for split, length, mode in sorted({tuple(row[name] for name in FIDELITY_PLACE[:3]) for row in rows}):
        here = [row for row in rows if tuple(row[name] for name in FIDELITY_PLACE[:3]) == (split, length, mode)]
        here.sort(key=lambda row: (row["ratio"], row["method"]))
        kinds = sorted({row["kind"] for row in here} - {ALL})
        size = f"prompts of {length} tokens" if length else "prompts as they are"
        lines += [f"\n### The full cache's own answer: {split}, {size}, question {mode}\n"]
        lines += [
            "Tokens whose first choice is kept, in per cent, and rise of the loss in nats a token (95 % intervals"
        ]
        lines += ["by whole documents), each with the worst document.\n"]
        exact = any("exact" in row for row in here)
        heads = ["method", "ratio", "kept", "worst", "rise", "worst", "documents", "tokens"]
        heads += ["exact"] if exact else []
        lines += [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
        for row in here:
            if row["kind"] == ALL:
                cells = [row["method"], f"{row['ratio']:g}", _of_interval(row, "kept", _percent)]
                cells += [_percent(row["kept_worst"]), _of_interval(row, "nats", _nats), _nats(row["nats_worst"])]
                cells += [str(row["documents"]), str(row["tokens"])]
                cells += [f"{row['exact']} of {row['references']}" if "exact" in row else ""] if exact else []
                lines.append(f"| {' | '.join(cells)} |")
        if len(kinds) < 2:
            continue
        lines += ["\nFirst choices kept (and rise of the loss), by kind.\n"]
        lines += ["| method | ratio | " + " | ".join(kinds) + " |", "|---" * (len(kinds) + 2) + "|"]
        for method, ratio in dict.fromkeys((row["method"], row["ratio"]) for row in here):
            mine = {row["kind"]: row for row in here if (row["method"], row["ratio"]) == (method, ratio)}
            cells = [
                f"{_percent(mine[kind]['kept'])} ({_nats(mine[kind]['nats'])})" if kind in mine else ""
                for kind in kinds
            ]
            lines.append(f"| {method} | {ratio:g} | " + " | ".join(cells) + " |")
    return lines


def _nats(value: float) -> str:
    return f"{value + 0.0:+.3f}"


def _of_interval(row: dict, name: str, shown) -> str:
    low, high = row[f"{name}_interval"]
    return f"{shown(row[name])} ({shown(low)} to {shown(high)})"


def _kept(cell: dict | None) -> str:
    if cell is None:
        return ""
    low, high = cell["retention_interval"]
    return f"{_percent(cell['retention'])} ({_percent(low)}–{_percent(high)})"


def _task_table(rows: list[dict]) -> list[str]:
    names = sorted({row["task"] for row in rows})
    lines = ["\nScores by task, in per cent.\n", "| method | ratio | " + " | ".join(names) + " |"]
    lines += ["|---|---|" + "---|" * len(names)]
    full = {row["task"]: _percent(row["full_score"]) for row in rows}
    lines.append("| full | 1 | " + " | ".join(full[name] for name in names) + " |")
    for method, ratio in sorted({(r["method"], r["ratio"]) for r in rows}, key=lambda pair: (pair[1], pair[0])):
        mine = {r["task"]: _percent(r["score"]) for r in rows if (r["method"], r["ratio"]) == (method, ratio)}
        lines.append(f"| {method} | {ratio:g} | " + " | ".join(mine.get(name, "") for name in names) + " |")
    return lines


def write(records: list[dict], folder: Path, reference: str | None = None) -> list[Path]:
    """Write ``report.json``, ``report.md`` and the plots into ``folder``.

    Raises:
        ValueError: the folder cannot be written, or the reference is no method of the records.
    """
    from sglang_metasoft.eval import plots

    methods = sorted({record["method"] for record in records})
    if reference is not None and reference not in methods:
        raise ValueError(f"--reference: {reference!r} has no records; allowed: {', '.join(methods)}")
    summary = summarise(records, reference)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "report.json").write_text(json.dumps(summary, indent=2) + "\n")
        (folder / "report.md").write_text(markdown(summary))
        paths = plots.quality(summary, folder) + plots.needle_grid(records, folder)
    except OSError as error:
        raise ValueError(f"--output: {str(folder)!r} cannot be written: {error}") from None
    return [folder / "report.json", folder / "report.md", *paths]

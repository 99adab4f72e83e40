"""Quality against ratio, one line a method; the needle grid as a heat map."""

from collections import defaultdict
from pathlib import Path

import numpy as np

from sglang_metasoft.eval.records import FULL
from sglang_metasoft.eval.tasks.needle import GRID_DEPTHS

GRID_TASK = "niah_grid"


def _pyplot():
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def quality(summary: dict, folder: Path) -> list[Path]:
    """``quality-<length>-<mode>-<group>.png``: share of the full cache's score against the ratio, 95 % intervals."""
    pyplot = _pyplot()
    paths = []
    for place in sorted({(cell["length_tokens"], cell["mode"], cell["group"]) for cell in summary["cells"]}):
        length, mode, group = place
        lines = defaultdict(list)
        for cell in summary["cells"]:
            if (cell["length_tokens"], cell["mode"], cell["group"]) == place:
                lines[cell["method"]].append((cell["ratio"], cell["retention"], *cell["retention_interval"]))
        figure, axes = pyplot.subplots(figsize=(7, 4.5))
        for number, (method, points) in enumerate(sorted(lines.items())):
            ratio, kept, low, high = np.array(sorted(points)).T
            errors = 100 * np.maximum(np.array([kept - low, high - kept]), 0)
            axes.errorbar(ratio, 100 * kept, yerr=errors, label=method, marker="o", capsize=2, color=f"C{number % 10}",
                          linestyle="-" if number < 10 else "--")  # fmt: skip
        axes.axhline(100, color="grey", linewidth=0.8)
        ratios = sorted({point[0] for points in lines.values() for point in points})
        axes.set_xscale("log", base=2)
        axes.set_xticks(ratios, [f"{ratio:g}×" for ratio in ratios])
        axes.set_xlabel("prompt tokens per kept entry")
        axes.set_ylabel("score kept, % of the full cache's")
        axes.set_title(f"{length} tokens, question {mode}, {group} task families")
        axes.legend(fontsize="x-small", ncols=2)
        paths.append(_save(figure, folder / f"quality-{length}-{mode}-{group}.png"))
    return paths


def needle_grid(records: list[dict], folder: Path) -> list[Path]:
    """``needle-<method>-<ratio>-<mode>.png``: score over depth and length, green found, red lost."""
    pyplot = _pyplot()
    cells: dict[tuple, dict[tuple, list[float]]] = defaultdict(lambda: defaultdict(list))
    for record in records:
        if record["task"] == GRID_TASK and record["score"] is not None:
            name = (record["method"], record["ratio"], record["mode"])
            cells[name][record["depth"], record["length_tokens"]].append(record["score"])
    paths = []
    for (method, ratio, mode), found in sorted(cells.items()):
        lengths = sorted({length for _, length in found})
        grid = np.full((len(GRID_DEPTHS), len(lengths)), np.nan)
        for (depth, length), scores in found.items():
            grid[GRID_DEPTHS.index(depth), lengths.index(length)] = np.mean(scores)
        figure, axes = pyplot.subplots(figsize=(1.2 + 0.9 * max(3, len(lengths)), 4.5))
        image = axes.imshow(grid, cmap="RdYlGn", vmin=0, vmax=1, aspect="auto")
        axes.set_xticks(range(len(lengths)), [str(length) for length in lengths])
        axes.set_yticks(range(len(GRID_DEPTHS)), [f"{depth} %" for depth in GRID_DEPTHS])
        axes.set_xlabel("prompt tokens")
        axes.set_ylabel("depth of the needle")
        title = "full cache" if method == FULL else f"{method}, {ratio:g}×"
        axes.set_title(f"{title}, question {mode}", fontsize="medium")
        figure.colorbar(image, label="score")
        safe = "".join(character if character.isalnum() else "_" for character in method)
        paths.append(_save(figure, folder / f"needle-{safe}-{ratio:g}-{mode}.png"))
    return paths


def _save(figure, path: Path) -> Path:
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    figure.clear()
    return path

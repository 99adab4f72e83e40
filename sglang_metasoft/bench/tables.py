"""Tables and plots of a benchmark's result."""

import statistics
from pathlib import Path

COLORS = {"plain": "#8a8a8a", "metasoft": "#1668a8"}


def pairs(result: dict) -> list[tuple[dict, dict]]:
    """``(plain, metasoft)`` records of each pool and workload: medians over the rounds, the series of the first."""
    found: dict[tuple[str, str], dict[str, list[dict]]] = {}
    for record in result["results"]:
        found.setdefault((record["pool"], record["workload"]), {}).setdefault(record["system"], []).append(record)
    return [
        (_middle(pair["plain"]), _middle(pair["metasoft"]))
        for pair in found.values()
        if len(pair) == 2  # the twin was measured
    ]


def _middle(rounds: list[dict]) -> dict:
    """The first round's record with the median of every figure; ``tokens_per_second`` has each round's."""
    rounds = sorted(rounds, key=lambda record: record.get("round", 0))
    middle = {
        key: statistics.median(record[key] for record in rounds)
        for key, value in rounds[0].items()
        if isinstance(value, int | float)
    }
    return rounds[0] | middle | {"tokens_per_second": [record["output_tokens_per_second"] for record in rounds]}


def ratio(pair: tuple[dict, dict], key: str) -> float | None:
    """What the compressing server measured over what the plain one did; None if that was nothing."""
    plain, metasoft = pair
    return metasoft[key] / plain[key] if plain[key] else None


def spread(pair: tuple[dict, dict]) -> str:
    """The least and the greatest ratio of tokens/s within a round; empty for a single round."""
    plain, metasoft = (record["tokens_per_second"] for record in pair)
    if min(len(plain), len(metasoft)) < 2 or not all(plain):
        return ""
    ratios = [after / before for before, after in zip(plain, metasoft, strict=False)]
    return f", {min(ratios):.2f} to {max(ratios):.2f}"


def table(result: dict) -> str:
    """Markdown: figures of plain SGLang, and those with compression relative to them."""
    machine, size = result["machine"], result["size"]
    lines = [
        f"{result['model']}: {size['requests']} requests of {size['prompt_tokens']} prompt and {size['output_tokens']} "
        f"output tokens; accelerator {machine['accelerator']}, CPU {machine['cpu']}, SGLang {machine['sglang']}, "
        f"{machine['date']}",
        "",
        "| pool | workload | running at once | output tokens/s | TTFT median | ITL median | ITL p99 "
        "| computed prompt tokens | retractions |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for pair in pairs(result):
        plain, metasoft = pair
        computed = [record["prompt_tokens"] - record["cached_tokens"] for record in pair]
        cells = [
            plain["pool"],
            plain["workload"],
            f"{plain['peak_running']:.0f} → {metasoft['peak_running']:.0f}{_times(ratio(pair, 'peak_running'))}",
            f"{plain['output_tokens_per_second']:.1f} → {metasoft['output_tokens_per_second']:.1f}"
            f"{_times(ratio(pair, 'output_tokens_per_second'), spread(pair))}",
            *(
                f"{plain[key]:.0f} → {metasoft[key]:.0f} ms"
                for key in ("ttft_median_ms", "itl_median_ms", "itl_p99_ms")
            ),
            f"{computed[0]:.0f} → {computed[1]:.0f}",
            f"{plain['retractions']:.0f} → {metasoft['retractions']:.0f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _times(factor: float | None, spread: str = "") -> str:
    return "" if factor is None else f" (**{factor:.2f}×**{spread})"


def plot(result: dict, path: Path) -> None:
    """Running requests over time, one picture for each pool and workload."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    found = pairs(result)
    columns = min(len(found), 3)
    rows = -(-len(found) // columns)
    figure, axes = pyplot.subplots(
        rows, columns, figsize=(4.2 * columns, 2.6 * rows), layout="constrained", squeeze=False
    )
    for one, pair in zip(axes.flat, found, strict=False):
        for record in pair:
            seconds, running = [row[0] for row in record["series"]], [row[1] for row in record["series"]]
            one.step(seconds, running, where="post", label=record["system"], color=COLORS[record["system"]])
        one.set(
            title=f"{record['workload']}, {record['pool']} pool", xlabel="seconds", ylabel="running", ylim=(0, None)
        )
        one.grid(alpha=0.25)
    for one in axes.flat[len(found) :]:
        one.set_visible(False)
    axes.flat[0].legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)

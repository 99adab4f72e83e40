"""Tables and plots of a benchmark's result."""

from pathlib import Path

COLOURS = {"plain": "#8a8a8a", "metasoft": "#1668a8"}


def pairs(result: dict) -> list[tuple[dict, dict]]:
    """``(plain, metasoft)`` records of each pool and workload."""
    found: dict[tuple[str, str], dict[str, dict]] = {}
    for record in result["results"]:
        found.setdefault((record["pool"], record["workload"]), {})[record["system"]] = record
    return [(pair["plain"], pair["metasoft"]) for pair in found.values() if len(pair) == 2]


def ratio(pair: tuple[dict, dict], key: str) -> float | None:
    """What the compressing server measured over what the plain one did; None if that was nothing."""
    plain, metasoft = pair
    return metasoft[key] / plain[key] if plain[key] else None


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
            f"{plain['peak_running']} → {metasoft['peak_running']}{_times(ratio(pair, 'peak_running'))}",
            f"{plain['output_tokens_per_second']:.1f} → {metasoft['output_tokens_per_second']:.1f}"
            f"{_times(ratio(pair, 'output_tokens_per_second'))}",
            *(
                f"{plain[key]:.0f} → {metasoft[key]:.0f} ms"
                for key in ("ttft_median_ms", "itl_median_ms", "itl_p99_ms")
            ),
            f"{computed[0]:.0f} → {computed[1]:.0f}",
            f"{plain['retractions']:.0f} → {metasoft['retractions']:.0f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _times(factor: float | None) -> str:
    return "" if factor is None else f" (**{factor:.2f}×**)"


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
            one.step(seconds, running, where="post", label=record["system"], color=COLOURS[record["system"]])
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

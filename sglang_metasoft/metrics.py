"""What a compressing server counts, as data: the Prometheus metrics beside SGLang's own at ``/metrics``."""

from typing import NamedTuple

PREFIX = "sglang:metasoft_"


class Metric(NamedTuple):
    """One metric. A counter's name ends in ``_total`` at ``/metrics``."""

    name: str  # without the prefix
    kind: str  # counter, gauge, histogram
    unit: str
    help: str
    labels: tuple[str, ...] = ()  # beside SGLang's own


METRICS = (
    Metric("spans", "counter", "spans", "Spans compressed."),
    Metric("span_tokens", "counter", "tokens", "Prompt tokens compressed."),
    Metric("kept_slots", "counter", "slots", "KV entries that compressed spans became."),
    Metric("saved_slots", "counter", "slots", "KV pool slots saved by compression."),
    Metric("requests", "counter", "requests", "Finished requests, by why they were not compressed.", ("bypass",)),
    Metric("chain_hits", "counter", "requests", "Requests that started from an already compressed prefix."),
    Metric("reused_tokens", "counter", "tokens", "Prompt tokens that came from compressed prefixes."),
    Metric("faults", "counter", "faults", "Compressions given up, by the stage that failed.", ("stage",)),
    Metric("saved_slots_now", "gauge", "slots", "Slots that running requests would hold more without compression."),
    Metric("index_chains", "gauge", "prefixes", "Compressed prefixes that the index knows."),
    Metric("index_tokens", "gauge", "tokens", "Prompt tokens that the index remembers."),
    Metric("stage_seconds", "histogram", "seconds", "Time of a stage of one compression, all layers.", ("stage",)),
)
# Of stage_seconds: from what a small model takes on a GPU to what a long prompt takes on a CPU.
BUCKETS_SECONDS = (0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10)


def metrics_table() -> str:
    """The documentation's table, in Markdown."""
    rows = ["| metric | type | unit | |", "|---|---|---|---|"]
    for metric in METRICS:
        suffix = "_total" if metric.kind == "counter" else ""
        labels = "{" + ",".join(metric.labels) + "}" if metric.labels else ""
        rows.append(f"| `{PREFIX}{metric.name}{suffix}{labels}` | {metric.kind} | {metric.unit} | {metric.help} |")
    return "\n".join(rows)

"""What a compressing server counts: the Prometheus metrics beside SGLang's own at ``/metrics``, and their keeper."""

import time
from typing import NamedTuple

from sglang_metasoft.types import Plan

GAUGE_INTERVAL_SECONDS = 1.0
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
    Metric("prefix_hits", "counter", "requests", "Requests that started from an already compressed prefix."),
    Metric("reused_tokens", "counter", "tokens", "Prompt tokens that came from compressed prefixes."),
    Metric("reused_host_tokens", "counter", "tokens", "Of reused_tokens, those that were loaded from the host pool."),
    Metric(
        "declined_load_backs",
        "counter",
        "loads",
        "Loads of a compressed prefix from the host pool that SGLang declined; the request took another form.",
    ),
    Metric("faults", "counter", "faults", "Compressions given up, by the stage that failed.", ("stage",)),
    Metric("saved_slots_now", "gauge", "slots", "Slots that running requests would hold more without compression."),
    Metric("index_prefixes", "gauge", "prefixes", "Compressed prefixes that the index knows."),
    Metric("index_tokens", "gauge", "tokens", "Prompt tokens that the index remembers."),
    Metric(
        "compressor_info",
        "gauge",
        "",
        "1, for what is served: kind is given, fitted, shipped, untrained (soft tokens), training_free (none was "
        "found), or chosen (a method was named that needs none).",
        ("kind", "method"),
    ),
    Metric(
        "fidelity_kl",
        "histogram",
        "nats",
        "Divergence of the next token's distribution over a compressed prompt from that over the full one, of sampled "
        "requests.",
    ),
    Metric("stage_seconds", "histogram", "seconds", "Time of a stage of one compression, all layers.", ("stage",)),
)
# Of stage_seconds: from what a small model takes on a GPU to what a long prompt takes on a CPU.
BUCKETS_SECONDS = (0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10)
# Of fidelity_kl: from what rounding does to what another prompt would.
BUCKETS_NATS = (0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10)
BUCKETS = {"seconds": BUCKETS_SECONDS, "nats": BUCKETS_NATS}


def metrics_table() -> str:
    """The documentation's table, in Markdown."""
    rows = ["| metric | type | unit | |", "|---|---|---|---|"]
    for metric in METRICS:
        suffix = "_total" if metric.kind == "counter" else ""
        labels = "{" + ",".join(metric.labels) + "}" if metric.labels else ""
        rows.append(f"| `{PREFIX}{metric.name}{suffix}{labels}` | {metric.kind} | {metric.unit} | {metric.help} |")
    return "\n".join(rows)


class Metrics:
    """The metrics of one scheduler process.

    Args:
        labels: SGLang's own label values for this process.
    """

    def __init__(self, labels: dict[str, str]) -> None:
        # Not before SGLang has set the directory that its processes share their metrics through.
        import prometheus_client

        self._labels = labels
        self._metrics = {}
        for metric in METRICS:
            kind = getattr(prometheus_client, metric.kind.capitalize())
            options: dict[str, dict] = {
                "histogram": {"buckets": BUCKETS.get(metric.unit, ())},
                "gauge": {"multiprocess_mode": "mostrecent"},
            }
            self._metrics[metric.name] = kind(
                PREFIX + metric.name, metric.help, (*labels, *metric.labels), **options.get(metric.kind, {})
            )
        self._gauges_due = 0.0
        self._saved_slots = 0

    def _of(self, name: str, **labels: str):
        return self._metrics[name].labels(**self._labels, **labels)

    def compressor_served(self, kind: str, method: str) -> None:
        """Say, once, which kind of compressor this process serves."""
        self._of("compressor_info", kind=kind, method=method).set(1)

    def span_compressed(self, plan: Plan) -> None:
        """Count one committed span."""
        self._of("spans").inc()
        self._of("span_tokens").inc(plan.span_tokens)
        self._of("kept_slots").inc(plan.kept_slots)
        self._of("saved_slots").inc(plan.saved_slots)

    def request_finished(self, report: dict, reused_host_tokens: int, declined_load_backs: int) -> None:
        """Count one finished request by its ``metasoft_*`` report, and by what it had to do with the host pool."""
        reused = report["metasoft_reused_tokens"]
        self._of("reused_tokens").inc(reused)
        self._of("prefix_hits").inc(reused > 0)
        self._of("reused_host_tokens").inc(reused_host_tokens)
        self._of("declined_load_backs").inc(declined_load_backs)
        self._of("requests", bypass=report.get("metasoft_bypass", "none")).inc()

    def fault(self, stage: str) -> None:
        """Count a compression that was given up."""
        self._of("faults", stage=stage).inc()

    def stage_timed(self, stage: str, seconds: float) -> None:
        """Note how long a stage of one compression took, all layers."""
        self._of("stage_seconds", stage=stage).observe(seconds)

    def fidelity_sampled(self, kl_nats: float) -> None:
        """Note how far one compression moved the distribution of the next token."""
        self._of("fidelity_kl").observe(kl_nats)

    def update_gauges(self, running, prefixes) -> None:
        """Set the gauges, at most once a second, and at once when the last request has ended.

        Args:
            running: requests that decode.
            prefixes: the index of compressed prefixes.
        """
        now, has_ended = time.monotonic(), bool(self._saved_slots and not running)
        if now < self._gauges_due and not has_ended:
            return
        self._gauges_due = now + GAUGE_INTERVAL_SECONDS
        states = (getattr(req, "metasoft", None) for req in running)
        self._saved_slots = sum(state.offset for state in states if state is not None)
        self._of("saved_slots_now").set(self._saved_slots)
        self._of("index_prefixes").set(len(prefixes))
        self._of("index_tokens").set(prefixes.num_tokens)

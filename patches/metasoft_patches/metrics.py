"""Keeps the metrics of one scheduler process; which there are says :mod:`sglang_metasoft.metrics`."""

import time

from sglang_metasoft.metrics import BUCKETS_SECONDS, METRICS, PREFIX
from sglang_metasoft.types import Plan

GAUGE_INTERVAL_SECONDS = 1.0


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
                "histogram": {"buckets": BUCKETS_SECONDS},
                "gauge": {"multiprocess_mode": "mostrecent"},
            }
            self._metrics[metric.name] = kind(
                PREFIX + metric.name, metric.help, (*labels, *metric.labels), **options.get(metric.kind, {})
            )
        self._gauges_due = 0.0
        self._saved_slots = 0

    def _of(self, name: str, **labels: str):
        return self._metrics[name].labels(**self._labels, **labels)

    def span_compressed(self, plan: Plan) -> None:
        """Count one committed span."""
        self._of("spans").inc()
        self._of("span_tokens").inc(plan.span_tokens)
        self._of("kept_slots").inc(plan.kept_slots)
        self._of("saved_slots").inc(plan.saved_slots)

    def request_finished(self, report: dict) -> None:
        """Count one finished request by its ``metasoft_*`` report."""
        reused = report["metasoft_reused_tokens"]
        self._of("reused_tokens").inc(reused)
        self._of("chain_hits").inc(reused > 0)
        self._of("requests", bypass=report.get("metasoft_bypass", "none")).inc()

    def fault(self, stage: str) -> None:
        """Count a compression that was given up."""
        self._of("faults", stage=stage).inc()

    def stage_timed(self, stage: str, seconds: float) -> None:
        """Note how long a stage of one compression took, all layers."""
        self._of("stage_seconds", stage=stage).observe(seconds)

    def update_gauges(self, running, chains) -> None:
        """Set the gauges, at most once a second, and at once when the last request has ended.

        Args:
            running: requests that decode.
            chains: the index of compressed prefixes.
        """
        now, has_ended = time.monotonic(), bool(self._saved_slots and not running)
        if now < self._gauges_due and not has_ended:
            return
        self._gauges_due = now + GAUGE_INTERVAL_SECONDS
        states = (getattr(req, "metasoft", None) for req in running)
        self._saved_slots = sum(state.offset for state in states if state is not None)
        self._of("saved_slots_now").set(self._saved_slots)
        self._of("index_chains").set(len(chains))
        self._of("index_tokens").set(chains.num_tokens)

"""Prometheus metrics of a scheduler process, beside SGLang's own at ``/metrics`` (with ``--enable-metrics``)."""

from sglang_metasoft.types import Plan

PREFIX = "sglang:metasoft_"


class Metrics:
    """Counters of one scheduler process.

    Args:
        labels: SGLang's own label values for this process.
    """

    def __init__(self, labels: dict[str, str]) -> None:
        # Not before SGLang has set the directory that its processes share their metrics through.
        from prometheus_client import Counter

        names = tuple(labels)
        self._labels = labels
        self._spans = Counter(f"{PREFIX}spans", "Spans compressed.", names)
        self._span_tokens = Counter(f"{PREFIX}span_tokens", "Prompt tokens compressed.", names)
        self._saved_slots = Counter(f"{PREFIX}saved_slots", "KV pool slots saved by compression.", names)
        self._reused_tokens = Counter(f"{PREFIX}reused_tokens", "Prompt tokens from compressed prefixes.", names)
        self._requests = Counter(
            f"{PREFIX}requests", "Finished requests, by why they were not compressed.", (*names, "bypass")
        )

    def span_compressed(self, plan: Plan) -> None:
        """Count one committed span."""
        self._spans.labels(**self._labels).inc()
        self._span_tokens.labels(**self._labels).inc(plan.span_tokens)
        self._saved_slots.labels(**self._labels).inc(plan.saved_slots)

    def request_finished(self, report: dict) -> None:
        """Count one finished request by its ``metasoft_*`` report."""
        self._reused_tokens.labels(**self._labels).inc(report["metasoft_reused_tokens"])
        self._requests.labels(**self._labels, bypass=report.get("metasoft_bypass", "none")).inc()

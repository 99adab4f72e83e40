"""A running server's own gauges over time."""

import threading
import time

import requests

from sglang_metasoft.local_server import Server

RUNNING, USED = "sglang:num_running_reqs", "sglang:kv_used_tokens"


class PeakWatcher(threading.Thread):
    """Polls a server's metrics until stopped; a context manager.

    ``series`` holds ``(seconds, running requests, KV tokens used, CPU seconds of the schedulers)``.
    """

    def __init__(self, server: Server, interval_seconds: float = 0.2) -> None:
        super().__init__(daemon=True)
        self.server, self.interval_seconds = server, interval_seconds
        self.series: list[tuple[float, int, int, float]] = []
        self._is_over = threading.Event()

    def run(self) -> None:
        begin, cpu_begin = time.monotonic(), self.server.cpu_seconds()
        while not self._is_over.wait(self.interval_seconds):
            try:
                metrics = self.server.metrics()
            except requests.RequestException:  # busy: the next poll asks again
                continue
            sample = int(metrics.get(RUNNING, 0)), int(metrics.get(USED, 0))
            seconds, cpu_seconds = time.monotonic() - begin, self.server.cpu_seconds() - cpu_begin
            self.series.append((round(seconds, 1), *sample, round(cpu_seconds, 1)))

    def __enter__(self) -> "PeakWatcher":
        self.start()
        return self

    def __exit__(self, *exception) -> None:
        self._is_over.set()
        self.join()

    @property
    def peak_running(self) -> int:
        """The most requests that ran at once."""
        return max((running for _, running, *_ in self.series), default=0)

    @property
    def peak_used_tokens(self) -> int:
        """The most pool slots that were in use at once."""
        return max((used for _, _, used, _ in self.series), default=0)

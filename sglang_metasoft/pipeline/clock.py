"""How long each stage of a compression takes, without making anybody wait for the answer."""

import contextlib
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import torch

Clock = Callable[[str], AbstractContextManager]


def no_clock(stage: str) -> AbstractContextManager:
    """Measures nothing."""
    return contextlib.nullcontext()


class StageClock:
    """Sums the time of each stage over the layers of one compression: on a device the device's own, by events.

    Args:
        device: where the stages run.
        report: called with stage and seconds, once a stage, when a compression's times are known.
    """

    def __init__(self, device: torch.device, report: Callable[[str, float], None]) -> None:
        self.device, self.report = device, report
        self._seconds: dict[str, float] = {}
        self._events: dict[str, list] = {}
        self._waiting: deque = deque()
        self.unfinished: str | None = None  # the stage that was begun last, if it has not come to its end

    @contextlib.contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Around one stage of one layer."""
        self.unfinished = stage
        if self.device.type == "cpu":
            begin = time.perf_counter()
            yield
            self._seconds[stage] = self._seconds.get(stage, 0.0) + time.perf_counter() - begin
            self.unfinished = None
            return
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        yield
        end.record()
        self._events.setdefault(stage, []).append((begin, end))
        self.unfinished = None

    def finish(self) -> None:
        """After the last layer of a compression; reports at once, or when the device has come so far."""
        for stage, seconds in self._seconds.items():
            self.report(stage, seconds)
        if self._events:
            self._waiting.append(self._events)
        self._seconds, self._events = {}, {}
        self.collect()

    def drop(self) -> None:
        """After a compression that failed."""
        self._seconds, self._events, self.unfinished = {}, {}, None

    def collect(self) -> None:
        """Report compressions that the device has finished meanwhile."""
        while self._waiting and all(pairs[-1][1].query() for pairs in self._waiting[0].values()):
            for stage, pairs in self._waiting.popleft().items():
                self.report(stage, sum(begin.elapsed_time(end) for begin, end in pairs) / 1000)

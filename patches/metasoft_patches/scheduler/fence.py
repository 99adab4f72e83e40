"""Keeps the host no further ahead of the device than SGLang means it to be."""

import contextlib
from collections.abc import Iterator
from typing import Any


class LaunchFence:
    """Counts a compression as part of the batch that it follows.

    SGLang launches batch N + 1 when it has the result of N - 1. Then the device works on N, and what N copies from host
    buffers at its start, such as the plans of FlashInfer's wrappers, has been copied: the buffers may be written for
    N + 1. A compression of N - 1 lies between that result and N's copies; so it is waited for as well. The device has
    N to do meanwhile.

    Args:
        scheduler: SGLang's.
    """

    def __init__(self, scheduler) -> None:
        self.scheduler = scheduler
        # Events behind the compressions of the last two batches.
        self.last: Any = None
        self.before_last: Any = None

    def batch_launches(self) -> None:
        """Before a batch is launched."""
        if self.before_last is not None:
            self.before_last.synchronize()
        self.before_last, self.last = self.last, None

    @contextlib.contextmanager
    def compression(self) -> Iterator[None]:
        """In which work is queued on the forward's stream: behind the last batch, and what was done to its rows."""
        scheduler = self.scheduler
        if not scheduler.enable_overlap:
            yield
            return
        # The scheduler's own stream; while it is being made, before it has one, the default.
        caller = scheduler.device_module.current_stream()
        with scheduler.forward_stream_ctx:
            scheduler.forward_stream.wait_stream(caller)
            try:
                yield
            finally:
                self.last = scheduler.device_module.Event()
                self.last.record()

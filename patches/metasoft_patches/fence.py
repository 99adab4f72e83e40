"""Keeps the host no further ahead of the device than SGLang means it to be."""


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
        self.last = self.before_last = None  # events behind the compressions of the last two batches

    def batch_launches(self) -> None:
        """Before a batch is launched."""
        if self.before_last is not None:
            self.before_last.synchronize()
        self.before_last, self.last = self.last, None

    def compression_queued(self) -> None:
        """After a compression of the batch that was launched last; on the stream that it runs on."""
        self.last = self.scheduler.device_module.Event()
        self.last.record()

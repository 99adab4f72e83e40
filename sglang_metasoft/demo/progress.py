"""What the demo says while it works: step n of m, how long it usually takes, and a line now and then meanwhile."""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator

BEAT_SECONDS = 15.0


class Progress:
    """Counts steps.

    Args:
        steps: how many there will be.
        beat_seconds: a step that takes longer says so this often.
        say: prints a line.
    """

    def __init__(
        self, steps: int, beat_seconds: float = BEAT_SECONDS, say: Callable[[str], None] | None = None
    ) -> None:
        self.steps, self.done = steps, 0
        self.beat_seconds = beat_seconds
        self.say = say or (lambda line: print(line, flush=True))

    @contextlib.contextmanager
    def step(self, what: str, usually: str = "") -> Iterator[None]:
        """Announce a step, run the block, say how long it took."""
        self.done += 1
        self.say(f"[{self.done}/{self.steps}] {what}" + (f" (usually {usually})" if usually else ""))
        begin, is_over = time.monotonic(), threading.Event()

        def beat() -> None:
            while not is_over.wait(self.beat_seconds):
                self.say(f"      still at it after {time.monotonic() - begin:.0f} s")

        thread = threading.Thread(target=beat, daemon=True)
        thread.start()
        try:
            yield
        finally:
            is_over.set()
            thread.join()
        self.say(f"      done in {time.monotonic() - begin:.0f} s")

"""Host buffers that copies in a stream still read: each is written again only when its copy has run."""

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class Ring(Generic[T]):
    """Owners of such buffers, handed out in turn. All copies go through one stream, so the oldest run first.

    Args:
        make: makes one more owner; called when the copies of all others are still queued.
        make_event: makes a device event.
        limit: most owners that are made; beyond it the host waits for the oldest copy.
    """

    def __init__(self, make: Callable[[], T], make_event: Callable[[], Any], limit: int) -> None:
        self.make, self.make_event, self.limit = make, make_event, limit
        self._queued: deque[tuple[T, Any]] = deque()

    def __len__(self) -> int:
        """Owners that were made."""
        return len(self._queued)

    @contextmanager
    def next(self) -> Iterator[T]:
        """An owner whose buffers may be written, and whose copies are queued on the current stream, in this scope."""
        if self._queued and self._queued[0][1].query():
            owner, event = self._queued.popleft()
        elif len(self._queued) < self.limit:
            owner, event = self.make(), self.make_event()
        else:
            owner, event = self._queued.popleft()
            event.synchronize()
        try:
            yield owner
        finally:
            event.record()
            self._queued.append((owner, event))

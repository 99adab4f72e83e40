"""The served model's embedding table: what tensor-parallel ranks read together, call by call."""

from collections.abc import Callable
from typing import TypeVar

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

T = TypeVar("T")


class SharedEmbedding:
    """Counts calls, so that a rank that fails between two of them can make the others' rest.

    Args:
        embed: ``[n]`` int64 ids to ``[n, D]``; an all-reduce among the ranks.
        hidden_size: D.
    """

    def __init__(self, embed: Callable[[torch.Tensor], torch.Tensor], hidden_size: int) -> None:
        self.embed, self.hidden_size = embed, hidden_size
        self.calls = 0  # that came to their end, since the count was last set back
        self.is_inside = False  # of a call that did not come to its end
        self._rehearsed: list[int] | None = None

    @property
    def is_rehearsal(self) -> bool:
        """Whether nothing is computed, so that ids need not be there either."""
        return self._rehearsed is not None

    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        if self._rehearsed is not None:
            self._rehearsed.append(ids.numel())
            return torch.empty(ids.numel(), self.hidden_size, device=ids.device)
        self.is_inside = True
        embeddings = self.embed(ids)
        self.is_inside = False
        self.calls += 1
        return embeddings

    def rehearse(self, make: Callable[[], T]) -> tuple[list[int], T]:
        """Tokens of each call that ``make`` makes, and its result: shapes alone, nothing is computed or allocated."""
        self._rehearsed = []
        try:
            with FakeTensorMode(allow_non_fake_inputs=True):
                result = make()
            return self._rehearsed, result
        finally:
            self._rehearsed = None

"""How well a cache follows the full cache's own greedy answer, read over it token by token (teacher forcing).

Counted are the answer's tokens that are predicted over the cache that is measured. In mode ``inside`` a server takes
the first token from the full prompt, so that it does not count; in ``repeat`` and ``after`` it does. The end token
counts where the answer reaches it.
"""

from collections.abc import Sequence
from typing import NamedTuple


class Reading(NamedTuple):
    """An answer as one cache reads it."""

    tokens: int  # counted
    agreed: int  # of them the cache's own first choice
    nll: float  # mean negative log-likelihood of the counted tokens in nats; 0 where none counts

    @classmethod
    def of(cls, targets: Sequence[int], choices: Sequence[int], logprobs: Sequence[float]) -> "Reading":
        """From a server's report: the answer's counted tokens, the likeliest ones in their place, their log-likelihood.

        Raises:
            ValueError: the server reported on another number of tokens.
        """
        if not len(targets) == len(choices) == len(logprobs):
            raise ValueError(
                f"the server gave {len(logprobs)} log-probabilities and {len(choices)} first choices for "
                f"{len(targets)} tokens of an answer"
            )
        agreed = sum(target == choice for target, choice in zip(targets, choices, strict=True))
        return cls(len(targets), agreed, -sum(logprobs) / max(len(logprobs), 1))

    def fields(self, full: "Reading | None" = None) -> dict:
        """What the record holds: ``nats`` is the rise of ``nll`` over the full cache's."""
        nats = self.nll - full.nll if full else 0.0
        return self._asdict() | {"nats": nats}

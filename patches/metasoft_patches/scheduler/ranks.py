"""What ranks of a tensor-parallel server agree on: the compressor, a compression's outcome, what makes virtual ids."""

import dataclasses
import enum
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from sglang.srt.runtime_context import get_parallel

from sglang_metasoft.compressor.find import Compressor, fingerprint
from sglang_metasoft.config import MetaSoftConfig
from sglang_metasoft.types import Bypass


class Outcome(enum.IntEnum):
    """How a request's compression came out on a rank; of several ranks the lowest counts."""

    FAULT = 0
    NOT_FINITE = 1
    NO_FREE_SLOTS = 2
    SOUND = 3

    @property
    def bypass(self) -> Bypass:
        """What a request reports whose compression did not come out sound."""
        return Bypass.NO_FREE_SLOTS if self is Outcome.NO_FREE_SLOTS else Bypass.FAULT


class InStepFault(Exception):
    """A fault of this rank alone, raised when it has taken part in all that the ranks do together."""


class Guard:
    """Around a rank's own work between collectives: a fault there must not keep it from the next one.

    Args:
        is_shared: other ranks are waiting in the next collective; else an exception passes.
    """

    def __init__(self, is_shared: bool) -> None:
        self.is_shared = is_shared
        self.error: Exception | None = None  # the first

    @contextmanager
    def __call__(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            if not self.is_shared:
                raise
            self.error = self.error or error

    def check(self) -> None:
        """Raise InStepFault if anything has failed."""
        if self.error is not None:
            raise InStepFault from self.error


class Ranks:
    """The ranks that hold one request's heads. They talk over the CPU group: no device is waited for."""

    def __init__(self) -> None:
        parallel = get_parallel()
        self.size = parallel.attn_tp_size
        self.group = parallel.attn_tp_group.cpu_group

    def agree(self, outcomes: list[Outcome]) -> list[Outcome]:
        """The outcomes that all ranks go by; called by all of them for the same requests."""
        if self.size == 1:
            return outcomes
        common = torch.tensor(outcomes, dtype=torch.int32)
        torch.distributed.all_reduce(common, op=torch.distributed.ReduceOp.MIN, group=self.group)
        return [Outcome(value) for value in common.tolist()]


def with_common_secret(config: MetaSoftConfig) -> MetaSoftConfig:
    """The settings with the first rank's secret: each node of a server has drawn one of its own.

    Raises:
        ValueError: a node was started with other settings than the first; both are named.
    """
    world = get_parallel().world_group
    if world.world_size == 1:
        return config
    secrets, settings = zip(*world.all_gather_object((config.secret, config.describe())), strict=True)
    for rank, others in enumerate(settings):
        if others != settings[0]:
            raise ValueError(
                f"--enable-metasoft: rank {rank} has the settings {others}; allowed: rank 0's, {settings[0]}"
            )
    return dataclasses.replace(config, secret=secrets[0])


def first_ranks_choice(found: list[Compressor]) -> Compressor | None:
    """The compressor that the first rank finds best, as it lies on this rank's machine; called by all ranks.

    Args:
        found: on this rank, best first.

    Raises:
        ValueError: a rank lacks it; the same on all of them.
    """
    world = get_parallel().world_group
    if world.world_size == 1:
        return found[0] if found else None
    own = [fingerprint(compressor) for compressor in found]
    of_ranks = world.all_gather_object((own, [compressor.path for compressor in found]))
    (wanted, *_), (path, *_) = (values or [None] for values in of_ranks[0])
    if wanted is None:
        return None
    if lacking := [str(rank) for rank, (others, _) in enumerate(of_ranks) if wanted not in others]:
        raise ValueError(
            f"--enable-metasoft: rank {', '.join(lacking)} lacks the compressor {path!r} that rank 0 serves; "
            "copy this folder to its machine, or give --metasoft-path, the same files on all"
        )
    return found[own.index(wanted)]

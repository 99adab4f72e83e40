"""The interface behind which SGLang's versions differ: what a version calls things, and how it is asked to do them.

One adapter per version, ``metasoft_patches/sglang_<version>/``. Everything outside those folders is the same code for
all. An adapter keeps no state; what it is given belongs to SGLang.
"""

import functools
import importlib
from abc import ABC, abstractmethod
from contextlib import AbstractContextManager
from typing import Any

import torch

from metasoft_patches import compat


class Adapter(ABC):
    """One version of SGLang."""

    version: str
    targets: tuple  # of Target: where the version's hooks go
    hooks: Any  # the version's hook functions, and its class SchedulerHooks
    cache_class: type  # SGLang's radix cache, made to insert what radix.PrefixPolicy says

    def targets_of(self, *stages: str) -> tuple:
        """The hooks of some stages."""
        return tuple(target for target in self.targets if target.stage in stages)

    @abstractmethod
    def settings(self, server_args) -> tuple[Any, Any]:
        """Resolved server arguments and SGLang's ``ModelConfig``, in the parent process.

        A setting that the version does not have yet reads as off, so that one table of refusals serves all versions.
        """

    @abstractmethod
    def build_cache(self, context, cache_class: type):
        """The radix cache of a scheduler process, built the way SGLang builds its own.

        Args:
            context: SGLang's ``TreeCacheBuildContext``.
            cache_class: a subclass of :attr:`cache_class`.
        """

    @abstractmethod
    def prefix_len(self, req) -> int:
        """Tokens that need no computing in the next extend: matched in the tree, or computed before."""

    @abstractmethod
    def host_len(self, req) -> int:
        """Tokens matched behind those, which lie in the host pool alone and would have to be loaded back."""

    @abstractmethod
    def loaded_len(self, req) -> int:
        """Of :meth:`prefix_len`, once the request is admitted, the tokens that were loaded back from the host pool."""

    @abstractmethod
    def extend_end(self, req) -> int:
        """Where the last extend ended: entries in the request's row once it has run."""

    @abstractmethod
    def row_end(self, req) -> int:
        """Entries in the request's row, reserved ones included: past the last extend once it decodes."""

    @abstractmethod
    def protected_len(self, req) -> int:
        """Entries at the start of the row that belong to the radix tree and are locked for the request."""

    @abstractmethod
    def holds_kv(self, req) -> bool:
        """Whether the request has a row and slots of its own."""

    @abstractmethod
    def row_index(self, req) -> int:
        """The request's row in the req-to-token pool."""

    @abstractmethod
    def refresh_ids(self, req) -> None:
        """Rebuild the request's ids, prompt and output, after its prompt was replaced."""

    @abstractmethod
    def tenant(self, req) -> tuple:
        """The client's keys that keep its raw prefixes apart: ``(extra_key, cache_salt)``."""

    @abstractmethod
    def is_beam_search(self, req) -> bool:
        """Whether the request decodes several beams over one row."""

    @abstractmethod
    def is_watermarked(self, req) -> bool:
        """Whether sampling depends on the prompt's ids."""

    @abstractmethod
    def shrink_row(self, req, *, saved_slots: int, protected_len: int) -> None:
        """Note that the request's row was rewritten and now holds ``saved_slots`` entries less.

        What is computed and what is reserved stay as far apart as they were. The tree owns the first ``protected_len``
        entries; the lock stays where it is until the next insertion.
        """

    @abstractmethod
    def set_prefix(self, req, row: torch.Tensor, end: int) -> None:
        """Let the next extend follow the first ``end`` entries of ``row``, inserted into the tree or not."""

    @abstractmethod
    def request_of_rows(self, batch) -> list[int]:
        """For each of ``batch.seq_lens`` its request, as index into ``batch.reqs``: one with beams has several rows."""

    @abstractmethod
    def retract(self, scheduler, req) -> None:
        """Free all that a request holds, as for a retraction, without queueing it again."""

    @abstractmethod
    def write_location(self, slots: torch.Tensor):
        """What ``set_kv_buffer`` takes as the place to write to: ``[n]`` int64 physical slots."""

    @abstractmethod
    def forward_scope(self, model, backend, forward_batch) -> AbstractContextManager:
        """In which a model's decoder body may be called directly, with ``backend`` answering its attention layers."""

    @abstractmethod
    def plan_attention(self, model_runner, forward_batch) -> None:
        """Let SGLang's own attention backend plan a prefill that :meth:`forward_scope` will run with it."""


@functools.cache
def load_adapter() -> Adapter:
    """The installed version's adapter, from ``sglang_<version>/``.

    Raises:
        ValueError: the version is not supported; names those that are.
    """
    installed = compat.check_sglang_version()
    return importlib.import_module(f"metasoft_patches.{folder_of(installed)}.adapter").SGLangAdapter()


def folder_of(version: str) -> str:
    """The package that holds a version's adapter."""
    return f"sglang_{version.replace('.', '_')}"

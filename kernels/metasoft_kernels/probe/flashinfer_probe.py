"""Probe attention over the prompt by FlashInfer, the probe's own tokens by our kernel; all of it in layers of a window.

Planned once per batch: the plan depends on lengths and slots, which are the same in all layers. FlashInfer writes a
plan into page-locked memory of the wrapper and queues its copy to the device, here behind the prefill that is probed:
the next batch may be planned long before that copy runs, so it gets a wrapper of its own.
"""

import math
from typing import Any

import torch

from metasoft_kernels.probe import fused
from metasoft_kernels.probe.fused import merge_with_self
from metasoft_kernels.probe.ring import Ring
from metasoft_kernels.ragged import Ragged, ragged

WORKSPACE_BYTES = 128 * 2**20  # shared by all plans: written and read within one run, and runs are in stream order
MAX_PLANS = 8  # in flight; two batches of SGLang's with some spans a prompt have fewer
PLAN_BYTES = 8 * 2**20  # of each, on the device and on the host
DTYPES = (torch.float16, torch.bfloat16)
HEAD_DIMS = (64, 128, 256)


class FlashInferProbe:
    """Same contract as :func:`metasoft_kernels.probe.fused.attend`.

    Args:
        heads, groups, head_dim: of this rank.
        dtype: of queries and pool.

    Raises:
        ValueError: FlashInfer has no kernel for these; says why.
        Exception: whatever FlashInfer raises where it is absent or cannot build its kernels: it is tried out here.
    """

    def __init__(
        self, heads: int, groups: int, head_dim: int, dtype: torch.dtype, pool_dtype: torch.dtype, device: torch.device
    ) -> None:
        if device.type != "cuda":
            raise ValueError(f"device {device.type!r} is not allowed; allowed: cuda")
        if dtype not in DTYPES or pool_dtype != dtype or head_dim not in HEAD_DIMS:
            raise ValueError(
                f"{dtype} over a pool of {pool_dtype} with head size {head_dim} is not allowed; allowed: float16 or "
                f"bfloat16 over the same, head sizes {', '.join(map(str, HEAD_DIMS))}"
            )
        from flashinfer import BatchPrefillWithPagedKVCacheWrapper

        self.shape = (heads, groups, head_dim)
        self.dtype = dtype
        workspace = torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=device)
        self.wrappers = Ring(
            lambda: BatchPrefillWithPagedKVCacheWrapper(workspace, "NHD"), torch.cuda.Event, limit=MAX_PLANS
        )
        self.wrapper: Any = None
        self.planned: tuple[torch.Tensor, float] | None = None
        entry = torch.zeros(1, groups, head_dim, dtype=dtype, device=device)
        probe, context = ragged(device, [1], [1])
        slots = torch.zeros(1, dtype=torch.int64, device=device)
        self.attend(entry.new_zeros(1, heads, head_dim), entry, entry, slots, entry, entry, probe, context, 1.0)
        torch.cuda.synchronize(device)

    def attend(
        self,
        q: torch.Tensor,
        k_buffer: torch.Tensor,
        v_buffer: torch.Tensor,
        slots: torch.Tensor,
        k_new: torch.Tensor,
        v_new: torch.Tensor,
        probe: Ragged,
        context: Ragged,
        scale: float,
        k_scale: float = 1.0,
        v_scale: float = 1.0,
        window: int | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As :func:`metasoft_kernels.probe.fused.attend`; scales are 1 for the types that are allowed."""
        if window is not None:
            # FlashInfer takes the queries for the last of the keys, so that its window would have to differ with a
            # probe's length; and there is little to read in a window.
            return fused.attend(
                q, k_buffer, v_buffer, slots, k_new, v_new, probe, context, scale, k_scale, v_scale, window
            )
        if self.planned is None or self.planned[0] is not slots or self.planned[1] != scale:
            self._plan(slots, probe, context, scale)
        pages = (k_buffer.unsqueeze(1), v_buffer.unsqueeze(1))  # a page of one slot fits any page size
        q = q.contiguous()
        out, lse = self.wrapper.run(q, pages, return_lse=True)
        # FlashInfer's log-sum-exp has base 2.
        return merge_with_self(q, out, lse, k_new, v_new, probe, scale, math.log(2))

    def _plan(self, slots: torch.Tensor, probe: Ragged, context: Ragged, scale: float) -> None:
        """From lengths on the host, so that nothing waits for the device."""
        heads, groups, head_dim = self.shape
        probe_starts, context_starts = (
            torch.tensor([0, *axis.lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
            for axis in (probe, context)
        )
        self.planned = None
        with self.wrappers.next() as self.wrapper:
            self.wrapper.plan(
                probe_starts, context_starts, slots.to(torch.int32),
                torch.ones(context.num_requests, dtype=torch.int32), heads, groups, head_dim, 1, causal=False,
                sm_scale=scale, q_data_type=self.dtype, kv_data_type=self.dtype,
            )  # fmt: skip
        self.planned = (slots, scale)

"""What runs the stages in this process: chosen once at start-up, and said in the log."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from metasoft_kernels.backend import is_interpreted, uses_triton
from metasoft_kernels.probe import flashinfer_probe, fused
from metasoft_kernels.probe.flashinfer_probe import PLAN_BYTES, FlashInferProbe

from sglang_metasoft.config import MetaSoftConfig
from sglang_metasoft.methods.base import Method
from sglang_metasoft.pipeline.batch import is_fused
from sglang_metasoft.pipeline.memory import WORKSPACE_BYTES


class Kernels(NamedTuple):
    """The choice."""

    attend: Callable | None  # probe attention over all jobs; None: every stage runs job by job
    description: str  # for the start-up line
    workspace_bytes: int = 0  # at most beside the pool, and LIST_BYTES for each token of a prompt; 0: nobody bounds it


def choose_kernels(
    config: MetaSoftConfig, method: Method, heads: int, groups: int, dtype: torch.dtype, pool_dtype: torch.dtype
) -> Kernels:
    """Decide from the setting, the device and the types.

    Args:
        heads, groups: of this rank.
        dtype: what the model computes in; pool_dtype: of the KV pool.

    Raises:
        ValueError: the setting cannot be had here.
    """
    if not uses_triton(config.kernels, method.device, pool_dtype):
        return Kernels(None, "torch")
    name = "Triton's interpreter" if is_interpreted() else "triton"
    if not is_fused(method):
        # Probe, score and select are fused all the same, one request at a time.
        return Kernels(None, f"{name}; consolidation {method.consolidation_name} by torch")
    if config.kernels == "triton":
        return Kernels(fused.attend, f"{name}, probe attention included", WORKSPACE_BYTES)
    try:
        flashinfer = FlashInferProbe(heads, groups, method.shape.head_dim, dtype, pool_dtype, method.device)
    except Exception as error:  # absent, without a kernel for this shape, or unable to build it: FlashInfer raises all
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        description = f"{name}, probe attention included (FlashInfer not used: {reason})"
        return Kernels(fused.attend, description, WORKSPACE_BYTES)
    workspace = WORKSPACE_BYTES + flashinfer_probe.WORKSPACE_BYTES + flashinfer_probe.MAX_PLANS * PLAN_BYTES
    return Kernels(flashinfer.attend, f"{name}, probe attention by FlashInfer", workspace)

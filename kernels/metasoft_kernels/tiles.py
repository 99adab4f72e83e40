"""Tile sizes that fit registers and shared memory, and what depends on a tensor's type."""

import torch
import triton.language as tl

from metasoft_kernels.backend import is_interpreted


# Triton's own two take some ten microseconds a call on the host, more than a launch's other Python.
def cdiv(size: int, by: int) -> int:
    """The quotient, rounded up."""
    return -(-size // by)


def next_power_of_2(size: int) -> int:
    """The least power of two that is not below ``size``, at least 1."""
    return 1 << (size - 1).bit_length()


def padded(size: int) -> int:
    """The power of two that holds ``size``, at least 16: what a tensor-core product takes."""
    return max(16, next_power_of_2(size))


def rows_for(head_dim: int, dtype: torch.dtype, most: int = 128) -> int:
    """Rows of a tile of ``[rows, head_dim]``: at most 32 KiB; few in float32, whose products keep all in registers."""
    if dtype == torch.float32:
        return 16 if padded(head_dim) > 128 else 32
    return min(most, 32_768 // (padded(head_dim) * dtype.itemsize))


def operand_type(dtype: torch.dtype) -> tl.dtype:
    """What the operands of a product are cast to; sums are float32 always.

    Triton's interpreter multiplies the bit patterns of bfloat16, so it gets float32, which holds the same numbers.
    """
    return tl.float32 if dtype == torch.float32 or is_interpreted() else _TRITON_TYPES[dtype]


_TRITON_TYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
# float32 operands are multiplied exactly, so that CUDA and CPU choose alike; narrower ones are exact in any case.
PRECISION = "ieee"

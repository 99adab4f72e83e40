"""Record Triton launches instead of making them: what the host does is then seen without a device."""

from typing import NamedTuple

import torch
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction, KernelInterface


class Launch(NamedTuple):
    kernel: JITFunction | InterpretedFunction
    grid: tuple[int, ...]
    args: tuple
    kwargs: dict


def record(monkeypatch, holds_args: bool = True) -> list[Launch]:
    """From here on launches are appended to the list that this returns; without their arguments, memory is let go."""
    launches = []

    def take(kernel, grid):
        return lambda *args, **kwargs: launches.append(
            Launch(kernel, grid, args if holds_args else (), kwargs if holds_args else {})
        )

    for owner in (KernelInterface, InterpretedFunction):
        monkeypatch.setattr(owner, "__getitem__", take)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)  # which fake tensors lack
    return launches

"""Host-to-device copies that never make the host wait."""

from array import array

import numpy as np
import torch


def to_device(values, dtype: torch.dtype, device) -> torch.Tensor:
    """A tensor of host values on the device; through pinned memory where that is what makes the copy asynchronous.

    Args:
        values: a CPU tensor, an ``array("q")``, or anything else that ``torch.tensor`` takes.

    Returns:
        A tensor that shares no memory with an array: one that lends its memory cannot grow.
    """
    is_cuda = torch.device(device).type == "cuda"
    if isinstance(values, array):
        values = np.frombuffer(values, dtype=np.int64)  # torch alone would convert it id by id
        if not is_cuda:
            values = values.copy()
    host = torch.as_tensor(values, dtype=dtype)
    return (host.pin_memory() if is_cuda else host).to(device, non_blocking=True)

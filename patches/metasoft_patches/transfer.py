"""Host-to-device copies that never make the host wait."""

import torch


def to_device(values, dtype: torch.dtype, device) -> torch.Tensor:
    """A tensor of host values on the device; through pinned memory where that is what makes the copy asynchronous.

    Args:
        values: anything that ``torch.tensor`` takes, or a CPU tensor.
    """
    is_cuda = torch.device(device).type == "cuda"
    host = torch.as_tensor(values, dtype=dtype)
    return (host.pin_memory() if is_cuda else host).to(device, non_blocking=True)

"""Which implementation runs: ``naive`` (torch) or ``fused`` (Triton)."""

import torch
import triton
from triton.runtime.interpreter import InterpretedFunction

KERNELS = ("auto", "torch", "triton")


@triton.jit
def _nothing():
    pass


def is_interpreted() -> bool:
    """Whether Triton kernels are run by Triton's interpreter (``TRITON_INTERPRET=1`` when Triton was imported)."""
    return isinstance(_nothing, InterpretedFunction)


def check_device(device: torch.device) -> None:
    """Refuse ``triton`` on a device that it cannot serve.

    Raises:
        ValueError: neither CUDA nor interpreted; says what can be done.
    """
    if device.type != "cuda" and not is_interpreted():
        raise ValueError(
            f"metasoft kernels: 'triton' is not allowed on the device {device.type!r} unless TRITON_INTERPRET=1 is set "
            "in the environment (slow, for tests); allowed: auto, torch"
        )


def uses_triton(kernels: str, device: torch.device, entry_dtype: torch.dtype) -> bool:
    """Whether the fused kernels serve tensors of this kind.

    Args:
        kernels: ``torch``, ``triton``, or ``auto``: Triton on CUDA where it knows the type, torch elsewhere.
        device: where the pool is.
        entry_dtype: of the pool's entries.

    Raises:
        ValueError: an unknown name, or ``triton`` where it cannot run; says what can be done.
    """
    if kernels not in KERNELS:
        raise ValueError(f"metasoft kernels: {kernels!r} is not allowed; allowed: one of: {', '.join(KERNELS)}")
    if kernels == "torch" or (kernels == "auto" and device.type != "cuda"):
        return False
    check_device(device)
    if device.type == "cuda" and not is_interpreted() and entry_dtype == torch.float8_e4m3fn:
        capability = torch.cuda.get_device_capability(device)
        if capability < (8, 9):
            if kernels == "auto":
                return False
            raise ValueError(
                f"metasoft kernels: 'triton' is not allowed with an fp8_e4m3 KV cache on compute capability "
                f"{'.'.join(map(str, capability))}, which lacks that type; allowed: auto, torch"
            )
    return True

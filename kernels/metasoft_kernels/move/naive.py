"""Writing the consolidated entries in torch."""

import torch


def move(
    k_buffer: torch.Tensor,
    v_buffer: torch.Tensor,
    slots: torch.Tensor,
    kept: torch.Tensor,
    new_slots: torch.Tensor,
    values: torch.Tensor | None = None,
    v_scale: float = 1.0,
) -> None:
    """Write each head's kept keys, and its merged or kept values, into new slots of the same pool.

    Keys keep their bits, as do values that are not given; given ones are divided by the scale and cast, as SGLang's
    ``set_kv_buffer`` does.

    Args:
        k_buffer, v_buffer: ``[slots, G, d]`` one layer of the pool; written at ``new_slots`` alone.
        slots: ``[S]`` slots of the span.
        kept: ``[G, B]`` int64.
        new_slots: ``[B]``, none of them among ``slots``.
        values: ``[B, G, d]`` merged values.
        v_scale: what quantized pool entries are multiplied by on reading.
    """
    head = torch.arange(k_buffer.shape[1], device=k_buffer.device)
    sources = slots[kept].t()  # [B, G]
    bits = torch.uint8 if k_buffer.dtype.itemsize == 1 else k_buffer.dtype  # float8 has no indexing
    k_buffer.view(bits)[new_slots] = k_buffer.view(bits)[sources, head]
    if values is None:
        v_buffer.view(bits)[new_slots] = v_buffer.view(bits)[sources, head]
        return
    if values.dtype != v_buffer.dtype:
        values = (values / v_scale).to(v_buffer.dtype)
    v_buffer.view(bits)[new_slots] = values.view(bits)


def add_to_keys(k_buffer: torch.Tensor, slots: torch.Tensor, moves: torch.Tensor, k_scale: float = 1.0) -> None:
    """Move the keys at some slots; the sum is rounded once, as a key that is written is.

    Args:
        k_buffer: ``[slots, G, d]`` one layer of the pool.
        slots: ``[B]``, each once.
        moves: ``[B, G, d]`` float32.
        k_scale: what quantized pool entries are multiplied by on reading.
    """
    bits = torch.uint8 if k_buffer.dtype.itemsize == 1 else k_buffer.dtype
    keys = k_buffer.view(bits)[slots].view(k_buffer.dtype).float() * k_scale
    k_buffer.view(bits)[slots] = ((keys + moves) / k_scale).to(k_buffer.dtype).view(bits)


def move_biased(
    k_buffer: torch.Tensor,
    v_buffer: torch.Tensor,
    slots: torch.Tensor,
    kept: torch.Tensor,
    new_slots: torch.Tensor,
    biases: torch.Tensor,
    directions: torch.Tensor,
    scale: float,
    k_scale: float = 1.0,
) -> None:
    """:func:`move` with values as they were, and keys that carry a bias.

    Args:
        biases: ``[G, B]`` float32, what is to be added to the logit of each kept entry.
        directions: ``[G, d]`` float32 with ``q·u`` near 1 for every query to come.
        scale: factor on q·k.
        k_scale: what quantized pool entries are multiplied by on reading.
    """
    move(k_buffer, v_buffer, slots, kept, new_slots)
    add_to_keys(k_buffer, new_slots, biases.t().unsqueeze(-1) * (directions / scale), k_scale)

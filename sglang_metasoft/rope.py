"""Turning queries and keys by position, as the model's rotary embedding does."""

import torch

from sglang_metasoft.types import Rope


def rotate(x: torch.Tensor, rope: Rope, first_position: int, backwards: bool = False) -> torch.Tensor:
    """Turn ``[n, H, d]`` float32 vectors at consecutive positions forwards, or backwards, by their position."""
    cos, sin = rope.cos_sin[first_position : first_position + x.shape[0]].float().unsqueeze(1).chunk(2, dim=-1)
    sin = -sin if backwards else sin
    rotated = 2 * cos.shape[-1]
    a, b = _pairs(x[..., :rotated], rope.is_neox)
    return torch.cat([_unpair(a * cos - b * sin, b * cos + a * sin, rope.is_neox), x[..., rotated:]], dim=-1)


def rotate_all(x: torch.Tensor, rope: Rope, position: int) -> torch.Tensor:
    """Turn ``[..., H, d]`` float32 vectors forwards by one position; past the table's end by its last."""
    position = min(position, rope.cos_sin.shape[0] - 1)
    here = Rope(rope.cos_sin[position : position + 1], rope.is_neox)
    return rotate(x.reshape(1, -1, x.shape[-1]), here, 0).view_as(x)


def without_factor(rope: Rope) -> Rope:
    """The same angles with pairs of length one: some models fold a factor on the attention into the table."""
    cos, sin = rope.cos_sin.float().chunk(2, dim=-1)
    return Rope(rope.cos_sin.float() / torch.hypot(cos, sin).repeat(1, 2), rope.is_neox)


def _pairs(x: torch.Tensor, is_neox: bool) -> tuple[torch.Tensor, torch.Tensor]:
    return x.chunk(2, dim=-1) if is_neox else (x[..., ::2], x[..., 1::2])


def _unpair(a: torch.Tensor, b: torch.Tensor, is_neox: bool) -> torch.Tensor:
    return torch.cat([a, b], dim=-1) if is_neox else torch.stack([a, b], dim=-1).flatten(-2)

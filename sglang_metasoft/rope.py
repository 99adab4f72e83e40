"""Turning queries and keys by position, as the model's rotary embedding does."""

from collections.abc import Sequence

import torch

from sglang_metasoft.types import Rope, Turning

# Of the norm: what rounding leaves of two computations of the same queries, by the type that the model computes in.
ROUNDING = {torch.float32: 2e-3, torch.float64: 2e-3, torch.float16: 1e-2, torch.bfloat16: 3e-2}


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


def find_turning(
    near: torch.Tensor, far: torch.Tensor, first_far: int, ropes: Sequence[Rope]
) -> tuple[Turning, Rope | None]:
    """How queries depend on their position, seen from two places for the same hidden states.

    Args:
        near: ``[n, H, d]`` at positions 0 to n - 1, in the type that the model computes in.
        far: ``[n, H, d]`` of the same hidden states at ``first_far`` and after it.
        ropes: what may turn them; all reach to ``first_far + n``.

    Returns:
        The kind, and for ``ROPE`` the one that turns them.
    """
    limit = ROUNDING[near.dtype]
    near, far = near.float(), far.float()
    if relative_difference(far, near) < limit:
        return Turning.NONE, None
    for rope in ropes:
        unit = without_factor(rope)
        turned_back = rotate(near, unit, 0, backwards=True), rotate(far, unit, first_far, backwards=True)
        if relative_difference(*turned_back) < limit:
            return Turning.ROPE, rope
    return Turning.OTHER, None


def relative_difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Norm of the difference by the norm of what was expected; 0 where both are 0."""
    return ((found - expected).norm() / expected.norm().clamp_min(torch.finfo(torch.float32).tiny)).item()


def _pairs(x: torch.Tensor, is_neox: bool) -> tuple[torch.Tensor, torch.Tensor]:
    return x.chunk(2, dim=-1) if is_neox else (x[..., ::2], x[..., 1::2])


def _unpair(a: torch.Tensor, b: torch.Tensor, is_neox: bool) -> torch.Tensor:
    return torch.cat([a, b], dim=-1) if is_neox else torch.stack([a, b], dim=-1).flatten(-2)

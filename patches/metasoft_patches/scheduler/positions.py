"""Positions of a batch's tokens: behind a compressed span they count the prompt's tokens, not the row's entries."""

import torch

from metasoft_patches.adapter import Adapter
from metasoft_patches.transfer import to_device


class PositionShift:
    """Adds each request's offset; while a batch stays the same, step after step, its offsets stay on the device."""

    def __init__(self, adapter: Adapter) -> None:
        self.adapter = adapter
        self._known: list[int] = []  # by row, of the last step that decoded
        self._on_device: torch.Tensor | None = None  # the same, once for each of a row's positions

    def apply(self, forward_batch, batch) -> None:
        """Give the batch new tensors of positions, if any of its requests has an offset.

        Args:
            forward_batch: SGLang's; its ``positions`` are ``[n]``, and its ``mrope_positions``, which a model with
                M-RoPE reads instead, ``[3, n]``: of a text thrice the same, and an image's request has no offset.
            batch: the ``ScheduleBatch`` that it was made from.
        """
        offsets = [req.metasoft.offset if hasattr(req, "metasoft") else 0 for req in batch.reqs or ()]
        if not any(offsets):
            return
        positions = forward_batch.positions
        if batch.forward_mode.is_extend_without_speculative():
            host = torch.tensor(offsets, dtype=torch.int64).repeat_interleave(torch.tensor(batch.extend_lens))
            shift = to_device(host, positions.dtype, positions.device)
        else:
            # Requests are not rows (beams have several), nor rows tokens (a step with drafts has several of each).
            rows = self.adapter.request_of_rows(batch)
            by_row = offsets if len(rows) == len(offsets) else [offsets[row] for row in rows]
            shift = self._decoding(by_row, positions)
        forward_batch.positions = positions + shift
        if forward_batch.mrope_positions is not None:
            forward_batch.mrope_positions = forward_batch.mrope_positions + shift

    def _decoding(self, by_row: list[int], positions: torch.Tensor) -> torch.Tensor:
        shift = self._on_device
        if shift is None or by_row != self._known or shift.shape != positions.shape or shift.device != positions.device:
            host = torch.tensor(by_row, dtype=torch.int64).repeat_interleave(positions.numel() // len(by_row))
            shift = self._on_device = to_device(host, positions.dtype, positions.device)
            self._known = by_row
        return shift

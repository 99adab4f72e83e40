"""Importance of each span entry: the attention that the probe tokens pay it."""

from metasoft_kernels.score.blocks import probability_blocks
from metasoft_kernels.score.naive import importance

__all__ = ["importance", "probability_blocks"]

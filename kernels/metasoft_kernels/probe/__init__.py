"""Attention of the probe tokens over a prompt's paged KV and over themselves."""

from metasoft_kernels.probe.naive import attend

__all__ = ["attend"]

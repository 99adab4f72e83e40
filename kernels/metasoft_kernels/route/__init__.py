"""Attention flow: to which kept entries each dropped one goes."""

from metasoft_kernels.route.naive import route

__all__ = ["route"]

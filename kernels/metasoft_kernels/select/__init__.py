"""The entries that stay: top-B per KV head, sinks forced."""

from metasoft_kernels.select.naive import split_top

__all__ = ["split_top"]

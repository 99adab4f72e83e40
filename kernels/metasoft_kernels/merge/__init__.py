"""Consolidation: the values of dropped entries flow into the kept ones."""

from metasoft_kernels.merge.naive import attention_flow, gather

__all__ = ["attention_flow", "gather"]

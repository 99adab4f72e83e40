"""The consolidations: each decides what becomes of dropped entries."""

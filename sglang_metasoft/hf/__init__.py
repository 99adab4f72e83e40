"""Hugging Face models in process: what evaluation, inspection and training have in common."""

"""A scheduler process: what is hooked there, and what happens to requests before and after a prefill."""

"""The demo: a small real model, a real long document, and the two-turn conversation over it."""

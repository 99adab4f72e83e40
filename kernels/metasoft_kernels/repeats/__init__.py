"""Repeats in the ranking: one entry of several that say the same comes first, the others stand back."""

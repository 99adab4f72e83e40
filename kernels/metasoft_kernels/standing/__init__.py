"""Importance of each span entry without training: the better of its standings by attention and by key."""

"""Importance of each span entry once more: the probe's attention, refined by what the entry itself says."""

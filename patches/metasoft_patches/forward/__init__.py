"""The model runs once more: probes, and what they need to know of the loaded model."""

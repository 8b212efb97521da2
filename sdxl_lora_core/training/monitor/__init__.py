"""Validation, metrics, charts and sample images while a run trains."""

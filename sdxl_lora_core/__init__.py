"""Trains SDXL LoRAs and generates with them. Knows nothing of ComfyUI; importing it loads nothing heavy."""

__version__ = "0.1.0"

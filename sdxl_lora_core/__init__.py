"""Trains SDXL LoRAs and generates images with them. Independent of ComfyUI; importing it loads no large library."""

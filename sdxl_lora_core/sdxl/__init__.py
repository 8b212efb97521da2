"""The SDXL base model: what it is, where its parts lie, how they are loaded."""

"""The SDXL base model: detection, prediction type, loading of its parts, and the names of its modules."""

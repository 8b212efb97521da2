"""LoRA files: reading, writing, merging."""

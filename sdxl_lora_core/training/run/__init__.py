"""A run on disk: its name, folder, state and checkpoints."""

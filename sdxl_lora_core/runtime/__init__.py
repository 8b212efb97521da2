"""The process and its device: memory, determinism, several processes, loaded weights."""

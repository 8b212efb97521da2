"""Gradients, memory, optimizers, learning rates."""

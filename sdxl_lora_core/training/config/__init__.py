"""Every setting of a training run."""

"""The trainable model: adapters, new tokens and the training objective."""

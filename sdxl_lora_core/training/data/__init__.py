"""The batches of each optimizer update."""

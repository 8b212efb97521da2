"""Results kept on disk by content."""

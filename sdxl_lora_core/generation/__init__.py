"""A request to pixels."""

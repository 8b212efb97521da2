"""What learns, and the objective that it learns by."""

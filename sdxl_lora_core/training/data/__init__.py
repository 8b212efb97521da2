"""What each optimizer update sees."""

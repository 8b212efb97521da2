"""Writes the captions of a folder: by a captioning model, by a tagger, or given ones."""

"""A folder of captioned images as a training dataset."""

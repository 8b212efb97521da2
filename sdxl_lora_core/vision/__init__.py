"""Image models in transformers' format: CLIP and SigLIP, feature extractors, classifiers."""

"""Weights: the manifest of the published files, downloads, checkpoint formats, and fitting them to a model."""

"""Weights: what is known of them, where they come from, and how a file of any format comes to fit a model."""

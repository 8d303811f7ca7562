"""What is done with weights: convert, verify and publish them, describe them on model cards and in tables."""

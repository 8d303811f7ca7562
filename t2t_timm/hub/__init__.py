"""The weights: what is known of them, where they come from, how they are converted and published."""

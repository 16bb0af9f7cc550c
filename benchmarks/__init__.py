"""Checkpoint libraries side by side, each beside the raw limit of the same run."""

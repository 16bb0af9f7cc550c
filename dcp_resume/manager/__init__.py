"""Many checkpoints over a run: when to save, what to resume from, what a trainer holds."""

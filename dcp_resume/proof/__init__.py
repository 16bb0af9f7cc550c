"""Whether a run goes on as if it had never been interrupted: by its losses, by its checkpoints."""

"""What a run and a checkpoint say of themselves: pure models and checks, no I/O, no torch."""

"""What figures are called, by the subjects that find them and the goals that bound them."""

from __future__ import annotations

__all__ = [
    "A_PAIR",
    "BEST",
    "CHECKPOINT",
    "COPIES",
    "CORES",
    "FETCHED",
    "INDEX",
    "LAZY_LOST",
    "LOADING",
    "LOST",
    "OBJECT",
    "ON_COLUMNS",
    "ON_ROWS",
    "PLANNING_CPU",
    "SAVING",
    "SECOND_SAVE",
    "SPEED",
    "WRITTEN",
    "planned",
    "training_on",
]

# S3.
OBJECT, CHECKPOINT = "S3: one object", "S3: a checkpoint"
BEST = "time of the best client"

# Planning.
A_PAIR, PLANNING_CPU, INDEX = "µs a tensor and rank", "CPU s", "index MB"


def planned(ranks: int, tensors: int, save: str) -> str:
    """One simulated save."""
    return f"{ranks} ranks, {tensors} tensors, {save}"


# Incremental saves.
SECOND_SAVE, WRITTEN = "LoRA: second save", "written / changed"

# Reads on other ranks.
SAVING, LOADING = 2, 3
ON_ROWS, ON_COLUMNS = f"rows {SAVING} → {LOADING}", f"columns {SAVING} → {LOADING}"
FETCHED = "fetched / needed"

# Saves.
LAZY_LOST, COPIES = "lazy: training lost", "time of raw copies"

# Training.
CORES = 2
SPEED = "step speed"
LOST = "s of training lost a save"


def training_on(ranks: int) -> str:
    """So many ranks that train beside a save."""
    return f"{ranks} training on {CORES} cores"

"""The table that a campaign ends with."""

from __future__ import annotations

from typing import Any

__all__ = ["print_figures"]


def print_figures(document: dict[str, Any]) -> None:
    """Print all figures but the findings, which were told when they were made."""
    for name, value in document.items():
        if isinstance(value, dict):
            print(f"{name}:")
            for key, count in sorted(value.items(), key=lambda item: -item[1]):
                print(f"    {key:<44} {count:>6}")
        elif name != "findings":
            shown = f"{value:.2f}" if isinstance(value, float) else str(value)
            print(f"{name:<48} {shown:>6}")

"""The table, the JSON and the plot of a race."""

from __future__ import annotations

import json
import os
import platform
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from benchmarks.race import Sample

__all__ = ["plot", "table", "write_json"]


def table(samples: Sequence[Sample], payload_bytes: int) -> str:
    """Medians without the cold repetition, and the cold one beside them."""
    operations = list(dict.fromkeys(sample.operation for sample in samples))
    libraries = list(dict.fromkeys(sample.library for sample in samples))
    lines = [
        f"payload {payload_bytes / 2**20:.0f} MiB; ratios to the raw limit of the same run, "
        f"lower is better; cold: the first of its kind",
        f"{'':16} {'':18} {'x raw':>7} {'x raw cpu':>9} {'cold':>6} {'s':>8} {'raw s':>8} "
        f"{'cpu s':>7} {'peak MiB':>8} {'read x':>7} {'wrote x':>7}",
    ]
    for operation in operations:
        for library in libraries:
            own = [s for s in samples if (s.library, s.operation) == (library, operation)]
            if own:
                lines.append(_line(own, payload_bytes))
        lines.append("")
    return "\n".join(lines)


def _line(samples: Sequence[Sample], payload: int) -> str:
    warm = [sample for sample in samples if sample.repetition]
    cold = next(sample for sample in samples if not sample.repetition)

    def median(value: Callable[[Sample], float]) -> float:
        return statistics.median(map(value, warm))

    return (
        f"{samples[0].operation:16} {samples[0].library:18} {median(_ratio):7.2f} "
        f"{median(lambda s: s.cost.cpu_seconds / max(s.limit.cpu_seconds, 1e-9)):9.2f} "
        f"{_ratio(cold):6.1f} {median(lambda s: s.cost.seconds):8.3f} "
        f"{median(lambda s: s.limit.seconds):8.3f} {median(lambda s: s.cost.cpu_seconds):7.2f} "
        f"{median(lambda s: s.cost.peak_bytes) / 2**20:8.0f} "
        f"{median(lambda s: s.cost.read_bytes) / payload:7.2f} "
        f"{median(lambda s: s.cost.written_bytes) / payload:7.2f}"
    )


def _ratio(sample: Sample) -> float:
    return sample.cost.seconds / sample.limit.seconds


def write_json(path: Path, size: str, samples: Sequence[Sample], payload_bytes: int) -> None:
    """Every sample, and where it was measured."""
    document = {
        "size": size,
        "payload_bytes": payload_bytes,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "load_average": os.getloadavg(),
        "samples": [asdict(sample) for sample in samples],
    }
    path.write_text(json.dumps(document, indent=1))


def plot(path: Path, samples: Sequence[Sample]) -> None:
    """Bars of the ratios, one group an operation. Needs matplotlib."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    operations = list(dict.fromkeys(sample.operation for sample in samples))
    libraries = list(dict.fromkeys(sample.library for sample in samples))
    figure, axes = pyplot.subplots(figsize=(2 + 2 * len(operations), 5), layout="constrained")
    width = 0.8 / len(libraries)
    for at, library in enumerate(libraries):
        groups = [
            [
                _ratio(s)
                for s in samples
                if (s.library, s.operation) == (library, o) and s.repetition
            ]
            for o in operations
        ]
        bars = [statistics.median(group) if group else 0 for group in groups]
        places = [index + at * width for index in range(len(operations))]
        axes.bar(places, bars, width, label=library)
    axes.axhline(1, color="black", linewidth=1)
    axes.set_xticks([index + 0.4 - width / 2 for index in range(len(operations))], operations)
    axes.set_ylabel("time / raw limit")
    axes.legend()
    figure.savefig(path, dpi=120)

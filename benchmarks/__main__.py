"""``python -m benchmarks``: dcp_resume beside its peers and the raw limits, in one run.

Times are the slowest rank's between common starts. Every load is compared with what was saved.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from pathlib import Path

from benchmarks.contenders import CONTENDERS
from benchmarks.payload import SIZES, num_bytes
from benchmarks.race import Sample, race_here, race_there
from benchmarks.results import plot, table, write_json
from tests.support.ranks import RankPool

TIMEOUT_S = 3600.0


def main() -> None:
    """Parse, race, print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--size", choices=SIZES, default="tensor-bound")
    parser.add_argument("--libraries", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--repetitions", type=int, default=3, help="besides the cold one")
    parser.add_argument("--directory", type=Path, default=None, help="on the storage to measure")
    parser.add_argument("--json", type=Path, default=None)
    parser.add_argument("--plot", type=Path, default=None, help="a PNG; needs matplotlib")
    arguments = parser.parse_args()
    directory = Path(tempfile.mkdtemp(prefix="benchmarks-", dir=arguments.directory))
    try:
        samples = race(arguments.size, arguments.libraries, arguments.repetitions, directory)
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    payload = num_bytes(SIZES[arguments.size])
    print(table(samples, payload))
    if arguments.json:
        write_json(arguments.json, arguments.size, samples, payload)
    if arguments.plot:
        plot(arguments.plot, samples)


def race(size: str, libraries: list[str], repetitions: int, directory: Path) -> list[Sample]:
    """All operations, first on the size's own mesh, then on the others."""
    arguments = (size, libraries, repetitions, str(directory))
    with RankPool() as pool:
        ranks = SIZES[size].ranks
        samples: list[Sample] = pool.run(race_here, ranks, *arguments, timeout_s=TIMEOUT_S)[0]
        for other in SIZES[size].other_ranks:
            samples += pool.run(race_there, other, *arguments, timeout_s=TIMEOUT_S)[0]
    return samples


if __name__ == "__main__":
    main()

"""``python -m benchmarks``: dcp_resume beside its peers and the raw limits, in one run.

Times are the slowest rank's between common starts. Every load is compared with what was saved.
"""

from __future__ import annotations

import argparse
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from benchmarks.bucket import measure_s3
from benchmarks.incremental import measure_incremental
from benchmarks.libraries import LIBRARIES, missing
from benchmarks.loads import measure_loads
from benchmarks.options import Options, default_directory
from benchmarks.payload import SIZES
from benchmarks.plot import plot
from benchmarks.reads import measure_reads
from benchmarks.results import table, write_json
from benchmarks.samples import Findings
from benchmarks.saves import measure_saves
from benchmarks.scale import measure_planning
from benchmarks.training import measure_training

SUBJECTS: Mapping[str, Callable[[Options], Iterator[Findings]]] = {
    "saves": measure_saves,
    "loads": measure_loads,
    "s3": measure_s3,
    "planning": measure_planning,
    "incremental": measure_incremental,
    "reads": measure_reads,
    "training": measure_training,
}


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("subjects", nargs="*", metavar="SUBJECT", help=f"of {', '.join(SUBJECTS)}")
    parser.add_argument(
        "--size",
        nargs="+",
        choices=SIZES,
        default=["tensor-bound", "byte-bound"],
        help="of saves and loads; tiny alone makes everything tiny",
    )
    parser.add_argument("--libraries", nargs="+", choices=LIBRARIES, default=list(LIBRARIES))
    parser.add_argument("--repeat", type=int, default=3, help="besides the cold one")
    parser.add_argument("--directory", type=Path, help="on the storage to measure")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path, help="an SVG")
    arguments = parser.parse_args()
    if unknown := set(arguments.subjects) - SUBJECTS.keys():
        parser.error(f"no such subject: {', '.join(sorted(unknown))}")

    libraries = []
    for library in arguments.libraries:
        if module := missing(library):
            print(f"skipped: {library} ({module} is not installed)")
        else:
            libraries.append(library)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # files in memory must not outlive it
    storage = arguments.directory or default_directory()
    directory = Path(tempfile.mkdtemp(prefix="benchmarks-", dir=storage))
    print(f"files in {storage}")
    options = Options(arguments.size, libraries, arguments.repeat, directory)
    found: list[Findings] = []
    try:
        for subject in arguments.subjects or SUBJECTS:
            for findings in SUBJECTS[subject](options):
                found.append(findings)
                print(table(findings), flush=True)
    finally:
        shutil.rmtree(directory)
    if arguments.json:
        write_json(arguments.json, found, storage)
    if arguments.plot:
        plot(arguments.plot, [figure for findings in found for figure in findings.figures()])
    if any("dcp_resume" in findings.failures for findings in found):
        parser.exit(1)


if __name__ == "__main__":
    main()

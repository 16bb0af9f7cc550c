"""Fuzz the targets guided by coverage: what reaches new code is kept and changed further.

    python -m tests.fuzz.guided --seconds 60 [TARGET…]

Each target runs in a process of its own with at most 1 GiB and 10 s an input. A finding is written
to ``--corpus`` (a temporary directory by default) as ``crash-…``, ``timeout-…`` or ``oom-…``.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

from dcp_resume.errors import DcpResumeError

__all__: list[str] = []

_TOKENS = (
    *'{}[]:,"',
    "null",
    "true",
    "-1",
    "9223372036854775808",
    "..",
    "$tuple",
    "$int",
    "$numpy",
)


def run_one(name: str, options: list[str]) -> None:
    """Fuzz one target in this process until libFuzzer ends it."""
    import atheris

    with atheris.instrument_imports(include=["dcp_resume"]):
        from tests.fuzz.targets import TARGETS

    feed = TARGETS[name].feed

    @atheris.instrument_func
    def one_input(data: bytes) -> None:
        try:
            feed(data)
        except DcpResumeError:
            return

    atheris.Setup([sys.argv[0], *options], one_input)
    atheris.Fuzz()


def run_all(names: list[str], seconds: int, corpus: Path) -> int:
    """Fuzz target after target, each in its own process; returns how many had findings."""
    from tests.fuzz.targets import TARGETS

    dictionary = corpus / "tokens"
    dictionary.write_text("".join(f'"{_escaped(token)}"\n' for token in _TOKENS))
    failed = []
    for name in names or list(TARGETS):
        directory = corpus / name
        directory.mkdir(exist_ok=True)
        for number, seed in enumerate(TARGETS[name].seeds()):
            (directory / f"seed-{number}").write_bytes(seed)
        limits = [f"-max_total_time={seconds}", "-rss_limit_mb=1024", "-timeout=10"]
        command = [sys.executable, "-m", "tests.fuzz.guided", "--one", name, str(directory)]
        command += [*limits, f"-dict={dictionary}", f"-artifact_prefix={corpus}/{name}-"]
        found = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)
        lines = found.stderr.splitlines()
        summary = next((line for line in reversed(lines) if line.startswith(("#", "Done"))), "")
        print(f"{name}: exit {found.returncode}: {summary}", flush=True)
        if found.returncode:
            failed.append(name)
            print("\n".join(lines[-40:]), flush=True)
    print(f"{len(failed)} targets have findings, in {corpus}: {failed}")
    return len(failed)


def _escaped(token: str) -> str:
    return token.replace("\\", "\\\\").replace('"', '\\"')


def main() -> int:
    """Fuzz all targets, or those that are named."""
    if sys.argv[1:2] == ["--one"]:
        run_one(sys.argv[2], sys.argv[3:])
        return 0
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("targets", nargs="*", metavar="TARGET", help="all by default")
    parser.add_argument("--seconds", type=int, default=60, help="for each target")
    parser.add_argument("--corpus", type=Path, help="where inputs are kept between runs")
    arguments = parser.parse_args()
    corpus = arguments.corpus or Path(tempfile.mkdtemp(prefix="fuzz-"))
    corpus.mkdir(parents=True, exist_ok=True)
    return 1 if run_all(arguments.targets, arguments.seconds, corpus) else 0


if __name__ == "__main__":
    sys.exit(main())

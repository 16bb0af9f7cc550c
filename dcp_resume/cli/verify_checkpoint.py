"""``dcp-resume verify``: prove every byte of a checkpoint."""

from __future__ import annotations

import argparse
import re
import secrets
from typing import TYPE_CHECKING

from dcp_resume.cli.arguments import PATIENT, add_step, add_verb, open_url
from dcp_resume.cli.exit_codes import ExitCode
from dcp_resume.cli.keys import read_signing
from dcp_resume.cli.printing import print_json, print_prose, size_text
from dcp_resume.cli.progress import ProgressLine
from dcp_resume.errors import ConfigurationError

if TYPE_CHECKING:
    from dcp_resume.cli.arguments import Verbs
    from dcp_resume.session.sampling import Sample
    from dcp_resume.session.verify import Verification

__all__ = ["add_parser"]

_DESCRIPTION = """\
Read a checkpoint whole and prove it: manifest, catalog and index by their digests and against each
other, every data file by its size, its header, and the digest of each of its blocks. Every problem
is listed, with file, block and tensors. Nothing is changed; a damaged checkpoint is not quarantined
(a job that resumes does that). Memory is bounded: 16 MiB (or a block) for each of 4 readers.

With --sample only a part of the data is read: a share drawn at random, such as 10%, or one of
several parts that together are the whole, such as 3/7 on the third day of each week. Documents,
and sizes and headers of all files, are proved in any case.

With --tensors also every tensor by the digest that the save recorded (TensorDigests.RECORD): each
element lies at its place, however the tensor was cut since. They are read once more; 32 MiB more.
"""
_EXAMPLES = """\
  dcp-resume verify runs/a
  dcp-resume verify s3://bucket/runs/a --step all
  dcp-resume verify s3://bucket/runs/a --sample 10% --seed 7
  dcp-resume verify runs/a-tp2 --tensors
  dcp-resume verify /backup/step-00000400/k3v9
"""


def add_parser(verbs: Verbs) -> None:
    """Add the verb."""
    verb = add_verb(
        verbs,
        "verify",
        summary="prove every byte of a checkpoint",
        description=_DESCRIPTION,
        examples=_EXAMPLES,
    )
    verb.add_argument("url", help="root of the run, or a checkpoint's directory")
    add_step(verb, "latest", "all")
    verb.add_argument(
        "--sample",
        type=_read_sample,
        default=(1, 1),
        metavar="SHARE",
        help="read only so much of the data: 10%% of it, or part 3/7 (default: all)",
    )
    verb.add_argument(
        "--seed",
        type=int,
        metavar="N",
        help="draw the same share again (default: another one each time, whose seed is said)",
    )
    verb.add_argument("--tensors", action="store_true", help="also prove recorded tensor digests")
    verb.set_defaults(run=_run)


def _read_sample(text: str) -> float | tuple[int, int]:
    share = re.fullmatch(r"(\d+(?:\.\d+)?)%", text)
    part = re.fullmatch(r"(\d+)/(\d+)", text)
    if share:
        return float(share[1]) / 100
    if part:
        return int(part[1]), int(part[2])
    raise argparse.ArgumentTypeError(
        f"expected a share such as 10% or a part such as 3/7, got {text!r}"
    )


def _sample(arguments: argparse.Namespace) -> Sample:
    from dcp_resume.session.sampling import PartOf, RandomShare

    asked, seed = arguments.sample, arguments.seed
    if arguments.tensors and asked != (1, 1):
        raise ConfigurationError(
            "--tensors reads every tensor whole; leave out --sample, or --tensors", option="sample"
        )
    if isinstance(asked, float):
        return RandomShare(asked, secrets.randbelow(2**31) if seed is None else seed)
    if seed is not None:
        raise ConfigurationError(
            "a seed was given, and nothing is drawn; add --sample with a share such as 10%",
            option="seed",
        )
    return PartOf(*asked)


def _run(arguments: argparse.Namespace) -> int:
    from dcp_resume.session.finding import find_checkpoints
    from dcp_resume.session.sampling import WHOLE
    from dcp_resume.session.tensor_digests import Prove
    from dcp_resume.session.verify import verify_checkpoint

    sample = _sample(arguments)
    prove = Prove.TENSORS if arguments.tensors else Prove.BLOCKS
    store = open_url(arguments.url, arguments, retry=PATIENT)
    results: list[Verification] = []
    trust = read_signing(arguments).trust
    for located in find_checkpoints(store, arguments.step, trust):
        progress = ProgressLine(f"verifying {located.prefix.partition('/')[0]}".rstrip())
        try:
            results.append(
                verify_checkpoint(
                    store, located, trust=trust, prove=prove, sample=sample, progress=progress
                )
            )
        finally:
            progress.close()
        if not arguments.json:
            _print(results[-1], sample)
    is_whole = all(result.is_whole for result in results)
    if arguments.json:
        documents = [_document(result) for result in results]
        print_json(
            {
                "url": store.url,
                "is_whole": is_whole,
                "sample": None if sample == WHOLE else str(sample),
                "checkpoints": documents,
            }
        )
    return ExitCode.OK if is_whole else ExitCode.PROBLEM


def _print(result: Verification, sample: Sample) -> None:
    name = f"step {result.step}" if result.step is not None else "a checkpoint"
    where = f"{name} ({result.prefix})" if result.prefix else name
    rate = size_text(result.num_bytes / max(result.duration_s, 1e-9))
    counted = f"{result.num_blocks} blocks"
    if result.num_tensors:
        counted += f", {result.num_tensors} tensor digests"
    print_prose(
        f"{where}: {_verdict(result, sample)}; {counted}, {size_text(result.num_bytes)} in "
        f"{result.num_files} file(s), {result.duration_s:.1f} s, {rate}/s"
    )
    for problem in result.problems:
        print_prose(f"  - {problem}")


def _verdict(result: Verification, sample: Sample) -> str:
    from dcp_resume.session.sampling import WHOLE
    from dcp_resume.session.verify import UNRECORDED

    if result.is_whole:
        return "whole" if sample == WHOLE else f"nothing wrong in the sample, {sample}"
    is_damaged = any(problem.kind != UNRECORDED for problem in result.problems)
    return f"{'DAMAGED' if is_damaged else 'NOT PROVED'}, {len(result.problems)} problem(s)"


def _document(result: Verification) -> dict[str, object]:
    return {
        "step": result.step,
        "seq": result.seq,
        "prefix": result.prefix,
        "is_whole": result.is_whole,
        "num_files": result.num_files,
        "num_blocks": result.num_blocks,
        "num_bytes": result.num_bytes,
        "num_tensors": result.num_tensors,
        "duration_s": result.duration_s,
        "problems": [
            {"where": p.where, "kind": p.kind, "message": p.message} for p in result.problems
        ],
    }

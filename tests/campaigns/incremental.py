"""Prune a run at random instants while a writer refers to what is pruned, again and again.

    python -m tests.campaigns.incremental --rounds 200

In each round one process resumes and saves what changed, and another prunes with a tight policy as
often as it can. Afterwards every byte of every checkpoint is proved, no key may be left that none
needs, and the newest must load bit-equal. Ends with 0 if all that held. ``--seed`` repeats what is
drawn; how the two processes meet is left to the machine.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import random
import shutil
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch

from dcp_resume import CheckpointManager, SaveMode, Settings, Unchanged, events, open_store
from dcp_resume.errors import ParentRetired
from dcp_resume.manager.policies import KeepAll, KeepLast
from dcp_resume.manager.retention import prune
from dcp_resume.session.run_log import RunLog
from tests.campaigns.audit import audit
from tests.campaigns.judging import Finding

__all__ = ["Incremental", "run_incremental"]

_ROUNDS_PER_RUN = 5
_SIZES = (20_000, 20_000, 20_000, 50_000, 300, 40)
"""Elements of each tensor: some are blocks of their own, some share one."""
_LONGEST_PAUSE_S = 0.01
_LIMIT_S = 120.0


@dataclass
class Incremental:
    """What came of a campaign."""

    seed: int
    num_rounds: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    findings: list[tuple[int, Finding]] = field(default_factory=list)
    """With the number of the round after which they were seen."""
    duration_s: float = 0.0

    def document(self) -> dict[str, Any]:
        """Figures as JSON."""
        return {
            "seed": self.seed,
            "rounds": self.num_rounds,
            **{name: self.counts[name] for name in sorted(self.counts)},
            "duration_s": self.duration_s,
            "findings": [[number, f.kind, f.text] for number, f in self.findings],
        }


def _state_at(seed: str, step: int) -> dict[str, Any]:
    """A function of seed and step; a step changes about a third of the tensors."""
    values = [0] * len(_SIZES)
    for number in range(1, step + 1):
        rng = random.Random(f"{seed}/{number}")
        values = [number if rng.random() < 0.35 else value for value in values]
    tensors = {
        f"t{n}": torch.arange(float(size)) + 1000 * value
        for n, (size, value) in enumerate(zip(_SIZES, values, strict=True))
    }
    return {"model": tensors, "trainer": {"step": step}}


def _write(url: str, seed: str, number: int) -> dict[str, int]:
    """Resume the run, and save a few steps; what was seen."""
    rng = random.Random(f"{seed}/writer/{number}")
    found: Counter[str] = Counter()

    def note(event: events.Event) -> None:
        if isinstance(event, events.ChangesWritten):
            found["written_bytes"] += event.written_bytes
            found["referenced_bytes"] += event.referenced_bytes

    unsubscribe = events.subscribe(note)
    settings = Settings(
        mode=rng.choice(list(SaveMode)),
        unchanged=Unchanged.REFER,
        retention=rng.choice([KeepAll(), KeepLast(2)]),
    )
    with CheckpointManager(url, settings) as checkpoints:
        resumed = checkpoints.resume(_state_at(seed, 0))
        first, was_refused = resumed.step + 1 if resumed else 1, False
        for step in range(first, first + rng.randint(4, 8)):
            try:
                checkpoints.save(step, _state_at(seed, step)).result()
                found["commits"] += 1
                was_refused = False
            except ParentRetired:
                found["refused"] += 1
                found["refused twice running"] += was_refused
                was_refused = True
    unsubscribe()
    return found


def _prune(url: str, seed: str, number: int, stop: Connection) -> dict[str, int]:
    """Prune until told to stop, and once more; what was seen."""
    rng = random.Random(f"{seed}/pruner/{number}")
    found: Counter[str] = Counter()
    store = open_store(url)
    log = RunLog(store)
    is_stopped = False
    while not is_stopped:
        is_stopped = stop.poll(rng.uniform(0, _LONGEST_PAUSE_S))
        for pruned in prune(store, log, KeepLast(1)):
            found["retired"] += pruned.is_retired
            if pruned.failure is not None:
                raise pruned.failure
    stop.recv()
    store.close()
    return found


def _serve(pipe: Connection, role: str) -> None:
    """Carry out one order after the other, until the pipe ends."""
    torch.set_num_threads(1)
    while True:
        try:
            order = pipe.recv()
        except EOFError:
            return
        try:
            answer = _write(*order) if role == "writer" else _prune(*order, pipe)
            pipe.send(("done", dict(answer)))
        except Exception:
            pipe.send(("failed", traceback.format_exc()[-3000:]))


class _Actor:
    """A process that writes, or prunes."""

    def __init__(self, role: str) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, other = context.Pipe()
        self._role = role
        self._process = context.Process(target=_serve, args=(other, role), daemon=True)
        self._process.start()
        other.close()

    def begin(self, url: str, seed: str, number: int) -> None:
        self._pipe.send((url, seed, number))

    def stop(self) -> None:
        self._pipe.send("stop")

    def outcome(self) -> tuple[dict[str, int], list[Finding]]:
        """What it saw."""
        if not self._pipe.poll(_LIMIT_S):
            self._process.kill()
            raise TimeoutError(f"the {self._role} said nothing for {_LIMIT_S} s")
        verdict, what = self._pipe.recv()
        if verdict == "failed":
            return {}, [Finding("untyped", f"{self._role}: {what}")]
        return what, []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._pipe.close()
        self._process.join(_LIMIT_S)


def run_incremental(
    *, num_rounds: int, seed: int, tell: Callable[[str], None] = print
) -> Incremental:
    """Run one.

    Args:
        num_rounds: Each is one start of the writer.
        seed: Of everything that is drawn.
        tell: Called with a line now and then.
    """
    campaign = Incremental(seed)
    began_s = time.monotonic()
    root = Path(tempfile.mkdtemp(prefix="campaign-incremental-"))
    try:
        with _Actor("writer") as writer, _Actor("pruner") as pruner:
            for number in range(num_rounds):
                run = number // _ROUNDS_PER_RUN
                url, run_seed = str(root / str(run)), f"{seed}/{run}"
                for finding in _round(campaign, writer, pruner, url, run_seed, number):
                    campaign.findings.append((number, finding))
                    tell(f"round {number}: {finding.kind}: {finding.text}")
                campaign.num_rounds += 1
                if (number + 1) % _ROUNDS_PER_RUN == 0:
                    shutil.rmtree(url)
                    tell(f"{number + 1} rounds, {len(campaign.findings)} findings")
    finally:
        shutil.rmtree(root, ignore_errors=True)
    campaign.duration_s = time.monotonic() - began_s
    return campaign


def _round(
    campaign: Incremental, writer: _Actor, pruner: _Actor, url: str, seed: str, number: int
) -> list[Finding]:
    findings: list[Finding] = []
    pruner.begin(url, seed, number)
    writer.begin(url, seed, number)
    seen, faults = writer.outcome()
    pruner.stop()
    for counts, more in ((seen, faults), pruner.outcome()):
        campaign.counts.update(counts)
        findings += more
    if seen.get("refused twice running"):
        findings.append(Finding("refused", "a save after a refused one was refused"))
    store = open_store(url)
    findings += audit(store)
    commits = RunLog(store).refresh().live_commits().values()
    campaign.counts["checkpoints proved"] += len(commits)
    campaign.counts["that refer to others"] += sum(bool(r.references) for r in commits)
    store.close()
    if not _is_exact(url, seed):
        findings.append(Finding("inexact", "the newest checkpoint is not the state of its step"))
    return findings


def _is_exact(url: str, seed: str) -> bool:
    state = _state_at(seed, 0)
    with CheckpointManager(url) as checkpoints:
        step = checkpoints.load(state).step
    expected = _state_at(seed, step)
    return state["trainer"] == expected["trainer"] and all(
        torch.equal(tensor, expected["model"][name]) for name, tensor in state["model"].items()
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run a campaign from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().getrandbits(32))
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    arguments = parser.parse_args(argv)
    print(f"seed {arguments.seed}", flush=True)
    campaign = run_incremental(
        num_rounds=arguments.rounds,
        seed=arguments.seed,
        tell=lambda line: print(line, flush=True),
    )
    document = campaign.document()
    for name, value in document.items():
        if name != "findings":
            shown = f"{value:.2f}" if isinstance(value, float) else str(value)
            print(f"{name:<28} {shown:>12}")
    if arguments.json:
        arguments.json.write_text(json.dumps(document, indent=2) + "\n")
    return 1 if campaign.findings else 0


if __name__ == "__main__":
    sys.exit(main())

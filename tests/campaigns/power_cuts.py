"""Cut the power of a small real job at random instants, again and again, and look at what is left.

    python -m tests.campaigns.power_cuts --cuts 200

Each start of the job runs on an ext4 that is stopped without a flush while the job resumes, saves,
loads or deletes; every rank dies with it. Once the journal is replayed, every byte of every
checkpoint is proved, and the next start must go on from the newest. Needs root. Ends with 0 if
nothing that was acknowledged is lost, and all that counts is whole. ``--seed`` repeats a campaign.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from dcp_resume.session.run_log import RunLog
from dcp_resume.storage import open_store
from tests.campaigns.audit import audit
from tests.campaigns.crashes import take_census
from tests.campaigns.judging import Finding
from tests.campaigns.kills import Plan, draw_plan
from tests.campaigns.places import Place
from tests.campaigns.supervisor import Supervisor
from tests.support.ext4_disk import CannotMount, Cut, Ext4Disk, in_memory

__all__ = ["PowerCuts", "run_power_cuts"]

_CUTS_PER_DISK = 20
_DEADLINE_S = 30.0
_LIMIT_S = 90.0


@dataclass
class PowerCuts:
    """What came of a campaign."""

    seed: int
    places: Counter[str] = field(default_factory=Counter)
    """What rank 0 was doing, per cut."""
    left: Counter[str] = field(default_factory=Counter)
    """What the newest checkpoint was after a cut: ``none``, ``old`` (the last acknowledged one) or
    ``new`` (committed, and the cut came before anybody was told)."""
    num_acknowledged: int = 0
    """Starts in which a checkpoint was acknowledged."""
    findings: list[tuple[int, Finding]] = field(default_factory=list)
    """With the number of the cut after which they were seen."""
    duration_s: float = 0.0

    def document(self) -> dict[str, Any]:
        """Figures as JSON."""
        kinds = Counter(finding.kind for _, finding in self.findings)
        return {
            "seed": self.seed,
            "cuts": self.places.total(),
            "newest_after_the_cut": self.left,
            "starts_with_an_acknowledged_checkpoint": self.num_acknowledged,
            "lost": kinds["lost"],
            "findings": [[cut, found.kind, found.text] for cut, found in self.findings],
            "cuts_by_place": self.places,
            "duration_s": round(self.duration_s, 1),
        }


class _PowerCutter(Supervisor):
    """Kills all ranks of a start, and stops their disk in the same instant."""

    def __init__(self, disk: Ext4Disk, cut: Cut) -> None:
        place = Place(str(disk.root / "run"))
        super().__init__(place, deadline_s=_DEADLINE_S, limit_s=_LIMIT_S)
        self._disk = disk
        self.cut = cut

    def _kill(self, plan: Plan, ranks: list[Any]) -> None:
        super()._kill(plan, ranks)
        self._disk.cut_power(self.cut)


def run_power_cuts(*, num_cuts: int, seed: int, tell: Callable[[str], None] = print) -> PowerCuts:
    """Run a campaign.

    Args:
        num_cuts: Starts of the job, each of which ends with a cut.
        seed: Of everything that is drawn.
        tell: Called with a line now and then.

    Raises:
        CannotMount: A program or a right is missing.
    """
    result, rng, began_s = PowerCuts(seed), random.Random(seed), time.monotonic()
    with tempfile.TemporaryDirectory(prefix="power-cuts-") as directory:
        while (done := result.places.total()) < num_cuts:
            below = Path(directory, str(done))
            below.mkdir()
            with in_memory(below, num_mib=1024) as memory, Ext4Disk.new(memory) as disk:
                _cut_one_disk(disk, min(_CUTS_PER_DISK, num_cuts - done), rng, result)
            tell(f"{result.places.total()} cuts, {len(result.findings)} findings")
    result.duration_s = time.monotonic() - began_s
    return result


def _cut_one_disk(disk: Ext4Disk, num_cuts: int, rng: random.Random, result: PowerCuts) -> None:
    census_root = disk.root / "census"
    patient = Supervisor(Place(str(census_root)), deadline_s=_DEADLINE_S, limit_s=_LIMIT_S)
    census, span_s = take_census(patient)
    cutter = _PowerCutter(disk, Cut.NOW)
    for _ in range(num_cuts):
        cutter.cut = rng.choice(list(Cut))
        plan = draw_plan(rng, census, span_s, server_share=0.0)
        start = cutter.start(replace(plan, victims=tuple(range(plan.world_size))))
        disk.restart()
        result.places[start.killed_at] += 1
        result.num_acknowledged += start.durable > 0
        found = start.findings + _look(disk.root / "run", cutter.floor, result.left)
        result.findings += [(result.places.total(), finding) for finding in found]


def _look(root: Path, floor: int, left: Counter[str]) -> list[Finding]:
    """Prove what a cut left; ``floor`` is the highest step that was acknowledged."""
    with contextlib.closing(open_store(str(root))) as store:
        live = RunLog(store).refresh().live_commits()
        newest = max((record.step for record in live.values()), default=0)
        left["new" if newest > floor else "old" if newest else "none"] += 1
        found = audit(store)
    if newest < floor:
        found.append(Finding("lost", f"the newest is step {newest}, {floor} was acknowledged"))
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Run a campaign from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--cuts", type=int, default=200)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().getrandbits(32))
    arguments = parser.parse_args(argv)
    print(f"seed {arguments.seed}", flush=True)
    try:
        result = run_power_cuts(num_cuts=arguments.cuts, seed=arguments.seed)
    except CannotMount as error:
        print(f"NOT TESTED: a power cut needs an ext4 on a loop device: {error}", file=sys.stderr)
        return 2
    print(json.dumps(result.document(), indent=2))
    return 1 if result.findings else 0


if __name__ == "__main__":
    sys.exit(main())

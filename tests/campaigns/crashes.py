"""Kill a small real job at random instants, again and again, and look at what it resumes from.

    python -m tests.campaigns.crashes --kills 1000
    python -m tests.campaigns.crashes --kills 200 --storage s3

Ends with 0 if no acknowledged checkpoint was lost, nothing hung, every resume gave exactly the
state of a committed step, and no litter was left that nobody collects. ``--seed`` repeats a
campaign; kills from inside the library then hit the same call again.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dcp_resume.storage import open_store
from tests.campaigns.audit import audit
from tests.campaigns.figures import print_figures
from tests.campaigns.judging import Finding, Start
from tests.campaigns.kills import Census, Plan, draw_plan
from tests.campaigns.places import Places
from tests.campaigns.supervisor import Supervisor

__all__ = ["Campaign", "run_campaign", "take_census"]

_STARTS_PER_RUN = 20
_SERVER_SHARE = 0.25


@dataclass
class Campaign:
    """What came of it."""

    seed: int
    storage: str
    deadline_s: float
    starts: list[Start] = field(default_factory=list)
    findings: list[tuple[int, Finding]] = field(default_factory=list)
    """With the number of the start after which they were seen."""
    duration_s: float = 0.0

    def document(self) -> dict[str, Any]:
        """Figures as JSON."""
        detections = sorted(s for start in self.starts for s in start.detection_s)
        kinds = Counter(finding.kind for _, finding in self.findings)
        return {
            "seed": self.seed,
            "storage": self.storage,
            "deadline_s": self.deadline_s,
            "kills": len(self.starts),
            "kills_by_victim": Counter(map(_victim, self.starts)),
            "kills_by_place": Counter(start.killed_at for start in self.starts),
            "resumes_checked": sum(start.resumed is not None for start in self.starts),
            "loads_checked": sum(start.num_loads for start in self.starts),
            "acknowledged": sum(start.durable > 0 for start in self.starts),
            "retries": sum(start.num_retries for start in self.starts),
            "early_errors": sum(start.num_early_errors for start in self.starts),
            "errors": sum((start.errors for start in self.starts), Counter()),
            "detections": len(detections),
            "detection_median_s": statistics.median(detections) if detections else None,
            "detection_worst_s": max(detections, default=None),
            "duration_s": self.duration_s,
            **{kind: kinds[kind] for kind in ("lost", "inexact", "unusable", "hang")},
            **{kind: kinds[kind] for kind in ("untyped", "litter", "fenced")},
            "findings": [
                {"start": number, "kind": finding.kind, "text": finding.text}
                for number, finding in self.findings
            ],
        }


def _victim(start: Start) -> str:
    plan = start.plan
    if plan.is_server_killed:
        return "server"
    return "all ranks" if len(plan.victims) == plan.world_size else "one rank"


def run_campaign(
    *,
    num_kills: int,
    seed: int,
    storage: str,
    deadline_s: float,
    limit_s: float = 90.0,
    tell: Callable[[str], None] = print,
) -> Campaign:
    """Run one.

    Args:
        num_kills: Starts of the job, each of which is killed.
        seed: Of everything that is drawn.
        storage: ``local`` or ``s3``.
        deadline_s: Of the job's saves and loads.
        limit_s: After which a start of the job hangs.
        tell: Called with a line now and then.
    """
    campaign = Campaign(seed, storage, deadline_s)
    began_s = time.monotonic()
    with contextlib.ExitStack() as stack:
        places = Places(stack, storage)
        patient = Supervisor(places.new(), deadline_s=limit_s / 2, limit_s=limit_s)
        census, span_s = take_census(patient)
        while len(campaign.starts) < num_kills:
            place = places.new()
            supervisor = Supervisor(place, deadline_s=deadline_s, limit_s=limit_s)
            for _ in range(min(_STARTS_PER_RUN, num_kills - len(campaign.starts))):
                share = _SERVER_SHARE if place.server else 0.0
                # Drawn apart, so that one draw more or less does not change all that follow.
                rng = random.Random(f"{seed}/{len(campaign.starts)}")
                plan = draw_plan(rng, census, span_s, server_share=share)
                start = supervisor.start(plan)
                campaign.starts.append(start)
                _note(campaign, start.findings, tell)
            # Whatever the last kill left, one more start must clear up and go on from.
            last = supervisor.start(Plan(len(campaign.starts), 2, False, ()))
            with contextlib.closing(
                open_store(place.url, storage_options=place.storage_options)
            ) as store:
                _note(campaign, last.findings + audit(store), tell)
            places.forget(place)
            tell(f"{len(campaign.starts)} kills, {len(campaign.findings)} findings")
    campaign.duration_s = time.monotonic() - began_s
    return campaign


def take_census(supervisor: Supervisor) -> tuple[Census, float]:
    """Calls that each file of the library makes, and seconds that a start takes, undisturbed."""
    census: Counter[tuple[bool, str]] = Counter()
    busy_s = []
    for seed in range(3):  # the first one saves to an empty run; some in the background
        start = supervisor.start(Plan(seed, 2, False, ()), is_counting=True)
        if start.findings or start.errors or len(start.calls) < start.plan.world_size:
            raise RuntimeError(f"the job failed, though nobody disturbed it: {start}")
        busy_s.append(start.busy_s)
        for rank, calls in start.calls.items():
            for file, count in calls.items():
                place = (rank == 0, file)
                census[place] = max(census[place], count)
    return dict(census), statistics.median(busy_s)


def _note(campaign: Campaign, findings: Sequence[Finding], tell: Callable[[str], None]) -> None:
    for finding in findings:
        campaign.findings.append((len(campaign.starts), finding))
        tell(f"start {len(campaign.starts)}: {finding.kind}: {finding.text}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a campaign from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--kills", type=int, default=1000)
    parser.add_argument("--storage", choices=("local", "s3"), default="local")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().getrandbits(32))
    parser.add_argument("--deadline-s", type=float, default=3.0, help="of saves and loads")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    arguments = parser.parse_args(argv)
    print(f"seed {arguments.seed}", flush=True)
    campaign = run_campaign(
        num_kills=arguments.kills,
        seed=arguments.seed,
        storage=arguments.storage,
        deadline_s=arguments.deadline_s,
        tell=lambda line: print(line, flush=True),
    )
    document = campaign.document()
    print_figures(document)
    if arguments.json:
        arguments.json.write_text(json.dumps(document, indent=2) + "\n")
    return 1 if campaign.findings else 0


if __name__ == "__main__":
    sys.exit(main())

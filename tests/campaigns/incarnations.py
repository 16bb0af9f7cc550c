"""Two incarnations of one job write the same run at once, round after round, and one is to win.

    python -m tests.campaigns.incarnations --rounds 200
    python -m tests.campaigns.incarnations --rounds 50 --storage s3

In each round two real jobs of two ranks resume and save: together, or one is stopped in the middle
of a save and woken after the other one has committed, or is killed there; some resume from an older
step that the user chose. A reader loads the newest checkpoint all the time.

Ends with 0 if each (generation, step) has one commit at most, and exactly one where it was
acknowledged; each commit is whole, and the state of one incarnation; the reader and every resume
saw just the newest one of the newest generation; and every incarnation that was superseded ended
in ``Fenced``, in time. ``--seed`` repeats a campaign.
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

from dcp_resume import SaveMode
from dcp_resume.storage import open_store
from tests.campaigns.audit import audit
from tests.campaigns.figures import print_figures
from tests.campaigns.incarnation_job import CLOSE, Part
from tests.campaigns.incarnation_judge import Chronicle, judge_reads, judge_team
from tests.campaigns.incarnation_rounds import MAX_SAVES, Fate, Plan, draw_round, older_step
from tests.campaigns.incarnation_teams import Hang, Stage, Team
from tests.campaigns.judging import Finding
from tests.campaigns.places import Place, Places
from tests.campaigns.speakers import Report

__all__ = ["Incarnations", "run_incarnations"]

_ROUNDS_PER_RUN = 20
_LIMIT_S = 90.0
_PATIENT_S = 40.0
"""Deadline of saves and loads, but for an incarnation that is to lose a rank."""


@dataclass
class Incarnations:
    """What came of a campaign."""

    seed: int
    storage: str
    kinds: Counter[str] = field(default_factory=Counter)
    trapped: Counter[str] = field(default_factory=Counter)
    """Phase of the save in which a trap sprang."""
    num_commits: int = 0
    num_opens: int = 0
    num_rollbacks_kept: int = 0
    """Rollbacks after which the successor, asked for nothing, went on from the chosen line."""
    num_reads: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    fenced_s: list[float] = field(default_factory=list)
    """From the moment that a superseded rank could know, to its ``Fenced``."""
    bereft_s: list[float] = field(default_factory=list)
    """From a rank's death to the error of the other one."""
    findings: list[tuple[int, Finding]] = field(default_factory=list)
    """With the number of the round."""
    duration_s: float = 0.0

    def document(self) -> dict[str, Any]:
        """Figures as JSON."""
        return {
            "seed": self.seed,
            "storage": self.storage,
            "rounds": self.kinds.total(),
            "rounds_by_kind": self.kinds,
            "trapped_in": self.trapped,
            "opens": self.num_opens,
            "commits_proved": self.num_commits,
            "rollbacks_kept": self.num_rollbacks_kept,
            "reads_checked": self.num_reads,
            "errors": self.errors,
            "fenced_median_s": statistics.median(self.fenced_s) if self.fenced_s else None,
            "fenced_worst_s": max(self.fenced_s, default=None),
            "bereft_worst_s": max(self.bereft_s, default=None),
            "findings_by_kind": Counter(found.kind for _, found in self.findings),
            "findings": [[number, found.kind, found.text] for number, found in self.findings],
            "duration_s": round(self.duration_s, 1),
        }


def run_incarnations(
    *,
    num_rounds: int,
    seed: int,
    storage: str,
    deadline_s: float,
    tell: Callable[[str], None] = print,
) -> Incarnations:
    """Run a campaign.

    Args:
        num_rounds: Rounds of two incarnations each.
        seed: Of everything that is drawn.
        storage: ``local`` or ``s3``.
        deadline_s: Of the saves of an incarnation that is to lose a rank.
        tell: Called with a line now and then.
    """
    result, began_s = Incarnations(seed, storage), time.monotonic()
    with contextlib.ExitStack() as stack:
        places = Places(stack, storage)
        stage = stack.enter_context(Stage(_LIMIT_S))
        calls, span_s = _take_census(stage, places.new())
        while result.kinds.total() < num_rounds:
            place = places.new()
            store = stack.enter_context(
                contextlib.closing(open_store(place.url, storage_options=place.storage_options))
            )
            run = _Run(stage, place, Chronicle(store), result, deadline_s, tell)
            stage.reader.turn_to(place)
            for _ in range(min(_ROUNDS_PER_RUN, num_rounds - result.kinds.total())):
                # Drawn apart, so that one draw more or less does not change all that follow.
                rng = random.Random(f"{seed}/{result.kinds.total()}")
                run.play(draw_round(rng, calls, span_s))
            result.findings += [(result.kinds.total(), found) for found in audit(store)]
            result.num_commits += len(run.chronicle.commits)
            result.num_opens += len(run.chronicle.sources)
            # The run stays until the end: the reader may be in the middle of a load of it.
            tell(f"{result.kinds.total()} rounds, {len(result.findings)} findings")
    result.duration_s = time.monotonic() - began_s
    return result


def _take_census(stage: Stage, place: Place) -> tuple[dict[tuple[int, int], Any], float]:
    """Calls of each save by file, and seconds that an incarnation takes, undisturbed."""
    team, began_s = stage.teams[0], time.monotonic()
    waits = (True,) * MAX_SAVES
    options = place.storage_options
    team.begin(
        Part(place.url, options, 0, "latest", waits, SaveMode.BACKGROUND, _PATIENT_S, None, True)
    )
    stage.hear_until(lambda: team.is_quiet)
    span_s = time.monotonic() - began_s
    calls = {
        (number, save): made
        for number, rank in enumerate(team.ranks)
        for report in rank.all("paused")
        for save, made in enumerate(report["calls"])
    }
    if not team.all("paused"):
        raise RuntimeError(f"the job failed, though nobody disturbed it: {team.all('error')}")
    team.tell(CLOSE)
    stage.hear_until(lambda: all(rank.is_settled for rank in team.ranks))
    return calls, span_s


class _Run:
    """Rounds at one place."""

    def __init__(
        self,
        stage: Stage,
        place: Place,
        chronicle: Chronicle,
        result: Incarnations,
        deadline_s: float,
        tell: Callable[[str], None],
    ) -> None:
        self._tell = tell
        self.chronicle = chronicle
        self._stage = stage
        self._place = place
        self._result = result
        self._deadline_s = deadline_s

    def play(self, plan: Plan) -> None:
        """Play one round, and judge it."""
        number = self._result.kinds.total()
        parts = self._parts(plan, number)
        first = self._stage.teams[plan.first_team]
        second = self._stage.teams[1 - plan.first_team]
        try:
            self._perform(plan, parts, first, second)
            self._stage.close_round()
        except Hang as error:
            self._learn_writers(parts, (first, second))
            found = [Finding("hang", f"{error}: {first.disband()}\n{second.disband()}")]
        else:
            found = self._judge(parts, (first, second))
            self._note(parts[0].request, first, second)
        asked = "latest" if parts[0].request == "latest" else "rollback"
        self._result.kinds[f"{asked}, first {plan.fate.value}"] += 1
        for one in found:
            self._result.findings.append((number, one))
            self._tell(f"round {number}: {one.kind}: {one.text}")
        for team in (first, second):
            if team.ranks and not team.is_fit:
                team.disband()

    def _parts(self, plan: Plan, number: int) -> tuple[Part, Part]:
        steps = [record["step"] for record in self.chronicle.commits.values()]
        older = older_step(steps, plan.choice) if plan.is_rolled_back else None
        is_killed = plan.fate is Fate.KILLED

        def part(position: int) -> Part:
            is_first = position == 0
            side = plan.sides[position]
            return Part(
                url=self._place.url,
                storage_options=self._place.storage_options,
                writer=2 * number + position + 1,
                request=older if is_first and older is not None else "latest",
                waits=side.waits,
                mode=side.mode,
                deadline_s=self._deadline_s if is_first and is_killed else _PATIENT_S,
                trap=plan.trap if is_first else None,
            )

        return part(0), part(1)

    def _perform(self, plan: Plan, parts: tuple[Part, Part], first: Team, second: Team) -> None:
        has_begun = False

        def react() -> bool:
            if plan.trap and first.trapped_s is None and first.all("trapped"):
                first.overtake(plan.trap, plan.is_whole)
            if first.asleep and has_begun and (second.all("committed") or second.is_quiet):
                first.wake()
            return False

        def is_cue() -> bool:
            react()
            if plan.is_awaiting_trap:
                return first.trapped_s is not None or first.is_quiet
            return not plan.is_rolled_back or bool(first.all("opened")) or first.is_quiet

        first.begin(parts[0])
        self._stage.hear_until(is_cue)
        if not plan.is_awaiting_trap:
            self._stage.hear_until(react, for_s=plan.offset_s)
        second.begin(parts[1])
        has_begun = True
        self._stage.hear_until(
            lambda: react() or (first.is_quiet and second.is_quiet and not first.asleep)
        )

    def _learn_writers(self, parts: tuple[Part, Part], teams: tuple[Team, Team]) -> None:
        for part, team in zip(parts, teams, strict=True):
            if team.generation:
                self.chronicle.writers[team.generation] = part.writer

    def _judge(self, parts: tuple[Part, Part], teams: tuple[Team, Team]) -> list[Finding]:
        chronicle, reader = self.chronicle, self._stage.reader
        self._learn_writers(parts, teams)
        found = chronicle.read_on()
        last_seq, newest = len(chronicle.records), chronicle.newest[-1]
        self._stage.hear_until(
            lambda: (
                newest is None
                or reader.is_settled
                or any(read["span"][0] >= last_seq for read in self._reads())
            )
        )
        reads = self._reads()
        self._result.num_reads += len(reads)
        found += judge_reads(chronicle, reads)
        found += [
            Finding("reader", str(report))
            for what in ("error", "untyped")
            for report in reader.all(what)
        ]
        if reader.is_settled:
            self._stage.renew_reader(self._place)
        # The last one was of the whole log, and tells the next round's where to go on from.
        reader.reports[:] = reads[-1:]
        for part, team in zip(parts, teams, strict=True):
            is_newest = team.generation == chronicle.live[-1]
            found += judge_team(chronicle, part, team, is_newest=is_newest)
        return found

    def _reads(self) -> list[Report]:
        """Of this run: some of the one before may still have been under way."""
        return [read for read in self._stage.reader.all("read") if read["url"] == self._place.url]

    def _note(self, request: int | str, first: Team, second: Team) -> None:
        result = self._result
        if first.trapped_s is not None:
            places = [
                report["name"] for report in first.all("place") if report["at_s"] < first.trapped_s
            ]
            result.trapped[places[-1] if places else "agree"] += 1
        if request != "latest" and 0 < first.generation < second.generation:
            result.num_rollbacks_kept += 1  # or where the successor went on from is a finding
        older, newer = sorted((first, second), key=lambda team: team.generation)
        for team in (older, newer):
            for error in team.all("error"):
                result.errors[error["type"]] += 1
                if team.dead and team.trapped_s is not None:
                    result.bereft_s.append(error["at_s"] - team.trapped_s)
                elif team is older:
                    told = [newer.all("opened")[0]["at_s"], team.woken_s, team.again_s]
                    known = [at_s for at_s in told if at_s is not None and at_s < error["at_s"]]
                    result.fenced_s.append(error["at_s"] - max(known, default=error["at_s"]))


def main(argv: Sequence[str] | None = None) -> int:
    """Run a campaign from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--storage", choices=("local", "s3"), default="local")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().getrandbits(32))
    parser.add_argument("--deadline-s", type=float, default=4.0, help="of those that lose a rank")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    arguments = parser.parse_args(argv)
    print(f"seed {arguments.seed}", flush=True)
    result = run_incarnations(
        num_rounds=arguments.rounds,
        seed=arguments.seed,
        storage=arguments.storage,
        deadline_s=arguments.deadline_s,
        tell=lambda line: print(line, flush=True),
    )
    document = result.document()
    print_figures(document)
    if arguments.json:
        arguments.json.write_text(json.dumps(document, indent=2) + "\n")
    return 1 if result.findings else 0


if __name__ == "__main__":
    sys.exit(main())

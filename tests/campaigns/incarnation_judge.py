"""What a round came to, from the log and the bytes, and whether anything of it must not be.

The log is folded here anew, by rules of this file alone: the newest commit is the last one of the
newest generation, or what that generation resumed from.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from safetensors.torch import load

from dcp_resume.errors import KeyNotFound
from dcp_resume.manifest.history import CommitEntry
from dcp_resume.manifest.keys import log_key
from dcp_resume.manifest.records import CommitRecord, log_record_adapter
from dcp_resume.session.load import Located
from dcp_resume.session.verify import verify_checkpoint
from dcp_resume.storage import ObjectStore
from tests.campaigns.incarnation_job import Part
from tests.campaigns.incarnation_teams import Team
from tests.campaigns.judging import Finding
from tests.campaigns.labelled_state import Label, labels_of
from tests.campaigns.speakers import Report

__all__ = ["Chronicle", "judge_reads", "judge_team"]

_MAX_BYTES = 1 << 24


@dataclass
class Chronicle:
    """A run's log, read record by record."""

    store: ObjectStore
    records: list[dict[str, Any]] = field(default_factory=list)
    commits: dict[int, dict[str, Any]] = field(default_factory=dict)
    """Log number → record."""
    sources: dict[int, int | None] = field(default_factory=dict)
    """Generation → log number of the commit that it resumed from."""
    live: list[int] = field(default_factory=lambda: [0])
    """``[records + 1]`` the generation that owns the run after so many records."""
    newest: list[int | None] = field(default_factory=lambda: [None])
    """``[records + 1]`` the commit to resume from after so many records."""
    writers: dict[int, int] = field(default_factory=dict)
    """Generation → what its states are labelled with; told by those who opened it."""

    def read_on(self) -> list[Finding]:
        """Read the new records, and prove the bytes of new commits."""
        found: list[Finding] = []
        while True:
            seq = len(self.records) + 1
            try:
                record = json.loads(self.store.read(log_key(seq), max_bytes=_MAX_BYTES))
            except KeyNotFound:
                return found
            found += self._add(seq, record)

    def _add(self, seq: int, record: dict[str, Any]) -> Iterable[Finding]:
        live, newest = self.live[-1], self.newest[-1]
        found = []
        if record["kind"] == "open":
            live, newest = record["generation"], record["resume_source"]
            self.sources[live] = newest
            if live != self.live[-1] + 1:
                found.append(Finding("stale", f"record {seq} opens {live} after {self.live[-1]}"))
        elif record["kind"] == "commit":
            place = (record["generation"], record["step"])
            others = {(other["generation"], other["step"]) for other in self.commits.values()}
            if place in others:
                found.append(Finding("twice", f"record {seq}: generation, step {place}"))
            if record["generation"] != live:
                found.append(Finding("stale", f"record {seq}: {place} while {live} owned the run"))
            self.commits[seq] = record
            newest = seq
            found += self._prove(seq, record)
        else:
            found.append(Finding("stale", f"record {seq}: nobody asked for {record['kind']}"))
        self.records.append(record)
        self.live.append(live)
        self.newest.append(newest)
        return found

    def label(self, seq: int | None) -> Label | None:
        """What the state of a commit must be labelled with."""
        record = self.commits.get(seq or 0)
        return Label(self.writers[record["generation"]], record["step"]) if record else None

    def _prove(self, seq: int, record: dict[str, Any]) -> Iterable[Finding]:
        known = log_record_adapter.validate_python(
            {name: value for name, value in record.items() if name != "checksum"}
        )
        assert isinstance(known, CommitRecord)
        proof = verify_checkpoint(self.store, Located.of(CommitEntry(seq, known)))
        for problem in proof.problems:
            yield Finding("torn", f"record {seq}: {problem}")
        manifest_key = record["manifest"]["key"]
        directory = manifest_key.rpartition("/")[0] + "/"
        manifest = json.loads(self.store.read(manifest_key, max_bytes=_MAX_BYTES))
        keys = [info.key for info in self.store.list(directory)]
        files = (
            load(self.store.read(key, max_bytes=_MAX_BYTES))
            for key in keys
            if key.endswith(".safetensors")
        )
        pieces = (piece for file in files for piece in file.items())
        labels, is_complete = labels_of(
            pieces, {leaf["fqn"]: leaf["value"] for leaf in manifest["leaves"]}
        )
        if not is_complete:
            yield Finding("torn", f"record {seq}: elements are missing, or there twice")
        if labels != {self.label(seq)}:
            yield Finding("mixture", f"record {seq}: {labels}, expected {self.label(seq)}")


def judge_team(
    chronicle: Chronicle, part: Part, team: Team, *, is_newest: bool
) -> Iterable[Finding]:
    """What one incarnation did and said in a round.

    Args:
        chronicle: The log after the round.
        part: What the incarnation was told.
        team: Its ranks.
        is_newest: Whether it opened the run last.
    """
    who, generation = f"writer {part.writer}", team.generation
    for report in team.all("untyped"):
        yield Finding("untyped", f"{who}: {report['trace']}")
    opened = [seq for seq, r in enumerate(chronicle.records, 1) if r.get("kind") == "open"]
    source = chronicle.sources.get(generation)
    if generation:
        yield from _judge_source(chronicle, part, opened[generation - 1])
    for report in team.all("resumed"):
        expected = chronicle.label(source)
        if report["seq"] != source or _label(report) != expected:
            yield Finding("inexact", f"{who}: {report}, expected {expected} of record {source}")
    for report in team.all("saved"):
        record = chronicle.commits.get(report["seq"], {})
        if (record.get("generation"), record.get("step")) != (generation, report["step"]):
            yield Finding("lost", f"{who} of generation {generation}: {report}, but {record}")
    yield from _judge_endings(who, team, is_newest)


def _judge_source(chronicle: Chronicle, part: Part, opened: int) -> Iterable[Finding]:
    source = chronicle.newest[opened]
    text = f"record {opened} of writer {part.writer} resumes from {source}"
    if part.request == "latest":
        if source != chronicle.newest[opened - 1]:
            yield Finding("source", f"{text}, newest was {chronicle.newest[opened - 1]}")
    elif chronicle.commits.get(source or 0, {}).get("step") != part.request:
        yield Finding("source", f"{text}, asked for step {part.request}")


def _judge_endings(who: str, team: Team, is_newest: bool) -> Iterable[Finding]:
    if team.dead:
        return  # what it left behind was judged; whoever survived may say what it likes, typed
    for number, rank in enumerate(team.ranks):
        kinds = [report["type"] for report in rank.all("error")]
        expected = [] if is_newest else ["Fenced"]
        if kinds != expected and not rank.all("untyped"):
            kind = "refused" if is_newest else "unfenced"
            yield Finding(kind, f"{who}, rank {number}: {rank.reports[-6:]}")


def judge_reads(chronicle: Chronicle, reads: Iterable[Report]) -> Iterable[Finding]:
    """What the reader saw, against every state of the log between its looks at it."""
    last = 0
    for read in reads:
        first, after = read["span"]
        allowed = {chronicle.newest[seq] for seq in range(first, after + 1)}
        steps = {chronicle.commits[seq]["step"] for seq in allowed if seq}
        live = [chronicle.live[first], chronicle.live[after]]
        is_forward = last <= read["live"][0] <= read["live"][1]
        last = read["live"][1]
        expected = chronicle.label(read["seq"])
        is_newest = read["seq"] in allowed and read["latest"] in steps and read["live"] == live
        if not (is_forward and is_newest and _label(read) == expected):
            yield Finding("reader", f"{read}, allowed {allowed}, labelled {expected}")


def _label(report: Mapping[str, Any]) -> Label | None:
    return Label(*report["label"]) if report["label"] else None

"""One load, from start to outcome.

1. Find (coordinator). The asked commit is looked up in the log; all ranks take the same one.
2. Open (every rank). Manifest, catalog and index are read and proved; the coordinator proves by one
   listing that every data file is there at its size.
3. Compare (every rank). The state handed in is compared with the catalog; all ranks get the same
   report, and either all go on or none does. Until here nothing has changed.
4. Read (every rank). Exact byte ranges, widened to digest blocks, are fetched in parallel.
5. Prove and place (every rank). Each block is verified before it enters the trainer's memory, or,
   with ``Apply.ATOMIC``, before any does. All ranks agree on the outcome.
6. Prove tensors (every rank), if asked. What the ranks then hold together has the digests that were
   recorded at save.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from dcp_resume import errors
from dcp_resume.errors import (
    CorruptData,
    DcpResumeError,
    InvalidCheckpoint,
    InvalidDocument,
    LoadRefused,
    PartialLoad,
    Problem,
)
from dcp_resume.events import LoadFinished, emit
from dcp_resume.format.leaves import decode_leaf
from dcp_resume.manifest.report import ReportItem, Severity, overridden
from dcp_resume.manifest.signing import ANYONE, Trust
from dcp_resume.planning.state import LocalState
from dcp_resume.problems import summarise
from dcp_resume.session.compare import LoadReport, Strictness, compare_state
from dcp_resume.session.device_loads import fill
from dcp_resume.session.loaded_tensors import prove_loaded, unrecorded
from dcp_resume.session.located import Located
from dcp_resume.session.opening import OpenedCheckpoint, check_files, open_checkpoint
from dcp_resume.session.reading import ReadOutcome
from dcp_resume.session.targets import Apply, DeviceTarget, Target, settle, target_of, targets_of
from dcp_resume.session.tensor_digests import Prove
from dcp_resume.session.values import (
    StoredValue,
    fill_empty_mappings,
    own_box,
    read_values,
    tied_values,
)
from dcp_resume.session.votes import Votes
from dcp_resume.storage import ObjectStore

__all__ = ["LoadOptions", "LoadResult", "LoadSession", "locate"]


Differences = Callable[[OpenedCheckpoint, Mapping[str, object]], Iterable[ReportItem]]
"""Documents, and FQN → decoded value → what differs."""


@dataclass(frozen=True, slots=True)
class LoadOptions:
    """How strictly to load."""

    strictness: Strictness = Strictness.RAISE
    """Of missing and unexpected names."""
    apply: Apply = Apply.IN_PLACE
    prove: Prove = Prove.BLOCKS
    parts: tuple[str, ...] | None = None
    """Parts to load, the others left alone; None to expect every part of the checkpoint."""
    overrides: Mapping[str, Severity] = field(default_factory=dict)
    """``kind`` or ``kind:where`` of a difference → the severity it shall have; patterns as in
    ``fnmatch``, the first match counts. What makes a load impossible (shapes, dtypes) stays
    refused."""


@dataclass(frozen=True, slots=True)
class LoadResult:
    """A checkpoint that is now in the trainer's memory."""

    step: int
    seq: int
    world_size: int
    """Ranks that saved it."""
    report: LoadReport
    values: Mapping[str, object]
    """FQN → decoded non-tensor leaf, of the leaves that the state has."""
    read_bytes: int
    """Bytes this rank fetched."""
    needed_bytes: int
    """Bytes this rank wanted."""
    duration_s: float


def locate(votes: Votes, find: Callable[[], Located]) -> Located:
    """Step 1: the coordinator finds the checkpoint, and tells every rank.

    Raises:
        CheckpointNotFound: On every rank alike.
        RankSilent: A rank did not answer by the deadline.
    """

    def decide(ballots: Sequence[bytes]) -> list[bytes]:
        return [find().to_bytes()] * len(ballots)

    return Located.from_bytes(votes.round("find", lambda: b"", decide))


class LoadSession:
    """One load of one located checkpoint on one rank."""

    def __init__(
        self,
        store: ObjectStore,
        votes: Votes,
        located: Located,
        options: LoadOptions,
        trust: Trust = ANYONE,
    ) -> None:
        self._store = store
        self._trust = trust
        self._votes = votes
        self._located = located
        self.options = options
        """May be narrowed between ``open`` and ``compare``, alike on all ranks."""
        self._started = time.monotonic()
        self._started_cpu_s = time.process_time()
        self._opened: OpenedCheckpoint | None = None
        self._values: dict[str, StoredValue] = {}
        self._state: LocalState | None = None
        self._decoded: dict[str, object] = {}

    @property
    def opened(self) -> OpenedCheckpoint:
        """The documents; known after ``open``."""
        assert self._opened is not None
        return self._opened

    @property
    def values(self) -> Mapping[str, StoredValue]:
        """FQN → key path and encoded value, as stored; known after ``open``."""
        return self._values

    @property
    def state(self) -> LocalState:
        """The state that the checkpoint is loaded into; known after ``compare``."""
        assert self._state is not None
        return self._state

    def open(self) -> None:
        """Step 2.

        Raises:
            InvalidCheckpoint: On every rank alike; ``problems`` lists what any rank found.
            RankErrors: A rank could not read the documents.
            RankSilent: A rank did not answer by the deadline.
        """
        located, votes = self._located, self._votes

        def work() -> bytes:
            try:
                opened = open_checkpoint(
                    self._store,
                    located.prefix,
                    located.manifest,
                    trust=self._trust,
                    is_listed=False,
                )
                if votes.rank == 0:
                    check_files(self._store, opened)
                self._opened = opened
                self._values = read_values(
                    self._store, opened, rank=votes.rank, world_size=votes.world_size
                )
            except InvalidCheckpoint as error:
                return _encode_problems(type(error).__name__, error.problems)
            return b""

        self._votes.round("open", work, _refuse_invalid)

    def compare(
        self,
        describe: Callable[[], LocalState],
        differences: Differences = lambda opened, values: (),
    ) -> LoadReport:
        """Step 3.

        Args:
            describe: Returns this rank's state; what it raises is told to all ranks.
            differences: Finds what else differs, from the documents and the decoded values.

        Raises:
            LoadRefused: The checkpoint does not fit some rank's state; nothing has changed.
            RankErrors: A rank's state cannot be described.
            RankSilent: A rank did not answer by the deadline.
        """
        parts = self.options.parts

        def work() -> bytes:
            self._state = fill_empty_mappings(describe(), self._values)
            self._values.update(tied_values(self._state, self._values))
            part_of = {entry.fqn: entry.part for entry in self.opened.catalog.tensors}
            report = compare_state(
                self.opened,
                self._state,
                self._values,
                rank=self._votes.rank,
                world_size=self._votes.world_size,
                strictness=self.options.strictness,
                is_wanted=lambda fqn: (
                    parts is None or part_of.get(fqn, fqn.split(".", 1)[0]) in parts
                ),
            )
            items = [*report.items, *self._decode_values()]
            if self.options.prove is Prove.TENSORS:
                items.extend(unrecorded(self.opened, self.state))
            items.extend(differences(self.opened, self._decoded))
            return replace(report, items=overridden(items, self.options.overrides)).to_bytes()

        def decide(ballots: Sequence[bytes]) -> list[bytes]:
            report = LoadReport.united([LoadReport.from_bytes(ballot) for ballot in ballots])
            refused = report.of(Severity.REFUSE)
            if refused:
                problems = tuple(Problem(i.where, i.kind, i.message) for i in refused)
                raise LoadRefused(
                    f"checkpoint of step {report.step} does not fit the state; nothing was "
                    f"changed:\n{summarise(problems)}\nadapt the state, load with another "
                    f"strictness or selected parts, or accept an item by overrides",
                    problems=problems,
                )
            return [report.to_bytes()] * len(ballots)

        return LoadReport.from_bytes(self._votes.round("compare", work, decide))

    def _decode_values(self) -> list[ReportItem]:
        """Decode what the state wants while nothing has changed yet; returns what cannot be."""
        faults: list[ReportItem] = []
        for fqn in (*self.state.values, *self.state.per_rank_values):
            if fqn not in self._values:
                continue
            try:
                self._decoded[fqn] = decode_leaf(self._values[fqn][1], fqn)
            except InvalidDocument as error:
                faults.append(ReportItem(Severity.REFUSE, "leaf", fqn, str(error)))
        return faults

    def read(self, report: LoadReport) -> LoadResult:
        """Steps 4 to 6.

        Raises:
            TensorMismatch: All was loaded, and tensors are not as they were saved.
            CorruptData: Blocks failed, and no tensor of any rank was changed.
            PartialLoad: Blocks failed after some tensors were written; they are listed.
            RankErrors: A rank failed otherwise.
            RankSilent: A rank did not answer by the deadline.
        """
        targets = self._targets(self.state)
        outcomes: list[ReadOutcome] = []

        def work() -> bytes:
            outcomes.append(fill(self._store, self.opened, targets))
            return _encode_outcome(outcomes[0], self.options.apply)

        self._votes.round("read", work, self._judge)
        settle(targets)
        if self.options.prove is Prove.TENSORS:
            prove_loaded(self._votes, self.opened, self.state)
        duration = time.monotonic() - self._started
        emit(
            LoadFinished(
                url=self._store.url,
                step=report.step,
                rank=self._votes.rank,
                num_bytes=outcomes[0].num_bytes,
                duration_s=duration,
                cpu_s=time.process_time() - self._started_cpu_s,
            )
        )
        return LoadResult(
            step=report.step,
            seq=self._located.seq,
            world_size=self.opened.manifest.topology.world_size,
            report=report,
            values=self._decoded,
            read_bytes=outcomes[0].num_bytes,
            needed_bytes=outcomes[0].needed_bytes,
            duration_s=duration,
        )

    def _targets(self, state: LocalState) -> list[Target | DeviceTarget]:
        apply = self.options.apply
        targets: list[Target | DeviceTarget] = []
        for held in state.distinct_tensors():
            fqn = state.stored_name(held.entry.fqn, self.opened.tensor_ids)
            if fqn is None:
                continue  # missing, and the strictness allows it
            if held.entry.kind != "per_rank":
                shape = self.opened.entry(fqn).global_shape
                for piece in held.pieces:
                    targets.extend(targets_of(fqn, piece, shape, apply))
                continue
            box = own_box(self.opened, fqn, self._votes.rank, self._votes.world_size)
            if box is not None:
                memory = held.pieces[0].memory.unsqueeze(0)
                targets.append(target_of(fqn, box, memory, apply))
        return targets

    def _judge(self, ballots: Sequence[bytes]) -> list[bytes]:
        written: set[str] = set()
        problems: list[Problem] = []
        for rank, ballot in enumerate(ballots):
            document = json.loads(ballot)
            written.update(document["written"])
            problems.extend(
                Problem(where, kind, f"rank {rank}: {message}")
                for where, kind, message in document["problems"]
            )
        if not problems:
            return [b""] * len(ballots)
        step = self.opened.manifest.step
        if written:
            raise PartialLoad(
                f"checkpoint of step {step} is damaged; {len(written)} tensor(s) were already "
                f"written:\n{summarise(problems)}\nload an older checkpoint before going on",
                written_fqns=tuple(sorted(written)),
                problems=tuple(problems),
            )
        raise CorruptData(
            f"checkpoint of step {step} is damaged; no tensor was changed:\n{summarise(problems)}",
            problems=tuple(problems),
        )


def _encode_problems(name: str, problems: Sequence[Problem]) -> bytes:
    return json.dumps([name, [[p.where, p.kind, p.message] for p in problems]]).encode()


def _encode_outcome(outcome: ReadOutcome, apply: Apply) -> bytes:
    written = sorted(outcome.written_fqns) if apply is Apply.IN_PLACE else []
    problems = [[p.where, p.kind, p.message] for p in outcome.problems]
    return json.dumps({"written": written, "problems": problems}).encode()


def _refuse_invalid(ballots: Sequence[bytes]) -> list[bytes]:
    """Raise what any rank found wrong with the documents, each fault once."""
    problems: dict[Problem, None] = {}
    names: set[str] = set()
    for ballot in ballots:
        if ballot:
            name, rows = json.loads(ballot)
            names.add(name)
            problems.update(dict.fromkeys(Problem(*row) for row in rows))
    if names:
        found = tuple(problems)
        kind: type[DcpResumeError] = getattr(
            errors, names.pop() if len(names) == 1 else "InvalidCheckpoint"
        )
        raise kind(f"the checkpoint cannot be used:\n{summarise(found)}", problems=found)
    return [b""] * len(ballots)

"""Make an ordinary committed checkpoint of a foreign one.

1. Open. The foreign documents are read and proved; every tensor's bytes are known to be there.
2. Plan. Names become names of parts; what cannot be taken over is refused or left, as asked.
3. Write and commit, as ``session.offline`` does.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dcp_resume.errors import ConfigurationError, Problem, Unheld, UnsupportedLeaf
from dcp_resume.format.digests import DigestAlgorithm
from dcp_resume.format.dtypes import DTYPES
from dcp_resume.format.leaves import encode_leaf, pack_leaves
from dcp_resume.interop.foreign import Foreign, Source, fill_targets
from dcp_resume.interop.formats import Format, Leftovers
from dcp_resume.interop.opening import open_foreign
from dcp_resume.interop.optimizer_groups import OptimizerGroups
from dcp_resume.manifest.boxes import Box
from dcp_resume.manifest.keys import new_attempt_id
from dcp_resume.manifest.models import TensorEntry, TrainerFacts
from dcp_resume.manifest.signing import UNSIGNED, Signing
from dcp_resume.planning.box_rows import Boxes
from dcp_resume.planning.flattening import Path, fqn_of
from dcp_resume.planning.held import plain_entry
from dcp_resume.planning.merge import GlobalPlan, merge
from dcp_resume.planning.plans import LocalPlan, PlanContents, PlanShape, encode_structure
from dcp_resume.problems import summarise
from dcp_resume.session.commit import choose_newest
from dcp_resume.session.documents import Facts
from dcp_resume.session.offline import OfflineAttempt
from dcp_resume.session.run_log import RunLog
from dcp_resume.session.targets import Target
from dcp_resume.session.tensor_digests import TensorDigests
from dcp_resume.session.windows import check_window
from dcp_resume.storage import ObjectStore, check_exclusive_create

__all__ = ["ImportOptions", "ImportResult", "import_checkpoint"]


@dataclass(frozen=True, slots=True)
class ImportOptions:
    """How to import.

    Raises:
        ConfigurationError: The window is too small.
    """

    format: Format | None = None
    """Of the source; None to detect it."""
    step: int | None = None
    """Of the checkpoint; None for what the source says, else 0."""
    part: str | None = None
    """Put everything into this part; None to take parts from the source where all its names are
    nested, and ``model`` else."""
    loose: str | None = None
    """Put what is not nested into this part, and take the other parts from the source."""
    leftovers: Leftovers = Leftovers.REFUSE
    tensor_digests: TensorDigests = TensorDigests.RECORD
    window_bytes: int = 64 * 1024 * 1024
    """Bytes in transit; reading needs as much again."""
    progress: Callable[[int, int], None] = lambda done, total: None
    """Called with bytes written and bytes in all."""
    signing: Signing = UNSIGNED
    append_deadline_s: float = 120.0
    """How long a record of the target's log whose answer was lost is created again."""

    def __post_init__(self) -> None:
        check_window(self.window_bytes)


@dataclass(frozen=True, slots=True)
class ImportResult:
    """A committed checkpoint."""

    format: Format
    step: int
    seq: int
    """Log number of its commit."""
    generation: int
    prefix: str
    num_tensors: int
    num_values: int
    num_bytes: int
    ties: tuple[str, ...]
    left: tuple[Problem, ...]
    """What the source holds and the checkpoint does not."""
    duration_s: float


def import_checkpoint(
    source: Source, target: ObjectStore, options: ImportOptions = ImportOptions()
) -> ImportResult:
    """Commit what a foreign checkpoint holds to the run at ``target``, which may be new.

    Args:
        source: The foreign file or directory.
        target: Root of the run, which is taken over: whoever writes there is fenced.
        options: Format, names, memory.

    Raises:
        ForeignFormat: It is of another format, or of none that is known.
        ForeignDamage: It contradicts itself, is cut short, or names what is outside of it.
        Unheld: It holds objects that are never executed, and the policy is to refuse.
        ConfigurationError: ``loose`` would give two tensors or values one name.
        UnsupportedStore: The target lacks exclusive create.
        CommitRefused: The target's log forbids the commit.
        CommitUnknown: The commit's outcome could not be learned in time.
        Fenced: Another process opened the target run meanwhile.
        StorageError: A store failed; nothing was committed.
    """
    started = time.monotonic()
    foreign = open_foreign(source, options.format)
    intake = _Intake(foreign, options)
    plan = merge([intake.local_plan()])
    step = options.step if options.step is not None else foreign.step or 0
    log = RunLog(target, signing=options.signing, deadline_s=options.append_deadline_s)
    log.refresh()
    check_exclusive_create(target, f"probe/{new_attempt_id()}/")
    written = OfflineAttempt(target, plan, step, options.tensor_digests)
    with written.taken_back_on_failure():
        report = written.write_files(
            intake.filler(plan),
            window_bytes=options.window_bytes,
            progress=options.progress,
            algorithm=DigestAlgorithm(options.signing.digest_algorithm),
        )
    facts = Facts(
        trainer=TrainerFacts(step=step, **foreign.trainer),
        model=foreign.model,
        notes={"imported_from": source.url, "imported_format": foreign.format.value},
    )
    committed = written.commit(log, report, facts, choose_newest)
    return ImportResult(
        format=foreign.format,
        step=step,
        seq=committed.seq,
        generation=committed.record.generation,
        prefix=written.prefix,
        num_tensors=len(foreign.tensors),
        num_values=len(intake.values),
        num_bytes=committed.record.num_bytes,
        ties=tuple(foreign.ties),
        left=intake.left,
        duration_s=time.monotonic() - started,
    )


class _Intake:
    """A foreign checkpoint under our names.

    Raises:
        Unheld: It holds what cannot be taken over, and the policy is to refuse.
        ConfigurationError: A name would be there twice.
    """

    def __init__(self, foreign: Foreign, options: ImportOptions) -> None:
        self._foreign = foreign
        self._groups = OptimizerGroups(foreign.values)
        values = list(self._groups.values())
        paths = [t.path for t in foreign.tensors.values()]
        paths += [path for path, _ in values]
        self._prefix: Path = ()
        self._loose: Path = ()
        if options.part is not None:
            self._prefix = self._loose = (options.part,)
        elif options.loose is not None:
            self._loose = (options.loose,)
        elif any(len(path) < 2 for path in paths):
            self._prefix = self._loose = ("model",)
        left = list(foreign.left)
        self.values: dict[str, tuple[Path, Any]] = {}
        for path, value in values:
            own = self._own(path)
            try:
                self.values[fqn_of(own)] = (own, encode_leaf(value, fqn_of(own)))
            except UnsupportedLeaf as error:
                left += error.problems
        self.left = tuple(left)
        if left and options.leftovers is Leftovers.REFUSE:
            raise Unheld(
                f"{foreign.source.url} holds {len(left)} object(s) that cannot be taken over; "
                f"nothing was written:\n{summarise(left)}\nleave them out by the policy to drop",
                url=foreign.source.url,
                problems=self.left,
            )
        self._names = {self._fqn(t.path): name for name, t in foreign.tensors.items()}
        self._check_names(paths)

    def _check_names(self, paths: Iterable[Path]) -> None:
        twice = [name for name, count in Counter(map(self._fqn, paths)).items() if count > 1]
        if twice:
            raise ConfigurationError(
                f"{twice[0]!r} would be there twice, nested and not; put what is not nested into "
                f"another part",
                option="loose",
            )

    def _own(self, path: Path) -> Path:
        return (*(self._loose if len(path) < 2 else self._prefix), *self._groups.path(path))

    def _fqn(self, path: Path) -> str:
        return fqn_of(self._own(path))

    def local_plan(self) -> LocalPlan:
        """What the one rank that imports offers to write."""
        entries: list[TensorEntry] = []
        boxes: list[Box] = []
        tensor: list[int] = []
        for name, found in self._foreign.tensors.items():
            path = self._own(found.path)
            entry = plain_entry(path, DTYPES[found.dtype].torch_dtype, found.shape)
            first = self._foreign.ties.get(name)
            if first is not None:
                known = self._fqn(self._foreign.tensors[first].path)
                entry = entry.model_copy(update={"alias_of": known})
            tensor.append(len(entries))
            boxes.append(Box.whole(found.shape))
            entries.append(entry)
        width = max((len(entry.global_shape) for entry in entries), default=1) or 1
        table, box = Boxes.listing(boxes, width)
        shape = PlanShape(
            rank=0,
            world_size=1,
            structure=encode_structure(entries, ()),
            tensor=np.asarray(tensor, np.int32),
            box=box,
            boxes=table,
            compared=np.zeros(0, np.int32),
        )
        return LocalPlan(shape, PlanContents(b"", pack_leaves(self.values)))

    def filler(self, plan: GlobalPlan) -> Callable[[Sequence[Target]], None]:
        """Reads what the files of a plan hold: foreign bytes, and packed values."""
        names: Mapping[str, str] = self._names

        def fill(targets: Sequence[Target]) -> None:
            foreign: list[Target] = []
            for target in targets:
                packed = plan.inline.get(target.fqn)
                if packed is None:
                    name = names[target.fqn]
                    foreign.append(Target(name, target.box, target.memory, None, None))
                    continue
                (start,), (size,) = target.box.offsets, target.box.sizes
                target.memory[:] = packed[start : start + size]
            fill_targets(self._foreign, foreign)

        return fill

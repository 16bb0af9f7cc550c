"""Write a checkpoint anew for another mesh, offline, without ranks and without holding it.

1. Open. The source's documents are read and proved, and every data file is there at its size.
2. Plan. Each target rank's own chunks of a part lie together in one file (``planning.layouts``).
3. Write. Each file is streamed: verified reads fill a window, the window is digested and written.
4. Commit. The run at the target is opened, documents are written, and the commit is appended.

Until step 4 the target run is only added to: whoever writes there is not disturbed, and a failure
removes the files that were written. Step 4 takes the run over, as every new incarnation does.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from dcp_resume.errors import LoadRefused, Problem
from dcp_resume.manifest.keys import new_attempt_id
from dcp_resume.planning.layout_rules import LayoutRules, TargetMesh
from dcp_resume.planning.layouts import Kept, TargetLayout, plan_layout
from dcp_resume.problems import summarise
from dcp_resume.session.documents import Facts
from dcp_resume.session.located import Located
from dcp_resume.session.opening import open_checkpoint
from dcp_resume.session.read_plan import stored_state
from dcp_resume.session.rewriting import RewriteOptions, rewrite
from dcp_resume.session.run_log import RunLog
from dcp_resume.storage import ObjectStore, check_exclusive_create

__all__ = ["ReshardOptions", "ReshardResult", "reshard"]


@dataclass(frozen=True, slots=True)
class ReshardOptions(RewriteOptions):
    """How to reshard.

    Raises:
        ConfigurationError: The window is too small.
    """

    rules: LayoutRules = field(default_factory=LayoutRules)
    is_strict: bool = False
    """Refuse what could not be laid out as asked, instead of reporting it."""


@dataclass(frozen=True, slots=True)
class ReshardResult:
    """A committed checkpoint, and what is not as asked."""

    step: int
    seq: int
    """Log number of its commit in the target run."""
    generation: int
    prefix: str
    world_size: int
    num_files: int
    num_bytes: int
    read_bytes: int
    kept: tuple[Kept, ...]
    """Tensors kept replicated over axes of which nothing says how they are split."""
    dropped: tuple[str, ...]
    """Per-rank tensors that another number of ranks cannot use."""
    duration_s: float


def reshard(
    source: ObjectStore,
    located: Located,
    target: ObjectStore,
    mesh: TargetMesh,
    options: ReshardOptions,
) -> ReshardResult:
    """Write the located checkpoint for the ranks of ``mesh`` into the run at ``target``.

    Raises:
        ConfigurationError: The layout does not fit the checkpoint.
        LoadRefused: Strict, and some tensors cannot be laid out as asked; all are listed.
        InvalidCheckpoint: The source is damaged; nothing was committed.
        UnsupportedStore: The target lacks exclusive create.
        CommitRefused: The target's log forbids the commit.
        CommitUnknown: The commit's outcome could not be learned in time.
        Fenced: Another process opened the target run meanwhile.
        StorageError: A store failed; nothing was committed.
    """
    started = time.monotonic()
    opened = open_checkpoint(source, located.prefix, located.manifest, trust=options.trust)
    layout = plan_layout(stored_state(opened), mesh, options.rules)
    if options.is_strict:
        _refuse_leftovers(layout)
    log = RunLog(target, signing=options.signing, deadline_s=options.append_deadline_s)
    log.refresh()
    check_exclusive_create(target, f"probe/{new_attempt_id()}/")
    manifest = opened.manifest
    facts = Facts(
        trainer=manifest.trainer,
        model=manifest.model,
        optimizer=manifest.optimizer,
        data=manifest.data,
        precision=manifest.precision,
        stages=layout.stages,
    )
    written = rewrite(
        source,
        opened,
        layout.plan,
        facts,
        target,
        log,
        options,
    )
    committed = written.committed
    return ReshardResult(
        step=committed.record.step,
        seq=committed.seq,
        generation=committed.record.generation,
        prefix=written.prefix,
        world_size=mesh.world_size,
        num_files=len(layout.plan.layout.names),
        num_bytes=committed.record.num_bytes,
        read_bytes=written.read_bytes,
        kept=layout.kept,
        dropped=layout.dropped,
        duration_s=time.monotonic() - started,
    )


def _refuse_leftovers(layout: TargetLayout) -> None:
    problems = [
        Problem(kept.fqn, "rule", f"nothing says how axis {', '.join(kept.axes)} splits it")
        for kept in layout.kept
    ]
    problems += [
        Problem(fqn, "per_rank", "its values belong to the ranks that wrote them")
        for fqn in layout.dropped
    ]
    if problems:
        raise LoadRefused(
            f"{len(problems)} tensor(s) cannot be laid out as asked; nothing was written:\n"
            f"{summarise(problems)}\ngive rules for them in a layout file, or leave out strict",
            problems=tuple(problems),
        )

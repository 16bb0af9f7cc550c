"""``CheckpointManager``: what a trainer holds. It decides and delegates; sessions do the work."""

from __future__ import annotations

import os
import time
from collections.abc import Collection, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from types import MappingProxyType, TracebackType
from typing import Any, Self

from dcp_resume.errors import ConfigurationError
from dcp_resume.events import SaveFailed, TrainerBlocked, emit
from dcp_resume.manager.choosing import Request, find_commit, resume_source
from dcp_resume.manager.facts import collect_facts
from dcp_resume.manager.loading import load_located
from dcp_resume.manager.pending import PendingSave, refuse_if_busy
from dcp_resume.manager.resuming import load_newest_whole
from dcp_resume.manager.retention import Retention
from dcp_resume.manager.settings import SaveMode, Settings, WhenBusy
from dcp_resume.manager.stateful import Bound, bind_state, choose_state, declarations_of
from dcp_resume.manager.step_memory import StepGuard
from dcp_resume.manager.trainer_state import Ancestor, check_trainer, note_ancestor
from dcp_resume.manifest.history import CommitEntry, RunHistory
from dcp_resume.manifest.models import TrainerFacts
from dcp_resume.session.attempt import Run
from dcp_resume.session.device_copies import prompt_copies
from dcp_resume.session.documents import Facts
from dcp_resume.session.load import LoadOptions, LoadResult, locate
from dcp_resume.session.located import Located
from dcp_resume.session.ownership import own_run
from dcp_resume.session.plan_memory import PlanMemory
from dcp_resume.session.quarantining import Damage, give_up
from dcp_resume.session.ranks import Ranks
from dcp_resume.session.run_log import RunLog
from dcp_resume.session.save import SaveResult, SaveSession
from dcp_resume.session.staging import Borrowed, Buffered, BufferPool
from dcp_resume.session.unchanged import ChunkMemory, Unchanged
from dcp_resume.storage import open_store

__all__ = ["CheckpointManager"]


class CheckpointManager:
    """Saves, finds and loads the checkpoints of one run.

    Make one on every rank, after ``init_process_group``, and call its methods on every rank alike.

        >>> import tempfile, torch
        >>> model = torch.nn.Linear(4, 2)
        >>> with CheckpointManager(tempfile.mkdtemp()) as checkpoints:
        ...     _ = checkpoints.resume({"model": model})
        ...     checkpoints.save(10, {"model": model}).result().step
        10

    Args:
        url: Root of the run: a path, ``file://``, ``s3://bucket/prefix`` or another fsspec URL. It
            must be the same storage for every rank.
        settings: Options.
        model_facts: What the drift report compares, such as layer counts; a difference refuses
            the load.
        data_facts: Likewise of the data: which corpus, how it is batched.
        precision_facts: Likewise of number formats, such as the autocast dtype; a difference is a
            warning.
        notes: What ``inspect`` shows of the job that saved, such as parallel sizes; never compared.

    Raises:
        ConfigurationError: The URL's scheme is unknown.
    """

    def __init__(
        self,
        url: str | os.PathLike[str],
        settings: Settings | None = None,
        *,
        model_facts: Mapping[str, Any] = MappingProxyType({}),
        data_facts: Mapping[str, Any] = MappingProxyType({}),
        precision_facts: Mapping[str, Any] = MappingProxyType({}),
        notes: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        self.settings = settings or Settings()
        self._given = Facts(
            TrainerFacts(step=0),
            model=dict(model_facts),
            data=dict(data_facts),
            precision=dict(precision_facts),
            notes=dict(notes),
        )
        self._store = open_store(
            os.fspath(url),
            storage_options=self.settings.storage_options,
            retry=self.settings.retry,
        )
        self.url = self._store.url
        retry = self.settings.retry
        self._log = RunLog(
            self._store,
            signing=self.settings.signing,
            deadline_s=retry.deadline_s,
            clock=retry.clock,
            sleep=retry.sleep,
        )
        self._ranks = Ranks()
        self._pool = BufferPool()
        self._memory = PlanMemory()
        self._chunks = ChunkMemory()
        self._background = ThreadPoolExecutor(1, "dcp-resume-save")
        self._step_guard = StepGuard()
        self._retention = Retention(self.settings.retention_policy)
        self._run: Run | None = None
        self._loaded_seq: int | None = None
        self._pending: PendingSave | None = None

    # Saving.

    def should_save(self, step: int) -> bool:
        """Whether ``step`` is due by ``save_interval``."""
        interval = self.settings.save_interval
        return interval > 0 and step > 0 and step % interval == 0

    def save(
        self, step: int, state: Mapping[str, Any], *, deadline_s: float | None = None
    ) -> PendingSave:
        """Save the state after ``step`` optimizer steps.

        Args:
            step: Optimizer steps completed.
            state: Top-level keys are parts; values are modules, lists of modules (pipeline
                stages), optimizers, Statefuls, tensors, nested mappings, or plain values.
            deadline_s: Seconds; instead of those of the settings.

        Returns:
            The save; already committed in ``SaveMode.BLOCKING``. In ``SaveMode.LAZY`` call its
            ``wait_until_staged`` before a change to the state by anything but an optimizer.

        Raises:
            ConfigurationError: ``step`` is negative, optimizer state is required and there is none,
                or it goes by the positions of parameters.
            SaveInProgress: One is running, and the policy is to refuse.
            RankErrors: A rank failed, or its trainer state is at another step.
            RankSilent: A rank did not answer by the deadline.
            StateError: The state cannot be saved as it is.
            Fenced: A newer incarnation owns the run.
            SaveError: This save, or an earlier one in the background, did not commit.
            StorageError: The store failed on the coordinator.
        """
        called = time.monotonic()
        if step < 0:
            raise ConfigurationError(f"step must not be negative, got {step}", option="step")
        chosen = choose_state(state, self.settings.save_optimizer_state)
        self._finish_previous(step)
        waited_s = time.monotonic() - called
        if self._run is None:
            self._own(lambda history: self._loaded_seq)
        assert self._run is not None
        session = SaveSession(
            self._run,
            self._votes(step, deadline_s),
            step=step,
            facts=collect_facts(self._given, step, chosen),
            declarations=declarations_of(self.settings.declarations, chosen),
            tensor_digests=self.settings.tensor_digests,
            memory=self._memory,
            unchanged=self.settings.unchanged,
            chunks=self._chunks,
        )
        is_blocking = self.settings.mode is SaveMode.BLOCKING
        staging = Borrowed(self._pool) if is_blocking else Buffered(self._pool)

        bounds: list[Bound] = []

        def collect() -> Mapping[str, Any]:
            check_trainer(step, chosen)
            bounds.append(bind_state(chosen))
            return bounds[0].state_dict()

        is_lazy = self.settings.mode is SaveMode.LAZY
        copies = self._step_guard.late_copies(state) if is_lazy else prompt_copies()
        try:
            session.stage(collect, staging, copies)
            if is_blocking:
                future: Future[SaveResult] = Future()
                future.set_result(self._finish(session, step))
            else:
                future = self._background.submit(self._finish, session, step)
        finally:
            for bound in bounds:
                bound.undo()
        self._pending = PendingSave(step, future, copies)
        blocked_s = time.monotonic() - called
        rank = self._ranks.rank
        emit(TrainerBlocked(step=step, rank=rank, duration_s=blocked_s, waited_s=waited_s))
        return self._pending

    @property
    def pending(self) -> PendingSave | None:
        """The last save in the background, until the next call has seen its outcome."""
        return self._pending

    def wait(self, timeout_s: float | None = None) -> None:
        """Wait until no save is running, and what it made superfluous is deleted.

        Raises:
            TimeoutError: Still running after ``timeout_s``.
            SaveError: The save did not commit, and its ``result`` has not said so yet.
        """
        self._settle(timeout_s)
        self._retention.wait(timeout_s)

    # Finding.

    def history(self) -> RunHistory:
        """The run's log as it is now.

        Raises:
            InvalidDocument: A record is malformed.
            StorageError: The store failed.
        """
        return self._log.refresh()

    def steps(self) -> list[int]:
        """Steps of the usable checkpoints on the run's lineage, oldest first."""
        return [entry.record.step for entry in self.history().lineage()][::-1]

    def latest(self) -> int | None:
        """Step of the newest usable checkpoint; None in a run without one."""
        newest = self.history().newest()
        return newest.record.step if newest else None

    # Loading.

    def load(
        self,
        state: Mapping[str, Any],
        step: Request = "latest",
        *,
        options: LoadOptions | None = None,
    ) -> LoadResult:
        """Load one checkpoint into the state; owns nothing, falls back to nothing.

        Args:
            state: As for ``save``; tensors are written in place.
            step: A step, ``latest``, ``best`` or a tag.
            options: Instead of those of the settings.

        Raises:
            CheckpointNotFound: No checkpoint answers the request.
            LoadRefused: It does not fit the state; nothing changed.
            InvalidCheckpoint: It is damaged, and no tensor changed.
            PartialLoad: It is damaged, and tensors had changed.
            TensorMismatch: Asked to prove tensors, and some are not as they were saved.
            StorageError: The store failed.
        """
        self.wait()
        located = locate(
            self._votes(0),
            lambda: Located.of(
                find_commit(self._log.refresh(), step, self.settings, self._store.url)
            ),
        )
        result = self._load(located, state, options or self.settings.load)
        self._loaded_seq = result.seq
        return result

    def resume(self, state: Mapping[str, Any], step: Request = "latest") -> LoadResult | None:
        """Take the run over, and load what it resumes from.

        Choosing the checkpoint and taking over are one append to the log, so that no commit of an
        older incarnation is lost between them. With ``latest``, a checkpoint whose damage a second
        look proves is quarantined, said loudly (``CheckpointSkipped``, a warning in the log), and
        the next older whole one is taken, by all ranks alike. A store that fails, however often,
        is an error: an older checkpoint would lose steps, and be no easier to read.

        Returns:
            The load; None for a run that has no checkpoint yet and ``latest`` was asked.

        Raises:
            CheckpointNotFound: What was asked is not there, or every checkpoint is quarantined.
            LoadRefused: It does not fit the state; nothing changed.
            InvalidCheckpoint: The asked step is damaged, or no older checkpoint is whole.
            UnsupportedFormat: A newer version wrote it; it is left as it is.
            DamageDisputed: A rank found damage that another does not find; nothing was given up.
            PartialLoad: Tensors had changed, and no older checkpoint covers them.
            TensorMismatch: Asked to prove tensors, and some are not as they were saved.
            StorageError: The store failed.
        """
        self.wait()
        return load_newest_whole(
            step,
            partial(self._take_over, step),
            lambda located, changed: self._load(located, state, self.settings.load, changed),
            lambda located, damage: give_up(
                self._store, self._log, self._votes(0), located, damage
            ),
        )

    def close(self) -> None:
        """Wait for the running save, and release the store.

        Raises:
            SaveError: The running save did not commit.
        """
        try:
            self.wait()
        finally:
            self._background.shutdown()
            self._step_guard.close()
            self._retention.close()
            self._pool.clear()
            self._store.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    # Inside.

    def _votes(self, step: int, deadline_s: float | None = None) -> Any:
        return self._ranks.votes(step=step, deadline_s=deadline_s or self.settings.deadline_s)

    def _own(self, choose: Any) -> Run:
        votes = self._votes(0)
        self._run = own_run(self._store, self._log, votes, choose, is_probed=self._run is not None)
        return self._run

    def _take_over(self, request: Request, damage: Damage | None) -> Located | None:
        choose = partial(
            resume_source,
            request=request,
            settings=self.settings,
            url=self._store.url,
            failure=damage,
        )
        source = self._own(choose).opened.resume_source
        if source is None:
            return None
        return locate(
            self._votes(0),
            lambda: Located.of(CommitEntry(source, self._log.history.commits[source])),
        )

    def _finish_previous(self, step: int) -> None:
        if self._pending is not None and self.settings.when_busy is WhenBusy.REFUSE:
            refuse_if_busy(self._votes(step), step, self._pending)
        self._settle()
        if self.settings.unchanged is Unchanged.REFER:
            # What this process itself retires after planning would refuse the commit.
            self._retention.wait()

    def _settle(self, timeout_s: float | None = None) -> None:
        if self._pending is not None:
            pending = self._pending
            pending.wait_until_staged()  # the background waits for a copy that Ctrl-C cut off here
            pending.wait(timeout_s)
            self._pending = None
            pending.raise_unseen()

    def _load(
        self,
        located: Located,
        state: Mapping[str, Any],
        options: LoadOptions,
        changed: Collection[str] = (),
    ) -> LoadResult:
        result = load_located(
            self._store,
            self._votes(0),
            located,
            state,
            options,
            self.settings,
            collect_facts(self._given, 0, state),
            self._memory,
            changed,
        )
        saved_by = result.world_size
        note_ancestor(state, Ancestor(result.step, self._store.url, result.seq, saved_by))
        return result

    def _finish(self, session: SaveSession, step: int) -> SaveResult:
        try:
            result = session.finish()
        except Exception as error:
            emit(SaveFailed(step=step, reason=str(error)))
            raise
        if self._ranks.rank == 0 and self._run is not None:
            self._retention.start(self._store, self._log, self._run.opened.generation)
        return result

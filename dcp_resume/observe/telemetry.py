"""Spans and metrics for OpenTelemetry; needs the extra ``otel``, and an SDK that you configure."""

from __future__ import annotations

import os
import threading
import time
from dataclasses import dataclass, field

from opentelemetry import metrics, trace
from opentelemetry.metrics import MeterProvider
from opentelemetry.trace import Status, StatusCode, TracerProvider

from dcp_resume.events import (
    Event,
    FileWritten,
    LoadFinished,
    PhaseFinished,
    SaveAdvanced,
    SaveFailed,
    StepReached,
    StorageRetried,
    TrainerBlocked,
)

__all__ = ["Telemetry"]

_SCOPE = "dcp_resume"


@dataclass(slots=True)
class _Save:
    step: int
    start_ns: int
    phases: list[tuple[PhaseFinished, int]] = field(default_factory=list)
    """Each with the time when it ended."""
    milestones: list[tuple[SaveAdvanced, int]] = field(default_factory=list)


class Telemetry:
    """A subscriber that makes one span a save and rank, with one for each phase, and metrics.

    Spans are made when the save is over, from the times that were noted: its thread does that, the
    trainer's only appends to a list.

    Args:
        tracer_provider: By default the one set for the process.
        meter_provider: Likewise.
        rank: Of this process; by default ``RANK`` of the environment.
    """

    def __init__(
        self,
        tracer_provider: TracerProvider | None = None,
        meter_provider: MeterProvider | None = None,
        rank: int | None = None,
    ) -> None:
        self._rank = int(os.environ.get("RANK", "0")) if rank is None else rank
        self._tracer = trace.get_tracer(_SCOPE, tracer_provider=tracer_provider)
        meter = metrics.get_meter(_SCOPE, meter_provider=meter_provider)
        self._lock = threading.Lock()
        self._save: _Save | None = None
        self._labels: dict[str, str | int] = {"rank": self._rank}
        self._reached = meter.create_histogram("dcp_resume.save.duration", "s")
        self._blocked = meter.create_counter("dcp_resume.trainer.blocked", "s")
        self._loading = meter.create_counter("dcp_resume.load.duration", "s")
        self._written = meter.create_counter("dcp_resume.written", "By")
        self._cpu = meter.create_counter("dcp_resume.cpu", "s")
        self._loaded = meter.create_counter("dcp_resume.loaded", "By")
        self._rate = meter.create_histogram("dcp_resume.write.rate", "By/s")
        self._failed = meter.create_counter("dcp_resume.save.failed", "{save}")
        self._retries = meter.create_counter("dcp_resume.storage.retries", "{request}")

    def __call__(self, event: Event) -> None:
        """Note or count the event."""
        with self._lock:
            self._trace(event)
        self._count(event)

    def _trace(self, event: Event) -> None:
        now_ns = time.time_ns()
        if isinstance(event, StepReached) and event.number == 1:
            self._save = _Save(event.step, now_ns)
        save = self._save
        if save is None:
            return
        if isinstance(event, PhaseFinished) and event.step == save.step:
            save.phases.append((event, now_ns))
        elif isinstance(event, SaveAdvanced) and event.step == save.step:
            save.milestones.append((event, now_ns))
            if event.milestone == "committed":
                self._end(save, now_ns, Status(StatusCode.OK))
        elif isinstance(event, SaveFailed) and event.step == save.step:
            self._end(save, now_ns, Status(StatusCode.ERROR, event.reason))

    def _end(self, save: _Save, end_ns: int, status: Status) -> None:
        self._save = None
        about = {"dcp_resume.step": save.step, "dcp_resume.rank": self._rank}
        span = self._tracer.start_span(
            "dcp_resume.save", attributes=about, start_time=save.start_ns
        )
        inside = trace.set_span_in_context(span)
        for phase, ended_ns in save.phases:
            begun_ns = ended_ns - int(phase.duration_s * 1e9)
            child = self._tracer.start_span(
                f"dcp_resume.{phase.phase}",
                context=inside,
                attributes={**about, "dcp_resume.bytes": phase.num_bytes},
                start_time=max(begun_ns, save.start_ns),
            )
            child.end(ended_ns)
        for reached, at_ns in save.milestones:
            span.add_event(reached.milestone, {"elapsed_s": reached.elapsed_s}, at_ns)
        span.set_status(status)
        span.end(end_ns)

    def _count(self, event: Event) -> None:
        match event:
            case SaveAdvanced():
                labels = {**self._labels, "milestone": event.milestone}
                self._reached.record(event.elapsed_s, labels)
            case TrainerBlocked():
                self._blocked.add(event.duration_s, self._labels)
            case FileWritten():
                self._written.add(event.num_bytes, self._labels)
                self._cpu.add(max(event.cpu_s, 0.0), {**self._labels, "operation": "save"})
                self._rate.record(event.num_bytes / max(event.duration_s, 1e-9), self._labels)
            case LoadFinished():
                self._loading.add(event.duration_s, self._labels)
                self._loaded.add(event.num_bytes, self._labels)
                self._cpu.add(event.cpu_s, {**self._labels, "operation": "load"})
            case SaveFailed():
                self._failed.add(1, self._labels)
            case StorageRetried():
                self._retries.add(1, self._labels)

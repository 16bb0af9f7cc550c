"""Metrics of this process for Prometheus; needs the extra ``prometheus``."""

from __future__ import annotations

from types import TracebackType
from typing import Self

from prometheus_client import (
    REGISTRY,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    start_http_server,
)

from dcp_resume.events import (
    CheckpointRetired,
    Event,
    FileWritten,
    LoadFinished,
    PhaseFinished,
    SaveAdvanced,
    SaveFailed,
    StorageRetried,
    TrainerBlocked,
)

__all__ = ["Endpoint", "PrometheusMetrics"]

_SECONDS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0)


class PrometheusMetrics:
    """A subscriber that counts; Prometheus tells ranks apart by the address that it scrapes.

    Args:
        registry: Where the metrics are registered.
    """

    def __init__(self, registry: CollectorRegistry = REGISTRY) -> None:
        self._reached = Histogram(
            "dcp_resume_save_seconds",
            "From the call of save to each milestone",
            ("milestone",),
            registry=registry,
            buckets=_SECONDS,
        )
        self._phases = Histogram(
            "dcp_resume_phase_seconds",
            "Of each phase of a save",
            ("phase",),
            registry=registry,
            buckets=_SECONDS,
        )
        self._blocked = Counter(
            "dcp_resume_blocked_seconds", "In which save held the trainer up", registry=registry
        )
        self._loading = Counter("dcp_resume_load_seconds", "In loads", registry=registry)
        self._written = Counter(
            "dcp_resume_written_bytes", "Of data files, by this rank", registry=registry
        )
        self._cpu = Counter(
            "dcp_resume_cpu_seconds",
            "Of digests and of the store",
            ("operation",),
            registry=registry,
        )
        self._loaded = Counter("dcp_resume_loaded_bytes", "Fetched by this rank", registry=registry)
        self._rate = Gauge(
            "dcp_resume_write_bytes_per_second", "Of the last data file", registry=registry
        )
        self._committed_step = Gauge(
            "dcp_resume_committed_step", "Of the newest checkpoint", registry=registry
        )
        self._failed = Counter("dcp_resume_failed_saves", "Not committed", registry=registry)
        self._retries = Counter(
            "dcp_resume_storage_retries", "Requests tried again", registry=registry
        )
        self._retired = Counter(
            "dcp_resume_retired_checkpoints", "Deleted by retention", registry=registry
        )

    def __call__(self, event: Event) -> None:
        """Count the event."""
        match event:
            case SaveAdvanced():
                self._reached.labels(event.milestone).observe(event.elapsed_s)
                if event.milestone == "committed":
                    self._committed_step.set(event.step)
            case PhaseFinished():
                self._phases.labels(event.phase).observe(event.duration_s)
            case TrainerBlocked():
                self._blocked.inc(event.duration_s)
            case FileWritten():
                self._written.inc(event.num_bytes)
                self._cpu.labels("save").inc(max(event.cpu_s, 0.0))
                self._rate.set(event.num_bytes / max(event.duration_s, 1e-9))
            case LoadFinished():
                self._loading.inc(event.duration_s)
                self._loaded.inc(event.num_bytes)
                self._cpu.labels("load").inc(event.cpu_s)
            case SaveFailed():
                self._failed.inc()
            case StorageRetried():
                self._retries.inc()
            case CheckpointRetired():
                self._retired.inc()


class Endpoint:
    """Answers scrapes under ``http://ADDRESS:PORT/metrics``, in a thread.

    Args:
        port: Of this process alone, such as ``9400 + local_rank``; 0 for any that is free.
        registry: Whose metrics.
        address: To listen on.

    Raises:
        OSError: The port is taken.
    """

    def __init__(
        self, port: int, registry: CollectorRegistry = REGISTRY, address: str = "127.0.0.1"
    ) -> None:
        self._server, self._thread = start_http_server(port, addr=address, registry=registry)
        self.port: int = self._server.server_port

    def close(self) -> None:
        """Stop listening."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

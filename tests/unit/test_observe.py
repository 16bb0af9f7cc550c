"""What the subscribers of ``dcp_resume.observe`` make of the events of real saves."""

from __future__ import annotations

import io
import json
import math
import urllib.request

import pytest
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode
from prometheus_client import CollectorRegistry

from dcp_resume.errors import ConfigurationError
from dcp_resume.events import SaveFailed, StepReached, StorageRetried, emit, subscribe
from dcp_resume.manager.checkpoint_manager import CheckpointManager
from dcp_resume.manager.settings import SaveMode, Settings
from dcp_resume.manifest.wire import decode_catalog
from dcp_resume.observe import (
    Goodput,
    JsonLines,
    SaveProgress,
    advised_interval_s,
    daly_interval_s,
    young_interval_s,
)
from dcp_resume.observe.prometheus import Endpoint, PrometheusMetrics
from dcp_resume.observe.telemetry import Telemetry
from tests.support.small_state import MIB, state_at


def save(root, *steps, mode=SaveMode.BACKGROUND):
    with CheckpointManager(root, Settings(mode=mode)) as checkpoints:
        for step in steps:
            checkpoints.save(step, state_at(step)).result()
        return checkpoints.history()


@pytest.fixture
def observed():
    """Subscribes, and ends the subscriptions."""
    ends = []
    yield lambda subscriber: ends.append(subscribe(subscriber))
    for end in ends:
        end()


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_each_event_is_one_line_with_its_time_rank_and_fields(tmp_path, observed):
    log = JsonLines(tmp_path / "logs" / "events.jsonl", rank=5)
    observed(log)
    save(tmp_path / "run", 10)
    emit(SaveFailed(step=20, reason="two\nlines"))
    log.close()
    emit(SaveFailed(step=30, reason="after the end"))
    text = (tmp_path / "logs" / "events.jsonl").read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    assert all(line["time"].endswith("Z") for line in lines)
    reached = [line["milestone"] for line in lines if line["event"] == "SaveAdvanced"]
    assert reached == ["planned", "staged", "written", "durable", "committed"]
    assert {line["rank"] for line in lines if "milestone" in line} == {0}, "the event's own rank"
    assert lines[-1] | {"time": ""} == {
        "time": "",
        "rank": 5,
        "event": "SaveFailed",
        "step": 20,
        "reason": "two\nlines",
    }


@pytest.mark.parametrize("mode", SaveMode)
def test_a_commit_records_when_the_save_got_how_far(tmp_path, mode):
    history = save(tmp_path, 10, 20, mode=mode)
    for record in history.commits.values():
        times = record.times
        assert 0 < times.staged_s <= times.written_s <= times.durable_s <= times.committed_s
        catalog = (tmp_path / record.manifest.key).with_name("catalog.json").read_bytes()
        ranks = decode_catalog(catalog, "catalog.json").rank_times
        assert 0 < ranks.planned_s[0] <= ranks.staged_s[0] <= ranks.written_s[0]
        assert len(ranks.planned_s) == 1
        assert times.blocked_s == (
            times.committed_s if mode is SaveMode.BLOCKING else times.staged_s
        )


def test_goodput_adds_up_what_saves_took(tmp_path, observed):
    now = iter([100.0, 110.0])
    goodput = Goodput(clock=lambda: next(now))
    observed(goodput)
    save(tmp_path, 10, 20)
    emit(StorageRetried(key="k", attempt=1, delay_s=0.1, reason="503"))
    emit(SaveFailed(step=30, reason="disk full"))
    costs = goodput.costs
    assert (costs.num_saves, costs.num_committed) == (2, 2)
    assert (costs.num_failed, costs.num_retries) == (1, 1)
    assert costs.written_bytes > 2 * MIB
    assert costs.bytes_per_s == costs.written_bytes / costs.write_s
    assert costs.goodput == 1 - costs.blocked_s / 10
    assert costs.advised_interval_s(3600) >= costs.committed_s / 2


@pytest.mark.parametrize(("cost_s", "mtbf_s"), [(5.0, 3600.0), (60.0, 86_400.0), (1.0, 1e6)])
def test_the_advised_interval_wastes_least(cost_s, mtbf_s):
    """Against Daly's model of the whole run time, which the formula approximates."""

    def wasted(interval_s):
        return mtbf_s * math.expm1((interval_s + cost_s) / mtbf_s) / interval_s

    best = daly_interval_s(cost_s, mtbf_s)
    assert all(wasted(best) < wasted(best * factor) for factor in (0.9, 1.1))
    assert young_interval_s(cost_s, mtbf_s) == pytest.approx(best, rel=0.05)
    assert advised_interval_s(cost_s, mtbf_s, commit_s=1e7) == 1e7
    assert daly_interval_s(3 * mtbf_s, mtbf_s) == mtbf_s


@pytest.mark.parametrize(
    ("cost_s", "mtbf_s", "option"),
    [(-1, 10, "cost_s"), (math.nan, 10, "cost_s"), (1, 0, "mtbf_s"), (1, math.inf, "mtbf_s")],
)
def test_an_interval_of_impossible_figures_is_refused(cost_s, mtbf_s, option):
    with pytest.raises(ConfigurationError) as caught:
        young_interval_s(cost_s, mtbf_s)
    assert caught.value.option == option


def test_a_save_is_a_span_with_its_phases(tmp_path, observed):
    spans, reader = InMemorySpanExporter(), InMemoryMetricReader()
    tracers = TracerProvider(shutdown_on_exit=False)
    tracers.add_span_processor(SimpleSpanProcessor(spans))
    meters = MeterProvider([reader], shutdown_on_exit=False)
    observed(Telemetry(tracers, meters, rank=0))
    save(tmp_path, 10)
    found = {span.name: span for span in spans.get_finished_spans()}
    whole = found["dcp_resume.save"]
    assert whole.status.status_code is StatusCode.OK
    assert [event.name for event in whole.events][-1] == "committed"
    for name in ("plan", "stage", "write", "commit"):
        phase = found[f"dcp_resume.{name}"]
        assert phase.parent.span_id == whole.context.span_id
        assert whole.start_time <= phase.start_time <= phase.end_time <= whole.end_time
    assert found["dcp_resume.write"].attributes["dcp_resume.bytes"] > MIB
    (scope,) = reader.get_metrics_data().resource_metrics[0].scope_metrics
    totals = {metric.name: metric.data.data_points[0] for metric in scope.metrics}
    assert totals["dcp_resume.written"].value > MIB
    assert totals["dcp_resume.trainer.blocked"].value > 0
    tracers.shutdown()
    meters.shutdown()


def test_a_failed_save_is_a_span_in_error():
    spans = InMemorySpanExporter()
    tracers = TracerProvider(shutdown_on_exit=False)
    tracers.add_span_processor(SimpleSpanProcessor(spans))
    telemetry = Telemetry(tracers, rank=3)
    telemetry(StepReached(number=1, step=7, rank=3))
    telemetry(SaveFailed(step=7, reason="rank 2 is silent"))
    (span,) = spans.get_finished_spans()
    assert span.status.status_code is StatusCode.ERROR
    assert span.status.description == "rank 2 is silent"
    assert span.attributes["dcp_resume.rank"] == 3
    tracers.shutdown()


def test_prometheus_scrapes_the_metrics(tmp_path, observed):
    registry = CollectorRegistry()
    observed(PrometheusMetrics(registry))
    save(tmp_path, 10, 20)
    emit(StorageRetried(key="k", attempt=1, delay_s=0.1, reason="503"))
    with Endpoint(0, registry) as endpoint:
        url = f"http://127.0.0.1:{endpoint.port}/metrics"
        with urllib.request.urlopen(url) as answer:
            text = answer.read().decode()
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert float(values["dcp_resume_committed_step"]) == 20
    assert float(values['dcp_resume_save_seconds_count{milestone="committed"}']) == 2
    assert float(values["dcp_resume_written_bytes_total"]) > 2 * MIB
    assert float(values["dcp_resume_blocked_seconds_total"]) > 0
    assert float(values["dcp_resume_storage_retries_total"]) == 1


def test_the_save_is_drawn_on_the_terminal_of_rank_0_alone(tmp_path, observed):
    terminal, other_rank, file = Terminal(), Terminal(), io.StringIO()
    observed(SaveProgress(0, terminal))
    observed(SaveProgress(1, other_rank))
    observed(SaveProgress(0, file))
    save(tmp_path, 10)
    assert "100 %" in terminal.getvalue()
    assert "step 10 committed after" in terminal.getvalue()
    assert other_rank.getvalue() == file.getvalue() == ""

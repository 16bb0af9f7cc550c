"""What the library chose by itself is said once, and what its work costs in CPU time every time."""

from __future__ import annotations

import json
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dcp_resume import CheckpointManager, SaveMode, Settings
from dcp_resume.events import Event, FileWritten, LoadFinished, TuningChosen, subscribe
from dcp_resume.observe import Goodput, JsonLines
from dcp_resume.session.reading import NUM_READERS
from dcp_resume.storage.cpu_time import moving_cpu_s
from tests.support.small_state import state_at


@pytest.fixture
def seen() -> Iterator[list[Event]]:
    events: list[Event] = []
    unsubscribe = subscribe(events.append)
    yield events
    unsubscribe()


def save_and_load(url: str, options: dict[str, Any]) -> None:
    settings = Settings(mode=SaveMode.BLOCKING, storage_options=options)
    with CheckpointManager(url, settings) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, state_at(step))
        checkpoints.load(state_at(0))


def choices(seen: list[Event]) -> dict[str, tuple[int | str, str]]:
    (tuning,) = (event for event in seen if isinstance(event, TuningChosen))
    assert all(choice.reason for choice in tuning.choices)
    return {choice.name: (choice.value, choice.unit) for choice in tuning.choices}


def test_each_manager_says_once_what_it_chose(tmp_path: Path, seen: list[Event]) -> None:
    log = JsonLines(tmp_path / "events")
    unsubscribe = subscribe(log)
    save_and_load(str(tmp_path / "run"), {})
    unsubscribe()
    log.close()
    assert choices(seen) == {
        "create": ("exclusive", ""),
        "read": (1 << 20, "bytes"),
        "readers": (NUM_READERS, ""),
        "writers": (1, ""),
    }
    lines = [json.loads(line) for line in (tmp_path / "events").read_text().splitlines()]
    (line,) = (line for line in lines if line["event"] == "TuningChosen")
    assert line["choices"][0]["name"] == "create"


@pytest.mark.s3
def test_on_s3_the_parts_and_their_number_are_said_too(
    s3_server: Any, bucket: str, seen: list[Event]
) -> None:
    save_and_load(f"s3://{bucket}/{uuid.uuid4().hex}", s3_server.storage_options)
    found = choices(seen)
    assert found["upload_part"] == (16 << 20, "bytes")
    assert found["uploads_in_flight"] == (8, "")
    files = [event for event in seen if isinstance(event, FileWritten)]
    assert files
    assert all(event.cpu_s > 0 for event in files)


def test_cpu_seconds_of_saves_and_loads_are_told_and_added_up(
    tmp_path: Path, seen: list[Event]
) -> None:
    goodput = Goodput()
    unsubscribe = subscribe(goodput)
    save_and_load(str(tmp_path), {})
    unsubscribe()
    (load,) = (event for event in seen if isinstance(event, LoadFinished))
    costs = goodput.costs
    assert costs.load_cpu_s == load.cpu_s > 0
    assert costs.load_cpu_s_per_gib == load.cpu_s * 2**30 / load.num_bytes
    files = [event for event in seen if isinstance(event, FileWritten)]
    assert costs.write_cpu_s == pytest.approx(sum(event.cpu_s for event in files))
    assert costs.write_cpu_s_per_gib > 0


def test_threads_that_move_bytes_are_counted_and_others_are_not() -> None:
    go, done = threading.Barrier(3), threading.Barrier(3)

    def burn() -> None:
        go.wait()
        began = time.thread_time()
        while time.thread_time() - began < 0.05:
            pass
        done.wait()
        done.wait()

    names = ("dcp-resume-http_0", "trainer")
    threads = [threading.Thread(target=burn, name=name) for name in names]
    for thread in threads:
        thread.start()
    before, own = moving_cpu_s(), time.thread_time()
    go.wait()
    done.wait()
    found = moving_cpu_s() - before - (time.thread_time() - own)
    done.wait()
    for thread in threads:
        thread.join()
    assert 0.049 < found < 0.099  # one of both

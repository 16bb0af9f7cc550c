"""A store that falls silent, then answers: a stopped process sends no more than a cut cable."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch.distributed as dist

from dcp_resume.errors import RankSilent
from dcp_resume.session.bounded_store import BoundedStore, Requests, Waiters
from dcp_resume.session.votes import Deadline, StoreVotes

SERVER = """
import signal
import torch.distributed as dist
store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
print(store.port, flush=True)
signal.pause()
"""


@pytest.fixture
def server() -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        [sys.executable, "-c", SERVER], stdout=subprocess.PIPE, text=True
    ) as process:
        yield process
        process.kill()


def test_a_silent_store_is_a_silent_rank_0_by_the_deadline_and_serves_later_rounds(server):
    assert server.stdout is not None
    port = int(server.stdout.readline())
    client = dist.TCPStore("127.0.0.1", port, timeout=timedelta(seconds=60))
    requests = Requests()
    server.send_signal(signal.SIGSTOP)

    deadline = Deadline(0.2)
    silent = BoundedStore(client, requests, deadline.left_s)
    votes = StoreVotes(
        silent, Waiters(client, 0.2).wait, "a", rank=1, world_size=2, step=7, deadline=deadline
    )
    with pytest.raises(RankSilent, match="no answer") as caught:
        votes.round("agree", lambda: b"", lambda ballots: ballots)
    assert caught.value.ranks == (0,)
    with pytest.raises(dist.DistNetworkError):
        silent.set("b", b"late")  # behind the one that hangs; dropped

    server.send_signal(signal.SIGCONT)
    patient = BoundedStore(client, requests, lambda: 60.0)
    patient.set("c", b"1")
    assert patient.get("c") == b"1"
    assert not patient.check(["b"])
    assert patient.delete_key("c")


def test_the_thread_ends_with_the_last_view_of_the_store(server):
    assert server.stdout is not None
    client = dist.TCPStore("127.0.0.1", int(server.stdout.readline()))
    before = set(threading.enumerate())
    view = BoundedStore(client, Requests(), lambda: 60.0)
    view.set("a", b"1")
    assert view.get("a") == b"1"
    [thread] = set(threading.enumerate()) - before

    del view
    thread.join(60)
    assert not thread.is_alive()


def test_a_wait_ends_with_the_keys_with_its_time_or_with_the_store(server):
    assert server.stdout is not None
    client = dist.TCPStore("127.0.0.1", int(server.stdout.readline()))
    waiters = Waiters(client, 1.0)
    assert not waiters.wait(["a"], 0.01)
    with ThreadPoolExecutor() as pool:  # neither stands behind the other, nor behind a request
        first, second = (
            pool.submit(waiters.wait, ["a"], 60.0),
            pool.submit(waiters.wait, ["b"], 60.0),
        )
        client.set("b", b"")
        assert second.result(60)
        client.set("a", b"")
        assert first.result(60)

    server.send_signal(signal.SIGSTOP)
    with pytest.raises(dist.DistNetworkError):
        waiters.wait(["c"], 0.0)
    server.send_signal(signal.SIGCONT)
    assert waiters.wait(["a", "b"], 60.0)

    server.kill()
    with pytest.raises(dist.DistError):
        waiters.wait(["c"], 60.0)

"""Signals are heard at once, and handled as before when nobody listens any more."""

from __future__ import annotations

import asyncio
import math
import os
import signal
import subprocess
import sys
import threading
import time
from queue import SimpleQueue

import pytest

from dcp_resume.errors import ConfigurationError
from dcp_resume.events import NoticeSourceFailed, subscribe
from dcp_resume.manager.notices import Clock, Launcher, Notice, NoticePoller, SignalListener

WAIT_S = 60.0
GRACES = {signal.SIGTERM: 20.0, signal.SIGUSR1: 90.0, signal.SIGINT: 5.0}


@pytest.fixture
def handlers():
    """Known handlers, whatever the shell that started the tests had set."""
    before = {number: signal.getsignal(number) for number in GRACES}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def listener(handlers):
    listener = SignalListener(GRACES)
    listener.start()
    yield listener
    listener.stop()


def hear(listener: SignalListener) -> list[Notice]:
    listener.wait(WAIT_S)
    return list(listener.heard())


def test_each_signal_is_heard_once_with_its_grace_period(listener):
    os.kill(os.getpid(), signal.SIGUSR1)
    assert hear(listener) == [Notice("SIGUSR1", 90.0)]
    os.kill(os.getpid(), signal.SIGUSR1)
    assert hear(listener) == []
    os.kill(os.getpid(), signal.SIGTERM)
    assert hear(listener) == [Notice("SIGTERM", 20.0)]


def test_handlers_are_those_of_before_afterwards(handlers):
    listener = SignalListener(GRACES)
    listener.start()
    assert signal.getsignal(signal.SIGTERM) not in (signal.SIG_DFL, signal.SIG_IGN)
    listener.stop()

    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert signal.getsignal(signal.SIGUSR1) is signal.SIG_IGN
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert signal.set_wakeup_fd(-1) == -1


def test_a_handler_that_was_installed_later_is_left_alone(handlers):
    listener = SignalListener(GRACES)
    listener.start()
    signal.signal(signal.SIGUSR1, signal.SIG_DFL)
    listener.stop()

    assert signal.getsignal(signal.SIGUSR1) is signal.SIG_DFL


def test_kept_handlers_do_nothing(handlers):
    listener = SignalListener(GRACES)
    listener.start()
    listener.stop(keep={signal.SIGTERM})
    os.kill(os.getpid(), signal.SIGTERM)

    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_the_second_ctrl_c_interrupts_at_once(listener):
    os.kill(os.getpid(), signal.SIGINT)
    assert hear(listener) == [Notice("SIGINT", 5.0)]
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)


def test_an_event_loop_keeps_its_pipe(handlers):
    async def listen() -> list[Notice]:
        heard = asyncio.Event()
        asyncio.get_running_loop().add_signal_handler(signal.SIGUSR2, heard.set)
        listener = SignalListener({signal.SIGTERM: 1.0})
        listener.start()
        os.kill(os.getpid(), signal.SIGUSR2)
        os.kill(os.getpid(), signal.SIGTERM)
        await heard.wait()
        notices = list(listener.heard())
        listener.stop()
        heard.clear()
        os.kill(os.getpid(), signal.SIGUSR2)
        await heard.wait()
        return notices

    assert asyncio.run(listen()) == [Notice("SIGTERM", 1.0)]


def test_a_forked_child_dies_of_sigterm_and_the_parent_hears_nothing(listener):
    ready, child_is_ready = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.write(child_is_ready, b"!")
        signal.pause()
        os._exit(0)
    os.read(ready, 1)
    os.kill(pid, signal.SIGTERM)
    _, status = os.waitpid(pid, 0)
    os.close(ready)
    os.close(child_is_ready)

    assert os.WTERMSIG(status) == signal.SIGTERM
    assert list(listener.heard()) == []


def test_signals_are_for_the_main_thread(handlers):
    errors: list[Exception] = []

    def start() -> None:
        try:
            SignalListener(GRACES).start()
        except ConfigurationError as error:
            errors.append(error)

    thread = threading.Thread(target=start)
    thread.start()
    thread.join()
    assert [error.option for error in errors] == ["signals"]


def test_a_clock_gives_notice_before_the_end_of_the_allocation():
    def clock(end_time: float) -> Clock:
        return Clock(exit_after_s=math.inf, end_time=end_time, lead_s=1000.0)

    assert clock(time.time() + 2000)() is None
    notice = clock(time.time() + 900)()
    assert notice is not None
    assert 0 < notice.grace_s <= 900
    assert "allocation ends" in notice.reason
    ended = clock(time.time() - 5)()
    assert ended is not None
    assert ended.grace_s == 0


def test_a_clock_of_our_own_leaves_all_the_time():
    never = Clock(exit_after_s=3600, end_time=math.inf, lead_s=1.0)
    assert never() is None
    at_once = Clock(exit_after_s=0.0, end_time=math.inf, lead_s=1.0)
    assert at_once() == Notice("exit_after_s=0 is over", math.inf)


def test_sources_are_asked_in_a_thread_until_one_has_a_notice():
    told: SimpleQueue[Notice] = SimpleQueue()
    seen: SimpleQueue[NoticeSourceFailed] = SimpleQueue()
    answers = iter([None, OSError("no route"), Notice("spot", 120.0)])
    threads = []

    def source() -> Notice | None:
        threads.append(threading.current_thread())
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    unsubscribe = subscribe(lambda e: isinstance(e, NoticeSourceFailed) and seen.put(e))
    poller = NoticePoller([source], 0.001, told.put)
    poller.start()
    assert told.get(timeout=WAIT_S) == Notice("spot", 120.0)
    poller.stop()
    unsubscribe()

    assert seen.get(timeout=WAIT_S).reason == "OSError('no route')"
    assert threading.main_thread() not in threads


def launcher_report(environment: dict[str, str]) -> list[str]:
    """What a child says of its launcher before and after that was killed."""
    code = (
        "import os, signal\n"
        "ready, done = os.pipe()\n"
        "if os.fork() == 0:\n"
        "    from dcp_resume.manager.notices import Launcher\n"
        "    launcher, parent = Launcher(), os.getppid()\n"
        "    print(launcher(), flush=True)\n"
        "    os.write(done, b'!')\n"
        "    while os.getppid() == parent: os.sched_yield()\n"
        "    print(launcher(), flush=True)\n"
        "else:\n"
        "    os.read(ready, 1)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        text=True,
        timeout=WAIT_S,
        check=False,
    )
    return result.stdout.splitlines()


def test_the_end_of_torchrun_is_a_notice_and_that_of_a_shell_is_none(monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)

    assert launcher_report({}) == ["None", "None"]
    before, after = launcher_report({"TORCHELASTIC_RUN_ID": "none"})
    assert before == "None"
    assert "torchrun is gone" in after
    assert Launcher()() is None

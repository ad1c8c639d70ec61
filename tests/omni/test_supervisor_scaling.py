"""A supervisor that is asked for more children, and for fewer, while it runs."""

import os
import signal
import time
from collections.abc import Callable, Iterator

import psutil
import pytest

from omni import supervisor as supervisor_module
from omni.supervisor import Supervisor
from tests.omni.supervised import Steps, Trial, shell, wait

SLEEPS = "sleep 100"
IGNORES_SIGTERM = "trap '' TERM; echo deaf; while true; do sleep 0.05; done"


@pytest.fixture
def trial(tmp_path: object, monkeypatch: pytest.MonkeyPatch) -> Iterator[Trial]:
    monkeypatch.setattr(supervisor_module, "_TICK_S", 0.01)
    monkeypatch.setattr(supervisor_module, "_FIRST_BACKOFF_S", 0.02)
    handler = signal.getsignal(signal.SIGUSR1)
    children = psutil.Process().children()
    yield Trial(tmp_path)  # type: ignore[arg-type]
    assert signal.getsignal(signal.SIGUSR1) is handler
    assert psutil.Process().children() == children


class Requests:
    """What the supervisor is to do at the next SIGUSR1."""

    def __init__(self) -> None:
        self.pending: list[Callable[[Supervisor], None]] = []

    def ask(self, what: Callable[[Supervisor], None]) -> None:
        self.pending.append(what)
        os.kill(os.getpid(), signal.SIGUSR1)

    def __call__(self, supervisor: Supervisor) -> None:
        while self.pending:
            self.pending.pop(0)(supervisor)


def test_one_more_and_one_fewer(trial: Trial) -> None:
    requests = Requests()

    def steps() -> Steps:
        yield from wait(lambda: trial.state("a").state == "ready")
        pid = trial.state("a").pid
        requests.ask(lambda supervisor: supervisor.add(trial.child("b", shell(SLEEPS))))
        yield from wait(lambda: trial.state("b").state == "ready")
        assert trial.supervisor.names == ("a", "b")
        requests.ask(lambda supervisor: supervisor.stop("b"))
        yield from wait(lambda: "b" not in trial.states)
        assert trial.supervisor.names == ("a",)
        requests.ask(lambda supervisor: supervisor.add(trial.child("b", shell(SLEEPS))))  # and again
        yield from wait(lambda: trial.state("b").state == "ready")
        assert trial.state("a").pid == pid

    assert trial.run([trial.child("a", shell(SLEEPS))], steps(), on_request=requests) == 0


def test_one_that_does_not_stop_is_killed_and_the_others_go_on(trial: Trial) -> None:
    requests = Requests()

    def steps() -> Steps:
        yield from wait(lambda: "deaf" in trial.log("b"))
        pid = trial.state("a").pid
        requests.ask(lambda supervisor: supervisor.stop("b"))
        yield from wait(lambda: "b" not in trial.states)
        assert trial.state("a").pid == pid

    children = [trial.child("a", shell(SLEEPS)), trial.child("b", shell(IGNORES_SIGTERM), stop_timeout_s=0.2)]
    assert trial.run(children, steps(), on_request=requests) == 0


def test_an_optional_child_that_never_starts_takes_nobody_with_it(trial: Trial) -> None:
    requests = Requests()

    def steps() -> Steps:
        requests.ask(lambda s: s.add(trial.child("b", shell("exit 3"), is_optional=True, ready_url="http://[::1]:1")))
        yield from wait(lambda: trial.state("b").state == "failed")
        yield
        assert trial.state("a").state == "ready"
        requests.ask(lambda supervisor: supervisor.stop("b"))  # what has ended goes at once
        yield from wait(lambda: "b" not in trial.states)

    assert trial.run([trial.child("a", shell(SLEEPS))], steps(), on_request=requests) == 0


def test_stopped_with_a_child_that_is_leaving(trial: Trial) -> None:
    requests = Requests()

    def steps() -> Steps:
        yield from wait(lambda: "deaf" in trial.log("b"))
        requests.ask(lambda supervisor: supervisor.stop("b"))
        yield
        yield

    began_s = time.monotonic()
    children = [trial.child("a", shell(SLEEPS)), trial.child("b", shell(IGNORES_SIGTERM), stop_timeout_s=0.5)]
    assert trial.run(children, steps(), on_request=requests) == 0
    assert time.monotonic() - began_s < 15

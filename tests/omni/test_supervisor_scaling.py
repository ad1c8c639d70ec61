"""A supervisor that is asked for more children, and for fewer, while it runs."""

import os
import signal
import time
from collections.abc import Callable, Iterator

import psutil
import pytest

from omni import supervisor as supervisor_module
from omni.deployment.restart_request import ask_for_restart
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


def test_an_optional_child_that_fails_in_the_same_moment_keeps_nothing_up(trial: Trial) -> None:
    def ended(output: int) -> int:
        pid = shell("exit 3")(output)
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        return pid

    children = [trial.child("a", ended, final_codes=(3,)), trial.child("b", ended, final_codes=(3,), is_optional=True)]
    assert trial.run(children) == 1


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


def ask(trial: Trial, *names: str) -> None:
    """As `omni_cli restart` does."""
    for name in names:
        ask_for_restart(trial.run_folder, name)
    os.kill(os.getpid(), signal.SIGUSR1)


def test_a_restart_that_is_asked_for(trial: Trial) -> None:
    """It is no failure: no backoff, and the other goes on. Both are asked again: no file is left."""

    def steps() -> Steps:
        yield from wait(lambda: all(trial.state(name).state == "ready" for name in "ab"))
        pids = [trial.state(name).pid for name in "ab"]
        for number in range(1, 4):
            before = trial.state("b").pid
            ask(trial, "b")
            yield from wait(lambda before=before: trial.state("b").pid not in (None, before))  # type: ignore[misc]
            yield from wait(lambda: trial.state("b").state == "ready")
            assert (trial.state("b").restarts, trial.state("b").message) == (number, "")
        assert trial.state("a").pid == pids[0]
        assert trial.supervisor.names == ("a", "b")
        assert not list(trial.run_folder.path.glob("*.restart"))

    supervisor_module._FIRST_BACKOFF_S = 1000.0  # the fixture sets it back
    assert trial.run([trial.child("a", shell(SLEEPS)), trial.child("b", shell(SLEEPS))], steps()) == 0


def test_a_deaf_one_is_killed_and_started_again(trial: Trial) -> None:
    def steps() -> Steps:
        yield from wait(lambda: "deaf" in trial.log())
        ask(trial, "a")
        yield from wait(lambda: trial.state().state == "restarting")
        assert trial.state().message == "restarts on request"
        ask(trial, "a")  # once more while it stops: once is enough
        yield from wait(lambda: trial.log().count("deaf") == 2)
        assert trial.state().restarts == 1

    assert trial.run([trial.child("a", shell(IGNORES_SIGTERM), stop_timeout_s=0.3)], steps()) == 0


def test_one_that_was_given_up_or_waits_is_started_at_once(trial: Trial) -> None:
    fails_once = "test -e {0} || {{ touch {0}; exit 3; }}; sleep 100"
    given_up, waits = (shell(fails_once.format(trial.folder / name)) for name in ("given-up", "waits"))
    children = [
        trial.child("a", shell(SLEEPS)),
        trial.child("b", given_up, is_optional=True, final_codes=(3,)),
        trial.child("c", waits),
    ]

    def steps() -> Steps:
        yield from wait(lambda: (trial.state("b").state, trial.state("c").state) == ("failed", "restarting"))
        ask(trial, "b", "c", "typo")
        yield from wait(lambda: all(trial.state(name).state == "ready" for name in "abc"))

    supervisor_module._FIRST_BACKOFF_S = 1000.0
    assert trial.run(children, steps()) == 0


def test_stopped_while_one_restarts(trial: Trial) -> None:
    """It is not started again."""

    def steps() -> Steps:
        yield from wait(lambda: "deaf" in trial.log())
        ask(trial, "a")
        yield from wait(lambda: trial.state().state == "restarting")

    assert trial.run([trial.child("a", shell(IGNORES_SIGTERM), stop_timeout_s=0.3)], steps()) == 0
    assert (trial.log().count("deaf"), trial.state().state) == (1, "stopped")


def test_an_old_request_counts_for_nothing(trial: Trial) -> None:
    """Whoever asked for it has seen the process start since."""
    ask_for_restart(trial.run_folder, "a")

    def steps() -> Steps:
        yield from wait(lambda: trial.state().state == "ready")
        pid = trial.state().pid
        os.kill(os.getpid(), signal.SIGUSR1)
        yield
        yield
        assert trial.state().pid == pid

    assert trial.run([trial.child("a", shell(SLEEPS))], steps()) == 0


def test_an_error_while_one_restarts(trial: Trial) -> None:
    """All are stopped then, too, and stay so."""

    def steps() -> Steps:
        yield from wait(lambda: "deaf" in trial.log())
        ask(trial, "a")
        yield from wait(lambda: trial.state().state == "restarting")
        raise RuntimeError("drawing failed")

    with pytest.raises(RuntimeError, match="drawing failed"):
        trial.run([trial.child("a", shell(IGNORES_SIGTERM), stop_timeout_s=0.3)], steps())
    assert trial.log().count("deaf") == 1

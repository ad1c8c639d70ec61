"""All subjects, taking turns."""

import contextlib
import json
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.error import URLError
from urllib.request import Request, urlopen

from benchmarks.bench_proxy.cases import Case, Throughput, body_of
from benchmarks.bench_proxy.measure import Load, measure
from benchmarks.bench_proxy.processes import BenchmarkError, Process
from benchmarks.bench_proxy.results import Result, Results, add_latencies
from benchmarks.bench_proxy.subjects import Engines, Subject
from benchmarks.servers import free_port

_START_S = 40.0
_WARM_UP = Throughput("warm_up", 4, False, 1, 1.0)


@dataclass(frozen=True)
class Plan:
    engine: Path  # the compiled programs
    http_load: Path
    folder: Path
    proxy_cores: Collection[int]
    other_cores: Collection[int]  # of engines and load
    num_rounds: int
    total_s: float  # after so many seconds no other round begins


@dataclass(frozen=True)
class Started:
    """A subject that answers."""

    subject: Subject
    port: int
    process: Process | None


def run(subjects: Sequence[Subject], cases: Sequence[Case], plan: Plan, say: Callable[[str], None]) -> Results:
    """Measure every case on every subject in every round. A subject that fails a case goes on with the next.

    Raises:
        BenchmarkError: the engines do not start, or one has died: no figure since is worth anything.
    """
    results = {subject.name: Result(subject.name) for subject in subjects}
    with contextlib.ExitStack() as stack:
        engines = start_engines(plan, stack)
        started = []
        for subject in subjects:
            with _failure_noted(results[subject.name], "start", say):
                started.append(start(subject, engines, plan, stack))
        load = Load(plan.http_load, plan.other_cores)
        latest = time.monotonic() + plan.total_s
        for number in range(plan.num_rounds):
            if number and time.monotonic() > latest:
                say("no time for more rounds: the machine is busy")
                break
            say(f"round {number + 1} of {plan.num_rounds}")
            for case in cases:
                for one in started[number % max(len(started), 1) :] + started[: number % max(len(started), 1)]:
                    result = results[one.subject.name]
                    with _failure_noted(result, case.name, say):
                        result.add(measure(case, one.port, one.process, load))
                    engines.check()
    add_latencies(results)
    return results


def start_engines(plan: Plan, stack: contextlib.ExitStack) -> Engines:
    processes = []
    for _ in range(2):
        processes.append(Process([plan.engine], plan.other_cores))
        stack.callback(processes[-1].stop)
    prefill, decode = processes
    return Engines(int(prefill.first_line()), int(decode.first_line()), (prefill, decode))


def start(subject: Subject, engines: Engines, plan: Plan, stack: contextlib.ExitStack) -> Started:
    """Start a subject and see that it answers, with P's part if that is its way.

    Raises:
        BenchmarkError: it does not.
    """
    port = free_port()
    command = subject.command(port, engines, plan.folder)
    if command is None:
        return Started(subject, engines.decode_port, None)
    process = Process(command, plan.proxy_cores)
    stack.callback(process.stop)
    num_before = num_prefills(engines)
    deadline = time.monotonic() + _START_S
    while not answers(port):
        if not process.is_running() or time.monotonic() > deadline:
            raise BenchmarkError(f"{subject.name} does not start: {process.log_tail()}")
        time.sleep(0.1)
    if (num_prefills(engines) > num_before) is not subject.disaggregates:
        raise BenchmarkError(f"{subject.name} asks {'D alone' if subject.disaggregates else 'P too'}")
    return Started(subject, port, process)


def answers(port: int) -> bool:
    """Whether a completion comes back from there."""
    request = Request(
        f"http://127.0.0.1:{port}/v1/completions", body_of(_WARM_UP), {"Content-Type": "application/json"}
    )
    try:
        with urlopen(request, timeout=5) as response:  # noqa: S310 (our own servers)
            return len(json.load(response)["choices"]) == 1
    except (URLError, OSError, ValueError, KeyError):
        return False


def num_prefills(engines: Engines) -> int:
    """How often P has been asked."""
    with urlopen(f"{engines.prefill_url}/metrics", timeout=5) as response:  # noqa: S310
        lines = response.read().decode().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("instant_engine_prefills_total"))


@contextlib.contextmanager
def _failure_noted(result: Result, what: str, say: Callable[[str], None]) -> Iterator[None]:
    try:
        yield
    except BenchmarkError as error:
        result.failures.append(f"{what} failed: {error}")
        say(f"{result.subject}: {what} failed: {error}")

"""The serving benchmark's client and whole run, on stand-in engines."""

import asyncio
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import aiohttp
import psutil
import pytest

from benchmarks.bench_proxy.processes import BenchmarkError
from benchmarks.bench_serving import report, run
from benchmarks.bench_serving.client import UNFINISHED, Outcome, body_of, first_in_line, play
from benchmarks.bench_serving.processes import is_alive, running, wait_until_healthy
from benchmarks.bench_serving.run import Plan, Results, Run
from benchmarks.bench_serving.systems import Running, Setup, System
from benchmarks.bench_serving.trace import Arrival
from benchmarks.servers import free_port
from tests.standins.engine import StandinEngine

CHAT = Arrival(0.0, "chat", "hello", 3)
LONG = Arrival(0.0, "long", "once upon", 3)
CORES = tuple(sorted(os.sched_getaffinity(0)))
SLEEP = [sys.executable, "-c", "import time; time.sleep(600)"]


class TestClient:
    async def test_both_kinds_are_streamed_and_timed(self) -> None:
        async with StandinEngine() as engine:
            chat, long = await play(engine.url, "m", [CHAT, LONG], 5.0)
            assert [received.path for received in engine.received] == ["/v1/chat/completions", "/v1/completions"]
            assert all(received.body["stream"] for received in engine.received)
        for outcome in (chat, long):
            assert outcome.error is None
            assert outcome.ttft_s is not None
            assert len(outcome.gaps_s) == 2
            assert outcome.num_tokens == 3
            assert outcome.ttft_s + sum(outcome.gaps_s) <= outcome.e2e_s

    async def test_requests_leave_although_earlier_ones_wait(self) -> None:
        async with StandinEngine() as engine:
            engine.gate.clear()
            trace = [CHAT, Arrival(0.05, "chat", "two", 3), Arrival(0.1, "chat", "three", 3)]
            playing = asyncio.create_task(play(engine.url, "m", trace, 5.0))
            await engine.wait_for(num_received=3)
            engine.gate.set()
            outcomes = await playing
        assert [outcome.error for outcome in outcomes] == [None] * 3
        assert [outcome.at_s for outcome in outcomes] == [0.0, 0.05, 0.1]

    async def test_what_does_not_end_is_cut_off_with_the_time_it_took(self) -> None:
        async with StandinEngine() as engine:
            engine.gate_after = 2
            engine.gate.clear()
            (outcome,) = await play(engine.url, "m", [CHAT], 0.5)
            await engine.wait_for(num_aborted=1)
        assert outcome.error == UNFINISHED
        assert outcome.num_tokens == 2
        assert len(outcome.gaps_s) == 2  # between the two, and since the second
        assert outcome.gaps_s[-1] > 0.25
        assert outcome.e2e_s >= 0.5

    async def test_refusals_and_broken_streams_are_failures(self) -> None:
        async with StandinEngine() as engine:
            engine.error = (503, "busy")
            assert (await _ask(engine)).error == "503: busy"
            engine.error = None
            engine.die_after = 1
            broken = await _ask(engine)
            assert broken.is_failed
            assert broken.num_tokens == 1
            engine.die_after = None
            url = engine.url
        assert (await play(url, "m", [CHAT], 5.0))[0].is_failed

    @pytest.mark.parametrize(
        ("events", "error"),
        [
            (["a", "b", "c", {"prompt_tokens": 7, "completion_tokens": 3}], None),
            (["a", "bc", {"prompt_tokens": 7, "completion_tokens": 3}], None),  # two tokens in one chunk
            (["a", "b", {"prompt_tokens": 7, "completion_tokens": 2}], "2 tokens instead of 3"),
            (["", ""], "the stream ended early"),
        ],
    )
    async def test_the_servers_count_of_tokens_wins(self, events: list[object], error: str | None) -> None:
        chunks = [
            {"choices": [{"text": event}]} if isinstance(event, str) else {"choices": [], "usage": event}
            for event in events
        ]
        lines = [*map(json.dumps, chunks), "[DONE]"]
        async with StandinEngine() as engine:
            engine.answer_text = "".join(f"data: {line}\n\n" for line in lines)
            (outcome,) = await play(engine.url, "m", [LONG], 5.0)
            engine.answer_text = 'data: {"error": {"message": "no room"}}\n\ndata: [DONE]\n\n'
            (failed,) = await play(engine.url, "m", [LONG], 5.0)
        assert outcome.error == error
        if error is None:
            assert (outcome.num_tokens, outcome.num_prompt_tokens) == (3, 7)
        assert failed.error == "in the stream: {'message': 'no room'}"

    def test_bodies_ask_for_exactly_so_many_tokens(self) -> None:
        body = body_of(CHAT, "m")
        assert body["messages"] == [{"role": "user", "content": "hello"}]
        assert (body["max_tokens"], body["ignore_eos"], body["temperature"]) == (3, True, 0.0)
        assert body_of(LONG, "m")["prompt"] == "once upon"

    def test_the_client_goes_first_only_while_it_plays(self) -> None:
        before = os.sched_getscheduler(0)
        with first_in_line() as is_first:
            assert (os.sched_getscheduler(0) != before) is is_first
        assert os.sched_getscheduler(0) == before


async def test_the_stand_in_for_nginx_takes_turns_and_passes_streams_on(tmp_path: Path) -> None:
    port = free_port()
    async with StandinEngine("a") as first, StandinEngine("b") as second:
        command = [sys.executable, "-m", "benchmarks.bench_serving.round_robin", str(port), first.url, second.url]
        with running(command, tmp_path / "log", CORES) as process:
            url = f"http://127.0.0.1:{port}"
            await asyncio.to_thread(wait_until_healthy, [url], [process], 30.0)
            outcomes = await play(url, "m", [CHAT] * 4, 5.0)
            assert [outcome.error for outcome in outcomes] == [None] * 4
            assert [len(engine.received) for engine in (first, second)] == [2, 2]
            second.error = (400, "no")
            errors = {outcome.error for outcome in await play(url, "m", [CHAT] * 2, 5.0)}
            assert errors == {None, "400: no"}
            async with aiohttp.ClientSession() as session, session.get(f"{url}/v1/models") as response:
                assert response.status == 200


class Standin(System):
    """A system that is one stand-in engine, and a process that sleeps, to have one to watch."""

    def __init__(self, name: str, *, starts: bool = True, dies: bool = False) -> None:
        self.name = self.title = name
        self.starts = starts
        self.dies = dies
        self.family: list[psutil.Process] = []

    def start(self, setup: Setup, stack: ExitStack) -> Running:
        if not self.starts:
            raise BenchmarkError("no engine")
        command = [sys.executable, "-c", ""] if self.dies else SLEEP
        process = stack.enter_context(running(command, setup.log_folder / "log", setup.cores))
        self.family = process.family()
        engine = stack.enter_context(_engine_in_thread())
        if self.dies:
            _wait_for(lambda: all(member.status() == psutil.STATUS_ZOMBIE for member in self.family))
        return Running(engine.url, (engine.url, engine.url), (process,))


class TestRun:
    @pytest.fixture(autouse=True)
    def _impatience(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(run, "_SETTLE_S", 0.0)
        monkeypatch.setattr(run, "_REST_S", 0.0)

    def test_every_system_is_measured_with_the_same_requests(self, tmp_path: Path) -> None:
        systems = [Standin("ours"), Standin("plain")]
        saved: list[list[str]] = []

        def save(results: Results) -> None:
            saved.append([f"{name} {load}" for name, result in results.systems.items() for load in result.loads])

        results = _run(tmp_path, save).measure(systems)

        assert results.is_complete
        assert list(results.systems) == ["plain", "ours"]  # the plain one tells the rates
        assert saved[0] == ["plain light"]  # after each load, so that a run that breaks off is not for nothing
        assert saved[-1] == ["plain light", "plain heavy", "ours light", "ours heavy"]
        for name in ("light", "heavy"):
            asked = [
                [(outcome.kind, outcome.at_s) for outcome in result.loads[name].outcomes]
                for result in results.systems.values()
            ]
            assert asked[0] == asked[1]
            assert {kind for kind, _ in asked[0]} == {"chat", "long"}
            for result in results.systems.values():
                assert result.loads[name].figures["good_share"] is not None
                assert result.loads[name].figures["num_failed"] == 0
        assert all(result.idle_cores is not None for result in results.systems.values())
        assert "WHERE PLAIN SERVERS WIN (it / ours):" in list(report.tables(results))
        for system in systems:
            assert not any(map(is_alive, system.family))

    def test_who_fails_is_named_and_the_others_go_on(self, tmp_path: Path) -> None:
        systems = [Standin("plain"), Standin("ours", starts=False), Standin("nixl", dies=True), Standin("plain-chunks")]
        results = _run(tmp_path).measure(systems)
        assert not results.is_complete
        assert results.systems["ours"].failures == ["no engine"]
        (failure,) = results.systems["nixl"].failures
        assert failure.startswith("ended with 0")
        assert list(results.systems["nixl"].loads) == ["light"]
        assert len(results.systems["plain-chunks"].loads) == 2

    def test_without_the_plain_servers_there_are_no_rates(self, tmp_path: Path) -> None:
        with pytest.raises(BenchmarkError, match="no engine"):
            _run(tmp_path).measure([Standin("ours"), Standin("plain", starts=False)])


async def _ask(engine: StandinEngine) -> Outcome:
    return (await play(engine.url, "m", [CHAT], 5.0))[0]


def _run(folder: Path, save: Callable[[Results], None] = lambda results: None) -> Run:
    plan = Plan(
        seed=1,
        shares={"light": 0.03, "heavy": 0.06},
        num_chats=0.2,
        duration_s=1.0,
        give_up_s=5.0,
        idle_s=0.1,
        num_unloaded=(2, 1),
        answer_timeout_s=5.0,
        ttft_factor=100.0,
        itl_factor=100.0,
    )
    setup = Setup(
        model_path=folder,
        model="none",
        dtype="none",
        folder=folder,
        log_folder=folder,
        cores=CORES,
        max_model_len=2048,
        kv_cache_gib=1.0,
        start_timeout_s=10.0,
    )
    return Run(plan, setup, lambda num_tokens, chance: f"{chance.random()} {num_tokens}", print, save)


@contextmanager
def _engine_in_thread() -> Iterator[StandinEngine]:
    """A stand-in that is served while this thread waits for something else."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    engine = StandinEngine()
    try:
        yield asyncio.run_coroutine_threadsafe(engine.__aenter__(), loop).result(10)
    finally:
        asyncio.run_coroutine_threadsafe(engine.stop(), loop).result(10)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)
        loop.close()


def _wait_for(condition: Callable[[], bool], timeout_s: float = 30.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)

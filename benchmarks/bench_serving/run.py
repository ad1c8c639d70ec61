"""The run: one system after the other, each with the same loads."""

import asyncio
import random
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

from benchmarks.bench_proxy.processes import BenchmarkError
from benchmarks.bench_serving import figures
from benchmarks.bench_serving.client import Outcome, first_in_line, play
from benchmarks.bench_serving.figures import Figures, Slo, Unloaded
from benchmarks.bench_serving.processes import CpuMeter
from benchmarks.bench_serving.systems import MODEL, Plain, Running, Setup, System
from benchmarks.bench_serving.trace import KINDS, Kind, Load, Text, make_trace, sample

NUM_SERVERS = 2  # plain ones: what the rates are shares of
_SETTLE_S = 3.0  # vLLM's processes poll for a second after their last work
_REST_S = 2.0
# With round robin each of two servers gets one of each kind.
_WARM_UP: tuple[Kind, ...] = ("chat", "long", "long", "chat")
_PROBES: tuple[Kind, ...] = ("long", "long")


@dataclass(frozen=True)
class Plan:
    """What is measured, and how long."""

    seed: int
    shares: dict[str, float]  # load's name → long prompts, as a share of what NUM_SERVERS plain ones prefill per second
    num_chats: float  # in flight on average, were each answered as fast as on an unloaded server
    duration_s: float  # of each load's arrivals
    give_up_s: float  # after the last arrival
    idle_s: float
    num_unloaded: tuple[int, int]  # chats and long prompts that are asked one at a time
    answer_timeout_s: float  # of each request that is on its own
    ttft_factor: float  # of the SLO, times the unloaded TTFT
    itl_factor: float


@dataclass
class LoadResult:
    load: Load
    figures: Figures
    outcomes: list[Outcome]


@dataclass
class SystemResult:
    title: str
    start_s: float | None = None  # from its command until all of it was healthy
    idle_cores: float | None = None
    loads: dict[str, LoadResult] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)


@dataclass
class Results:
    """What is known so far."""

    unloaded: Unloaded | None = None
    slo: Slo | None = None
    loads: list[Load] = field(default_factory=list)
    systems: dict[str, SystemResult] = field(default_factory=dict)
    is_complete: bool = False


Say = Callable[[str], None]
Save = Callable[[Results], None]


class Run:
    """One run.

    Args:
        text: makes prompts.
        say: is told what happens.
        save: is called with the results whenever there are more.
    """

    def __init__(self, plan: Plan, setup: Setup, text: Text, say: Say, save: Save) -> None:
        self.results = Results()
        self._plan = plan
        self._setup = setup
        self._text = text
        self._say = say
        self._save = save

    def measure(self, systems: Sequence[System]) -> Results:
        """All of it. A system that fails is named in its result, and the next one has its turn.

        Raises:
            BenchmarkError: there is no unloaded plain server to derive rates and bounds from.
        """
        systems = sorted(systems, key=lambda system: system.name != Plain.name)  # it tells the rates
        if not systems or systems[0].name != Plain.name:
            self._measure_unloaded_alone()
        for system in systems:
            result = self.results.systems[system.name] = SystemResult(system.title)
            try:
                self._system(system, result)
            except BenchmarkError as error:
                result.failures.append(str(error))
                self._say(f"{system.name} failed: {error}")
                if self.results.unloaded is None:
                    raise
            finally:
                self._save(self.results)
        self.results.is_complete = all(
            not result.failures and len(result.loads) == len(self.results.loads)
            for result in self.results.systems.values()
        )
        self._save(self.results)
        return self.results

    def _measure_unloaded_alone(self) -> None:
        with ExitStack() as stack:
            self._measure_unloaded(self._start(Plain(), stack))

    def _start(self, system: System, stack: ExitStack) -> Running:
        self._say(f"{system.name}: starting {system.title}")
        started_s = time.monotonic()
        running = system.start(self._setup, stack)
        if system.name in self.results.systems:
            self.results.systems[system.name].start_s = time.monotonic() - started_s
        stack.callback(self._say, f"{system.name}: stopping")
        for outcome in self._one_by_one(running.url, _WARM_UP, "warm-up"):
            if outcome.error is not None:
                raise BenchmarkError(f"a {outcome.kind} request while warming up: {outcome.error}")
        return running

    def _system(self, system: System, result: SystemResult) -> None:
        with ExitStack() as stack:
            running = self._start(system, stack)
            result.idle_cores = self._idle_cores(running)
            self._say(f"{system.name}: idle, {100 * result.idle_cores:.1f} % of a core")
            slo = self.results.slo or self._measure_unloaded(running)
            for number, load in enumerate(self.results.loads):
                if number:
                    self._settle(running)
                result.loads[load.name] = self._load(system, running, load, slo)
                self._save(self.results)
                running.check()

    def _measure_unloaded(self, running: Running) -> Slo:
        """One of the plain servers, asked directly, while the other one sleeps. Sets the bounds and the rates."""
        counts = zip(KINDS, self._plan.num_unloaded, strict=True)
        kinds = [kind for kind, count in counts for _ in range(count)]
        outcomes = self._one_by_one(running.engine_urls[0], kinds, "unloaded")
        try:
            unloaded = self.results.unloaded = figures.unloaded_of(outcomes)
        except ValueError as error:
            raise BenchmarkError(str(error)) from error
        slo = self.results.slo = Slo.of(unloaded, self._plan.ttft_factor, self._plan.itl_factor)
        self.results.loads = loads_of(self._plan, unloaded)
        self._say(
            f"unloaded plain server: TTFT {1000 * unloaded.ttft_s['chat']:.0f} ms (chat), "
            f"{1000 * unloaded.ttft_s['long']:.0f} ms (long), ITL {1000 * unloaded.itl_s:.1f} ms"
        )
        return slo

    def _idle_cores(self, running: Running) -> float:
        time.sleep(_SETTLE_S)
        meter = CpuMeter(running.processes)
        time.sleep(self._plan.idle_s)
        cpu_s, wall_s = meter.read()
        return cpu_s / wall_s

    def _load(self, system: System, running: Running, load: Load, slo: Slo) -> LoadResult:
        trace = make_trace(load, self._plan.seed, self._text)
        self._say(
            f"{system.name}: {load.name}, {load.chats_per_s:.2f} chats/s and {load.longs_per_s:.2f} long prompts/s "
            f"for {load.duration_s:.0f} s"
        )
        meter = CpuMeter(running.processes)
        with first_in_line():
            outcomes = asyncio.run(play(running.url, MODEL, trace, self._plan.give_up_s))
        cpu_s, wall_s = meter.read()
        result = LoadResult(load, all_figures(outcomes, slo, load, cpu_s, wall_s), outcomes)
        shown = {name: result.figures[name] for name in ("chat_itl_p99_ms", "goodput_per_s", "num_unfinished")}
        self._say(", ".join(f"{name} {'-' if value is None else f'{value:.4g}'}" for name, value in shown.items()))
        return result

    def _settle(self, running: Running) -> None:
        """Until what was cut off is out of the way: long prompts are answered again."""
        outcomes = self._one_by_one(running.url, _PROBES, "probe")
        if error := next((outcome.error for outcome in outcomes if outcome.error is not None), None):
            raise BenchmarkError(f"a long request after a load: {error}")
        time.sleep(_REST_S)

    def _one_by_one(self, url: str, kinds: Sequence[Kind], what: str) -> list[Outcome]:
        chance = random.Random(f"{self._plan.seed} {what} {time.monotonic()}")  # noqa: S311 (never a prompt twice)
        outcomes = []
        for kind in kinds:
            trace = [sample(kind, chance, self._text)]
            with first_in_line():
                outcomes += asyncio.run(play(url, MODEL, trace, self._plan.answer_timeout_s))
        return outcomes


def loads_of(plan: Plan, unloaded: Unloaded) -> list[Load]:
    """The same number of chats in each, and more and more long prompts.

    A plain server that does nothing else prefills one long prompt of mean length per unloaded TTFT.
    """
    chats_per_s = plan.num_chats / unloaded.e2e_s["chat"]
    most_longs_per_s = NUM_SERVERS / unloaded.ttft_s["long"]
    return [Load(name, chats_per_s, share * most_longs_per_s, plan.duration_s) for name, share in plan.shares.items()]


def all_figures(outcomes: Sequence[Outcome], slo: Slo, load: Load, cpu_s: float, wall_s: float) -> Figures:
    return {
        **figures.latencies(outcomes),
        **figures.goodput(outcomes, slo, load.duration_s),
        **figures.counts(outcomes),
        **figures.cpu_figures(cpu_s, wall_s, outcomes),
    }

"""One deployment serves one trace with one pair of policies: a discrete-event simulation of the proxy's way."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from heapq import heappop, heappush

import numpy as np

from benchmarks.simulation.engines import (
    CHUNK_TOKENS,
    DECODE_REQUEST_S,
    DECODE_STEP_S,
    DECODE_TOKEN_S,
    PREFILL_STEP_S,
    PREFILL_TOKEN_S,
    DecodeEngine,
    Job,
    PrefillEngine,
)
from benchmarks.simulation.trace import Request, Shape, mean_lengths
from services.global_proxy.policies.cost_model import Fleet
from services.global_proxy.policies.registry import make_policy

HANDOFF_S = 0.003
HANDOFF_TOKEN_S = 1e-6
TTFT_SLO_S = 1.0
TPOT_SLO_S = 0.025
_WARM_UP = 0.1  # of the requests: what the cost model learns from is not counted

Event = tuple[float, int, Callable[[], None]]


@dataclass(frozen=True)
class Outcome:
    """Seconds; requests a second that met both SLOs; and the share that did."""

    ttft_p50_s: float
    ttft_p99_s: float
    tpot_p50_s: float
    tpot_p99_s: float
    goodput: float
    good_share: float
    cached_share: float  # of all prompt tokens: P did not compute them


@dataclass(frozen=True)
class Case:
    """A deployment and what it serves."""

    shape: Shape
    num_prefill: int
    num_decode: int
    is_mixed: bool = False  # every fourth instance is half as fast

    def __str__(self) -> str:
        mixed = ", every fourth at half speed" if self.is_mixed else ""
        return f"{self.shape}, {self.num_prefill}P{self.num_decode}D{mixed}"


class Simulation:
    """One deployment with one pair of policies; serves one trace."""

    def __init__(self, case: Case, prefill_policy: str, decode_policy: str) -> None:
        prefills, decodes = Fleet(), Fleet()
        self._prefills = [
            PrefillEngine(f"10.0.1.{i}:8000", _slowness(i, case.is_mixed), prefills) for i in range(case.num_prefill)
        ]
        self._decodes = [
            DecodeEngine(f"10.0.2.{i}:8000", _slowness(i, case.is_mixed), decodes) for i in range(case.num_decode)
        ]
        self._prefill_policy = make_policy(prefill_policy, "prefill")
        self._decode_policy = make_policy(decode_policy, "decode")
        self._events: list[Event] = []
        self._num_events = 0
        self._now_s = 0.0

    def run(self, requests: Sequence[Request]) -> Outcome:
        """Serve them all, to the last token."""
        jobs: list[Job] = []
        arrivals = iter(requests)
        request = next(arrivals, None)
        events = self._events
        while request is not None or events:
            if request is not None and (not events or request.at_s <= events[0][0]):
                self._now_s = request.at_s
                jobs.append(self._arrive(request))
                request = next(arrivals, None)
            else:
                self._now_s, _, happen = heappop(events)
                happen()
        return _outcome(jobs[int(len(jobs) * _WARM_UP) :])

    def _at(self, time_s: float, happen: Callable[[], None]) -> None:
        self._num_events += 1
        heappush(self._events, (time_s, self._num_events, happen))

    def _arrive(self, request: Request) -> Job:
        prefill = self._prefill_policy.choose(self._prefills, request.prompt)
        job = Job(request, prefill)
        for policy in (self._prefill_policy, self._decode_policy):
            policy.started(prefill, request.prompt)
        prefill.send(job)
        if not prefill.is_busy:
            self._begin_step(prefill)
        return job

    def _begin_step(self, prefill: PrefillEngine) -> None:
        self._at(self._now_s + prefill.begin_step(), partial(self._end_step, prefill))

    def _end_step(self, prefill: PrefillEngine) -> None:
        for job in prefill.end_step():
            self._hand_off(job)
        if prefill.is_busy:
            self._begin_step(prefill)

    def _hand_off(self, job: Job) -> None:
        prompt = job.request.prompt
        job.prefill.costs.observe_prefill(job.num_computed, job.num_tokens_ahead, self._now_s - job.request.at_s)
        for policy in (self._prefill_policy, self._decode_policy):
            policy.finished(job.prefill, prompt)
        decode = self._decode_policy.choose(self._decodes, prompt)
        decode.expect(job)
        arrives_s = self._now_s + HANDOFF_S + HANDOFF_TOKEN_S * prompt.num_tokens
        self._at(arrives_s, partial(self._arrive_at_decode, decode, job))

    def _arrive_at_decode(self, decode: DecodeEngine, job: Job) -> None:
        decode.arrive(job, self._now_s)
        self._foretell(decode)

    def _foretell(self, decode: DecodeEngine) -> None:
        self._at(decode.next_end_s(), partial(self._end_decode, decode, decode.num_changes))

    def _end_decode(self, decode: DecodeEngine, num_changes: int) -> None:
        if decode.num_changes == num_changes:
            decode.end_one(self._now_s)
            if decode.num_running:
                self._foretell(decode)


def rate_at(load: float, case: Case) -> float:
    """Requests a second at which the busier role has `load` to do.

    1.0: P computes without a pause (what came before is cached), or D's time per token is at the SLO on average.
    """
    num_tokens, num_new, cached_share = mean_lengths(case.shape)
    computed = num_tokens * (1.0 - cached_share)
    prefill_rate = 1.0 / (computed * (PREFILL_TOKEN_S + PREFILL_STEP_S / CHUNK_TOKENS))
    request_s = DECODE_REQUEST_S + DECODE_TOKEN_S * (num_tokens + num_new / 2)
    decode_rate = (TPOT_SLO_S - DECODE_STEP_S) / request_s / (TPOT_SLO_S * num_new)
    prefill_speed, decode_speed = (
        sum(1.0 / _slowness(i, case.is_mixed) for i in range(num)) for num in (case.num_prefill, case.num_decode)
    )
    return load * min(prefill_speed * prefill_rate, decode_speed * decode_rate)


def _slowness(number: int, is_mixed: bool) -> float:
    return 2.0 if is_mixed and number % 4 == 3 else 1.0


def _outcome(jobs: Sequence[Job]) -> Outcome:
    ttft_s = np.array([job.first_token_s - job.request.at_s for job in jobs])
    tpot_s = np.array([job.tpot_s if job.request.num_new_tokens > 1 else 0.0 for job in jobs])
    good = (ttft_s <= TTFT_SLO_S) & (tpot_s <= TPOT_SLO_S)
    lasted_s = jobs[-1].request.at_s - jobs[0].request.at_s
    num_tokens = sum(job.request.prompt.num_tokens for job in jobs)
    return Outcome(
        *(float(np.percentile(values, rank)) for values in (ttft_s, tpot_s) for rank in (50, 99)),
        goodput=float(good.sum() / lasted_s) if lasted_s else 0.0,
        good_share=float(good.mean()),
        cached_share=1.0 - sum(job.num_computed for job in jobs) / num_tokens,
    )

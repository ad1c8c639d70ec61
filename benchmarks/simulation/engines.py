"""Engines that only keep time: P with its queue, chunks and prefix cache; D with its batch.

Times are those of an 8-billion-parameter model on one large accelerator, in order of magnitude. Both engines are also
what a policy sees of an instance (`services.global_proxy.policies.base.Candidate`).
"""

from collections import OrderedDict, deque
from heapq import heappop, heappush

from benchmarks.simulation.trace import BLOCK_TOKENS, Request
from services.global_proxy.policies.cost_model import Costs, Fleet

PREFILL_STEP_S = 0.008
PREFILL_TOKEN_S = 5e-5
CHUNK_TOKENS = 2048  # vLLM's max_num_batched_tokens
PREFIX_CACHE_TOKENS = 400_000

DECODE_STEP_S = 0.008
DECODE_REQUEST_S = 5e-5
DECODE_TOKEN_S = 3e-8
DECODE_KV_TOKENS = 600_000
DECODE_MAX_REQUESTS = 256


class Job:
    """A request on its way."""

    __slots__ = (
        "first_token_s",
        "load_at_start",
        "num_computed",
        "num_left",
        "num_tokens_ahead",
        "prefill",
        "request",
        "tpot_s",
    )

    def __init__(self, request: Request, prefill: "PrefillEngine") -> None:
        self.request = request
        self.prefill = prefill
        self.num_tokens_ahead = prefill.num_tokens
        self.num_left = -1  # prompt tokens to compute; -1: not begun
        self.num_computed = 0
        self.load_at_start = (0, 0)  # requests and tokens at D
        self.first_token_s = self.tpot_s = float("inf")


class PrefillEngine:
    """Computes prompts in order of arrival, in steps of at most CHUNK_TOKENS.

    Args:
        slowness: times the ordinary time of a step.
    """

    def __init__(self, name: str, slowness: float, fleet: Fleet) -> None:
        self.name = name
        self.num_requests = self.num_tokens = 0
        self.costs = Costs(fleet)
        self._slowness = slowness
        self._queue: deque[Job] = deque()
        self._in_step: list[Job] = []  # those that this step ends
        self._cached: OrderedDict[int, None] = OrderedDict()
        self.is_busy = False

    def send(self, job: Job) -> None:
        self.num_requests += 1
        self.num_tokens += job.request.prompt.num_tokens
        self._queue.append(job)

    def begin_step(self) -> float:
        """Seconds until the step ends; the queue is not empty."""
        room = CHUNK_TOKENS
        while room and self._queue:
            job = self._queue[0]
            if job.num_left < 0:
                job.num_computed = max(job.request.prompt.num_tokens - self._num_cached(job.request), 1)
                job.num_left = job.num_computed
            part = min(job.num_left, room)
            job.num_left -= part
            room -= part
            if job.num_left:
                break
            self._in_step.append(self._queue.popleft())
        self.is_busy = True
        return self._slowness * (PREFILL_STEP_S + PREFILL_TOKEN_S * (CHUNK_TOKENS - room))

    def end_step(self) -> list[Job]:
        """The prompts that are done."""
        done, self._in_step = self._in_step, []
        for job in done:
            self.num_requests -= 1
            self.num_tokens -= job.request.prompt.num_tokens
            for block in job.request.blocks:
                self._cached[block] = None
                self._cached.move_to_end(block)
        while len(self._cached) * BLOCK_TOKENS > PREFIX_CACHE_TOKENS:
            self._cached.popitem(last=False)
        self.is_busy = bool(self._queue)
        return done

    def _num_cached(self, request: Request) -> int:
        num_blocks = 0
        for block in request.blocks:
            if block not in self._cached:
                break
            num_blocks += 1
        return num_blocks * BLOCK_TOKENS


class DecodeEngine:
    """One batch, in which each request gets one token a step. Between arrivals and departures time flows as a fluid.

    Args:
        slowness: times the ordinary time of a step.
    """

    def __init__(self, name: str, slowness: float, fleet: Fleet) -> None:
        self.name = name
        self.num_requests = self.num_tokens = 0  # sent here and not yet ended, as the proxy counts
        self.costs = Costs(fleet)
        self.num_changes = 0  # of the batch: an end foretold before the last one is void
        self._slowness = slowness
        self._waiting: deque[Job] = deque()
        self._running: list[tuple[float, int, Job]] = []  # by the step in which they end
        self._kv_tokens = 0.0  # of those that run
        self._pending_tokens = 0  # of those that do not yet
        self._num_joined = 0
        self._steps = 0.0
        self._now_s = 0.0

    @property
    def num_running(self) -> int:
        return len(self._running)

    def expect(self, job: Job) -> None:
        """The proxy has sent the request; it arrives (`arrive`) when its KV does."""
        self.num_requests += 1
        self._pending_tokens += job.request.prompt.num_tokens
        self.num_tokens += job.request.prompt.num_tokens

    def arrive(self, job: Job, now_s: float) -> None:
        self._advance(now_s)
        self._waiting.append(job)
        self._admit()

    def step_s(self) -> float:
        """How long a step takes now: each request's time per token."""
        return self._slowness * (
            DECODE_STEP_S + DECODE_REQUEST_S * len(self._running) + DECODE_TOKEN_S * self._kv_tokens
        )

    def next_end_s(self) -> float:
        """When the next request ends if nothing changes."""
        if not self._running:
            return float("inf")
        return self._now_s + max(self._running[0][0] - self._steps, 0.0) * self.step_s()

    def end_one(self, now_s: float) -> Job:
        """The request whose end was foretold for now."""
        self._advance(now_s)
        _, _, job = heappop(self._running)
        request = job.request
        if request.num_new_tokens > 1:
            job.tpot_s = (now_s - job.first_token_s) / (request.num_new_tokens - 1)
            num_requests, num_tokens = job.load_at_start
            self.costs.observe_decode(
                (num_requests + self.num_requests) // 2, (num_tokens + self.num_tokens) // 2, job.tpot_s
            )
        self.num_requests -= 1
        self._kv_tokens -= request.prompt.num_tokens + request.num_new_tokens
        self._admit()
        self.num_tokens = self._pending_tokens + int(self._kv_tokens)
        return job

    def _advance(self, now_s: float) -> None:
        steps = (now_s - self._now_s) / self.step_s()
        self._steps += steps
        self._now_s = now_s
        self._kv_tokens += steps * len(self._running)
        self.num_tokens = self._pending_tokens + int(self._kv_tokens)

    def _admit(self) -> None:
        self.num_changes += 1
        while self._waiting and len(self._running) < DECODE_MAX_REQUESTS:
            job = self._waiting[0]
            request = job.request
            if self._running and self._kv_tokens + request.prompt.num_tokens > DECODE_KV_TOKENS:
                return
            self._waiting.popleft()
            self._num_joined += 1
            self._kv_tokens += request.prompt.num_tokens
            self._pending_tokens -= request.prompt.num_tokens
            heappush(self._running, (self._steps + request.num_new_tokens, self._num_joined, job))
            job.first_token_s = self._now_s + self.step_s()
            job.load_at_start = (self.num_requests, self.num_tokens)

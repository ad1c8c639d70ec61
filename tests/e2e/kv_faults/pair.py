"""One prefill and one decode engine, driven as a router drives them, and what must hold of them after any fault."""

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from typing import Any

from kv_transfer.errors import FAILURE_REASONS
from tests.e2e.deployments import Server, eventually
from tests.e2e.equality import COMPLETIONS, choices, completion
from tests.e2e.kv_faults.engines import LEASE_S, LOAD_TIMEOUT_S

BUSY_S = 60  # for what takes an instant on a machine that has nothing else to do

Params = dict[str, Any]

_numbers = count()


def fresh_text(length: int = 700) -> str:
    """So many tokens (bytes), beginning like no other prompt, so that no prefix cache has them."""
    number = next(_numbers)
    return f"{number:04d} ".ljust(length, "abcdefghij"[number % 10])


@dataclass(frozen=True)
class Pair:
    """`plain` is what its answers are compared with."""

    prefill: Server
    decode: Server
    plain: Server

    def hand_off(self, text: str) -> Params:
        """Leg 1: P computes the prompt and keeps its KV."""
        asked = {"max_tokens": 1, "min_tokens": 1, "kv_transfer_params": {"do_remote_decode": True}}
        params: Params = self.prefill.post(COMPLETIONS, completion(text, **asked))["kv_transfer_params"]
        return params

    def finish(self, text: str, params: Params, **more: Any) -> list[tuple[Any, ...]]:
        """Leg 2: D loads the KV and goes on."""
        return choices(self.decode.post(COMPLETIONS, completion(text, kv_transfer_params=params, **more)))

    def expected(self, text: str) -> list[tuple[Any, ...]]:
        return choices(self.plain.post(COMPLETIONS, completion(text)))

    def answers_right(self, text: str) -> bool:
        return self.finish(text, self.hand_off(text)) == self.expected(text)

    def control_port(self) -> int:
        """Where P's scheduler is asked for KV."""
        text = fresh_text()
        params = self.hand_off(text)
        self.finish(text, params)
        return int(params["remote_port"])

    def counts(self) -> "Counts":
        return Counts(self)

    def decode_is_empty(self) -> bool:
        names = ("vllm:kv_cache_usage_perc", "vllm:num_requests_running", "vllm:num_requests_waiting")
        return all(self.decode.metric(name) == 0 for name in names)

    def prefill_is_empty(self) -> bool:
        return self.prefill.metric("vllm:omni_kv_leases_open") == self.prefill.metric("vllm:kv_cache_usage_perc") == 0

    def assert_recovers(self) -> None:
        """Nothing is held on either side, and the next requests are disaggregated again, and right."""
        assert eventually(self.prefill.is_ready, BUSY_S)
        assert eventually(self.prefill_is_empty, LEASE_S + BUSY_S)
        assert eventually(self.decode_is_empty, LOAD_TIMEOUT_S + BUSY_S)
        assert eventually(self._disaggregates, BUSY_S)
        assert eventually(self.prefill_is_empty, BUSY_S)

    def _disaggregates(self) -> bool:
        """P may be left alone for some seconds yet: the answer is right, but D has computed all of it."""
        before = self.counts()
        assert self.answers_right(fresh_text())
        return before.eventually(loads=1, timeout_s=1)


_LOADS, _FAILURES, _LEASES = (
    "vllm:omni_kv_load_seconds_count",
    "vllm:omni_kv_load_failures_total",
    "vllm:omni_kv_leases_total",
)
_ON_DECODE: dict[str, tuple[str, dict[str, str]]] = {
    "loads": (_LOADS, {}),
    "tcp_loads": (_LOADS, {"transport": "tcp"}),
    "failures": (_FAILURES, {}),
    **{reason: (_FAILURES, {"reason": reason}) for reason in FAILURE_REASONS},
}
_ON_PREFILL: dict[str, tuple[str, dict[str, str]]] = {
    event: (_LEASES, {"event": event}) for event in ("granted", "released", "expired")
}


class Counts:
    """D's loads and failures, and P's leases: what has changed since this was made."""

    def __init__(self, pair: Pair) -> None:
        self._pair = pair
        self._before = {name: self._read(name) for name in (*_ON_DECODE, *_ON_PREFILL)}

    def since(self, names: Iterable[str] = (*_ON_DECODE, *_ON_PREFILL)) -> dict[str, float]:
        """Those that have changed, and by how much."""
        changes = {name: self._read(name) - self._before[name] for name in names}
        return {name: change for name, change in changes.items() if change}

    def eventually(self, *, timeout_s: float = BUSY_S, **expected: float) -> bool:
        """Whether these change by so much: a count comes with the engine's next step. A P that is stopped is not asked
        if no count of its is expected.
        """
        changed = {name: change for name, change in expected.items() if change}
        return eventually(lambda: self.since(expected) == changed, timeout_s)

    def _read(self, name: str) -> float:
        if name in _ON_DECODE:
            metric, labels = _ON_DECODE[name]
            return self._pair.decode.metric(metric, **labels)
        metric, labels = _ON_PREFILL[name]
        return self._pair.prefill.metric(metric, **labels)


@contextmanager
def timed(at_most_s: float) -> Iterator[None]:
    start = time.monotonic()
    yield
    assert time.monotonic() - start < at_most_s

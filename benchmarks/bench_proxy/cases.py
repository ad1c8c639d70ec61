"""What is measured, and the bodies that are posted for it."""

import json
from dataclasses import dataclass

NUM_PROMPT_WORDS = 200


@dataclass(frozen=True)
class Case:
    """One load on one subject. Its figures are named after it: `whole_per_s`, `paced_cpu_us`."""

    name: str
    num_tokens: int  # of each answer; in a stream, one chunk each
    stream: bool
    num_connections: int
    seconds: float


@dataclass(frozen=True)
class Throughput(Case):
    """As many requests as go through: wrk."""


@dataclass(frozen=True)
class Latency(Case):
    """One request at a time: http_load."""


@dataclass(frozen=True)
class Paced(Case):
    """As many streams as there are connections, all at once, a chunk every 20 ms: http_load."""

    ramp_s: float = 1.0


CHUNK_PERIOD_S = 0.02  # the stand-in engine's PACE_MS


def make_cases(seconds: float, num_connections: int, num_streams: int, num_streams_light: int) -> tuple[Case, ...]:
    """All of them, of `seconds` each (the latency of one request at a time needs no more than 1)."""
    paced = _paced("paced", num_streams, seconds)
    return (
        Throughput("whole", 32, False, num_connections, seconds),
        Throughput("streamed_32", 32, True, num_connections, seconds),
        Throughput("streamed_256", 256, True, num_connections, seconds),
        paced,
        _paced("paced_light", num_streams_light, seconds),
        Latency("latency", 32, False, 1, min(seconds, 1.0)),
    )


def _paced(name: str, num_streams: int, seconds: float) -> Paced:
    """Streams that outlive the measuring window, so that none begins or ends in it."""
    ramp_s = num_streams / 1000
    num_chunks = round((ramp_s + seconds + 0.2) / CHUNK_PERIOD_S)
    return Paced(name, num_chunks, True, num_streams, seconds, ramp_s)


def body_of(case: Case) -> bytes:
    """About 1 KB of JSON, as a client of vLLM writes it."""
    body: dict[str, object] = {
        "model": "paced" if isinstance(case, Paced) else "instant",
        "prompt": " ".join(["word"] * NUM_PROMPT_WORDS),
        "max_tokens": case.num_tokens,
        "temperature": 0.0,
    }
    if case.stream:
        body["stream"] = True
    return json.dumps(body, separators=(",", ":")).encode()

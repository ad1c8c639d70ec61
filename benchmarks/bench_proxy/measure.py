"""One case on one subject: load, and what it cost the proxy."""

import json
import subprocess
import tempfile
import time
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.bench_proxy.cases import CHUNK_PERIOD_S, Case, Paced, Throughput, body_of
from benchmarks.bench_proxy.processes import BenchmarkError, Process, find_program, on_cores

Figures = dict[str, float]

_SETTLE_S = 5.0
_SLACK_S = 30.0  # more than a load needs beyond its own time
_WRK_SCRIPT = """\
wrk.method = "POST"
wrk.headers["Content-Type"] = "application/json"
wrk.body = [==[{body}]==]
function done(summary, latency, requests)
    local e = summary.errors
    io.write(string.format('{{"num_requests": %d, "us": %d, "num_failed": %d}}\\n',
        summary.requests, summary.duration, e.connect + e.read + e.write + e.status + e.timeout))
end
"""


@dataclass(frozen=True)
class Load:
    """Where load comes from."""

    http_load: Path
    cores: Collection[int]


def measure(case: Case, port: int, proxy: Process | None, load: Load) -> Figures:
    """Put the load of `case` on what listens on `port`. `proxy`: whose CPU and memory are watched.

    Raises:
        BenchmarkError: a request was not answered well.
    """
    with tempfile.TemporaryDirectory(prefix="bench_proxy_") as folder:
        if isinstance(case, Throughput):
            return _throughput(case, port, proxy, load, Path(folder))
        watched = _Watched(proxy)
        answer = _http_load(case, port, watched, load, Path(folder))
    if proxy:
        _settle(proxy)
    return _paced(case, answer, watched) if isinstance(case, Paced) else _latency(answer)


def _settle(proxy: Process) -> None:
    """Wait until it has put away what a load left behind, or the next subject would pay for it."""
    deadline = time.monotonic() + _SETTLE_S
    before_s = proxy.cpu_s()
    while time.monotonic() < deadline:
        time.sleep(0.1)
        before_s, since_s = proxy.cpu_s(), before_s
        if before_s - since_s < 0.02:
            return


def is_possible(case: Case) -> bool:
    """Whether there is what makes its load."""
    return not isinstance(case, Throughput) or find_program("wrk") is not None


def _throughput(case: Case, port: int, proxy: Process | None, load: Load, folder: Path) -> Figures:
    script = folder / "post.lua"
    script.write_text(_WRK_SCRIPT.format(body=body_of(case).decode()))
    # wrk takes whole seconds.
    options = ["-t1", f"-c{case.num_connections}", f"-d{max(round(case.seconds), 1)}s", "-s", str(script)]
    cpu_s = proxy.cpu_s() if proxy else 0.0
    with on_cores(load.cores):
        done = subprocess.run(
            [find_program("wrk") or "wrk", *options, f"http://127.0.0.1:{port}/v1/completions"],
            capture_output=True,
            text=True,
            timeout=case.seconds + _SLACK_S,
            check=False,
        )
    cpu_s = proxy.cpu_s() - cpu_s if proxy else 0.0
    if done.returncode:
        raise BenchmarkError(f"wrk: {done.stderr or done.stdout}")
    answer = json.loads(done.stdout.splitlines()[-1])
    num_requests, seconds = answer["num_requests"], answer["us"] / 1e6
    if answer["num_failed"] or not num_requests:
        raise BenchmarkError(f"{answer['num_failed']} failed requests, {num_requests} answered")
    figures = {f"{case.name}_per_s": num_requests / seconds}
    if proxy:
        figures[f"{case.name}_cpu_us"] = cpu_s / num_requests * 1e6
        figures[f"{case.name}_cores"] = cpu_s / seconds
    return figures


class _Watched:
    """The proxy's CPU time within a window, and what its memory has grown by then."""

    def __init__(self, proxy: Process | None) -> None:
        self._proxy = proxy
        self._rss_before_bytes = proxy.rss_bytes() if proxy else 0
        self.rss_growth_bytes = 0
        self.cpu_s: float | None = None

    def begin(self) -> None:
        if self._proxy:
            self.cpu_s = -self._proxy.cpu_s()

    def end(self) -> None:
        if self._proxy and self.cpu_s is not None:
            self.cpu_s += self._proxy.cpu_s()
            self.rss_growth_bytes = self._proxy.rss_bytes() - self._rss_before_bytes


def _http_load(case: Case, port: int, watched: _Watched, load: Load, folder: Path) -> dict[str, Any]:
    body = folder / "body.json"
    body.write_bytes(body_of(case))
    ramp_s = case.ramp_s if isinstance(case, Paced) else 0.1
    times_ms = (str(round(1000 * seconds)) for seconds in (ramp_s, case.seconds))
    command = [str(load.http_load), str(port), str(case.num_connections), *times_ms, str(body)]
    last = ""
    with on_cores(load.cores):
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    with process:
        for line in process.stdout or ():
            if line == "begin\n":
                watched.begin()
            elif line == "end\n":
                watched.end()
            last = line
    if process.returncode or not last.startswith("{"):
        raise BenchmarkError(f"http_load ended with {process.returncode}")
    answer: dict[str, Any] = json.loads(last)
    if answer["num_failed"]:
        raise BenchmarkError(f"{answer['num_failed']} failed requests")
    return answer


def _latency(answer: dict[str, Any]) -> Figures:
    latency_us = answer["latency_us"]
    if latency_us is None:
        raise BenchmarkError("not one request was answered")
    return {"latency_p50_us": latency_us["p50"], "latency_p99_us": latency_us["p99"]}


def _paced(case: Paced, answer: dict[str, Any], watched: _Watched) -> Figures:
    num_chunks, spacing_us = answer["num_events"], answer["spacing_us"]
    if spacing_us is None:
        raise BenchmarkError("no stream gave two chunks")
    figures: Figures = {
        "chunks_per_s": num_chunks / case.seconds,
        "share_in_time": num_chunks * CHUNK_PERIOD_S / (case.num_connections * case.seconds),
        "spacing_p50_ms": spacing_us["p50"] / 1000,
        "spacing_p99_ms": spacing_us["p99"] / 1000,
        "num_unfinished": answer["num_unfinished"],
    }
    if watched.cpu_s is not None:
        figures["cpu_us"] = watched.cpu_s / num_chunks * 1e6
        figures["cores"] = watched.cpu_s / case.seconds
        figures["rss_kb"] = watched.rss_growth_bytes / case.num_connections / 1024
    return {f"{case.name}_{name}": value for name, value in figures.items()}

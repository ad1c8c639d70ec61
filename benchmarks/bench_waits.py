"""What it costs that vLLM's processes wait for one another in a loop, beside ours, which sleep: `make bench-waits`.

Two engines of plain vLLM and two of ours (without a connector), each in a session of its own, as services are. Each
round asks one engine of a kind for one stream, then both engines of the kind for one each. Meanwhile a watcher, in a
session of its own, wakes up every 10 ms and notes by how much it was late.
"""

import argparse
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryDirectory
from urllib.request import Request, urlopen

import psutil

from benchmarks.servers import is_healthy, wait_until
from omni.deployment.embedded_model import ensure_embedded_model

KINDS = {"plain vLLM": "vllm.entrypoints.openai.api_server", "omni": "omni.adaptors.vllm.api_server"}
ANSWER_TIMEOUT_S = 600
NAP_S = 0.01


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m", help="an embedded model: smollm2-135m (default) or tiny")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=100, help="of each answer")
    parser.add_argument("--first-port", type=int, default=19400)
    options = parser.parse_args()
    model = ensure_embedded_model(options.model)
    rows: dict[tuple[str, int], list[tuple[float, float, float]]] = {}
    with ExitStack() as stack:
        temporary = stack.enter_context(TemporaryDirectory())  # vLLM leaves sockets there
        engines = {
            kind: [
                stack.enter_context(_engine(module, model, options.first_port + 2 * index + rank, rank, temporary))
                for rank in range(2)
            ]
            for index, (kind, module) in enumerate(KINDS.items())
        }
        for number in range(options.rounds + 1):  # the first is not counted
            for kind, pair in engines.items():
                for count in (1, 2):
                    measured = _measure(pair[:count], options.tokens)
                    if number:
                        rows.setdefault((kind, count), []).append(measured)
    print(f"{'':34} {'tokens/s':>10} {'CPU s per 1000 tokens':>22} {'another process was late by, at worst, s':>42}")
    for (kind, count), measurements in rows.items():
        speed, cpu, late = (list(column) for column in zip(*measurements, strict=True))
        name = f"{kind}, {count} engine{'s' * (count - 1)} at work"
        print(f"{name:34} {statistics.median(speed):10.1f} {statistics.median(cpu):22.1f} {max(late):42.2f}")
    print(f"medians of {options.rounds} rounds, and the worst; {options.model}, Linux {os.uname().release}")


class Engine:
    """A running engine."""

    def __init__(self, process: psutil.Process, url: str) -> None:
        self.url = url
        self._processes = [process, *process.children(recursive=True)]

    def cpu_s(self) -> float:
        return sum(sum(process.cpu_times()[:2]) for process in self._processes)

    def generate(self, num_tokens: int) -> None:
        body = {"model": "m", "prompt": "Once upon a time", "max_tokens": num_tokens, "ignore_eos": True}
        request = Request(f"{self.url}/v1/completions", json.dumps(body).encode(), {"content-type": "application/json"})  # noqa: S310
        with urlopen(request, timeout=ANSWER_TIMEOUT_S) as response:  # noqa: S310 (our own servers)
            json.load(response)


@contextmanager
def _engine(module: str, model: Path, port: int, core: int, temporary: str) -> Iterator[Engine]:
    command = [
        *(sys.executable, "-m", module, "--model", str(model), "--served-model-name", "m"),
        *("--host", "127.0.0.1", "--port", str(port), "--enforce-eager"),
        *("--max-model-len", "2048", "--kv-cache-memory-bytes", str(1 << 28), "--shutdown-timeout", "5"),
    ]
    env = {**os.environ, "VLLM_CPU_OMP_THREADS_BIND": str(core), "TORCH_COMPILE_DISABLE": "1", "TMPDIR": temporary}
    process = subprocess.Popen(
        command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    try:
        url = f"http://127.0.0.1:{port}"
        wait_until(lambda: is_healthy(url), process)
        yield Engine(psutil.Process(process.pid), url)
    finally:
        process.terminate()
        process.wait(timeout=60)


def _measure(engines: list[Engine], num_tokens: int) -> tuple[float, float, float]:
    """Tokens per second, CPU seconds per 1000 tokens, and how late the watcher was at worst, seconds."""
    time.sleep(1.5)  # vLLM's processes poll for a second more
    before_s = sum(engine.cpu_s() for engine in engines)
    with _watcher() as stop, ThreadPoolExecutor(len(engines)) as pool:
        start_s = time.monotonic()
        list(pool.map(lambda engine: engine.generate(num_tokens), engines))
        took_s = time.monotonic() - start_s
        stop.send(None)
        late_s = stop.recv()
    num_generated = num_tokens * len(engines)
    cpu_s = sum(engine.cpu_s() for engine in engines) - before_s
    return num_generated / took_s, 1000 * cpu_s / num_generated, late_s


@contextmanager
def _watcher() -> Iterator[Connection]:
    here, there = multiprocessing.Pipe()
    process = multiprocessing.Process(target=_watch, args=(there,), daemon=True)
    process.start()
    try:
        here.recv()  # it has begun
        yield here
    finally:
        process.join(ANSWER_TIMEOUT_S)


def _watch(connection: Connection) -> None:
    os.setsid()
    connection.send(None)
    late_s = 0.0
    while not connection.poll():
        before_s = time.monotonic()
        time.sleep(NAP_S)
        late_s = max(late_s, time.monotonic() - before_s - NAP_S)
    connection.send(late_s)


if __name__ == "__main__":
    main()

"""How long deployments take to start, beside plain vLLM servers, in one run: `make bench-start` (about 4 minutes).

Each round starts, one after the other: one plain vLLM server, a 1P1D and a 2P1D deployment (each with the proxy), and
kills one engine of the latter to see it come back. A time ends when every server answers /health with 200.
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.servers import is_healthy, wait_until
from omni.deployment.embedded_model import ensure_embedded_model
from omni.deployment.load import load_plan
from omni.deployment.plan_types import LaunchPlan
from omni.deployment.run_state import RunFolder

_PLAIN_PORT = 9990


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="also write the times, seconds, to this file")
    options = parser.parse_args()
    model_path = ensure_embedded_model("smollm2-135m")
    seconds: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        os.environ["OMNI_STATE_DIR"] = folder
        for number in range(1, options.rounds + 1):
            print(f"round {number} of {options.rounds}", file=sys.stderr, flush=True)
            for name, taken in _round(model_path):
                seconds.setdefault(name, []).append(taken)
    print(f"{'':44} {'median':>7} {'min':>7} {'max':>7}   seconds, {options.rounds} rounds")
    for name, times in seconds.items():
        print(f"{name:44} {statistics.median(times):7.1f} {min(times):7.1f} {max(times):7.1f}")
    if options.json:
        options.json.write_text(json.dumps(seconds, indent=2))


def _round(model_path: Path) -> Iterator[tuple[str, float]]:
    with _started(_plain_command(model_path), [f"http://127.0.0.1:{_PLAIN_PORT}"]) as taken:
        yield "plain vLLM, one server", taken
    for config in ("configs/1p1d.yaml", "configs/2p1d.yaml"):
        plan = load_plan(config)
        command = [sys.executable, "-m", "omni.cli.main", "serve", "--quiet", config]
        with _started(command, [process.url for process in plan.processes]) as taken:
            yield f"omni_cli serve {config}", taken
            if config == "configs/2p1d.yaml":
                yield "  of it, one engine after kill -9", _restart_one(plan)


def _plain_command(model_path: Path) -> list[str]:
    return [
        *(sys.executable, "-m", "vllm.entrypoints.openai.api_server"),
        *("--model", str(model_path), "--port", str(_PLAIN_PORT), "--host", "127.0.0.1", "--enforce-eager"),
        *("--max-model-len", "2048", "--kv-cache-memory-bytes", str(1 << 28)),
    ]


@contextmanager
def _started(command: list[str], urls: list[str]) -> Iterator[float]:
    """Run a command until the block is left; gives the seconds until all these servers were healthy."""
    start = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_until(lambda: all(is_healthy(url) for url in urls), process)
        yield time.monotonic() - start
    finally:
        process.terminate()
        process.wait(timeout=60)


def _restart_one(plan: LaunchPlan) -> float:
    name, url = plan.processes[0].name, plan.processes[0].url
    pid = RunFolder.of(plan.name).processes()[name].pid
    if pid is None:
        sys.exit(f"{name} is not running")
    os.kill(pid, signal.SIGKILL)
    start = time.monotonic()
    wait_until(lambda: RunFolder.of(plan.name).processes()[name].pid not in (pid, None) and is_healthy(url))
    return time.monotonic() - start


if __name__ == "__main__":
    main()

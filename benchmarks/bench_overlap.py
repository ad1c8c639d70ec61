"""How long decode waits for KV after prefill has ended: pull against layer-wise, on an open and on a narrow link.

Two real engines with SmolLM2. P runs in a network namespace of its own, so that a token bucket (tc tbf) can narrow the
link to D; KV moves over TCP. Each round sends one fresh prompt in each of the four cases. Needs root and iproute2.

Prints, for each case, the seconds from the end of P's answer to D's first token.
"""

import argparse
import asyncio
import json
import os
import secrets
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp

from kv_transfer.auth import DeploymentKey, load_or_make_key
from kv_transfer.ticket import new_ticket
from omni.deployment.embedded_model import ensure_embedded_model

P_ADDRESS, D_ADDRESS = "10.77.31.2", "10.77.31.1"
API_PORT, CONTROL_PORT = 18000, 18001  # in namespaces of our own, or on an address of our own: nobody else is there
READY_TIMEOUT_S = 600
ANSWER_TIMEOUT_S = 300
WORDS = (
    "the",
    "river",
    "carried",
    "small",
    "boats",
    "past",
    "old",
    "mills",
    "while",
    "people",
    "watched",
    "them",
    "go",
)


@dataclass(frozen=True)
class Case:
    mode: str  # pull or layerwise
    mbit_per_s: int | None  # None: not narrowed

    @property
    def name(self) -> str:
        return f"{self.mode}, {'open link' if self.mbit_per_s is None else f'{self.mbit_per_s} Mbit/s'}"


@dataclass(frozen=True)
class Link:
    namespace: str
    host_end: str
    far_end: str

    def narrow(self, mbit_per_s: int | None) -> None:
        """In both directions."""
        for prefix, device in ((["ip", "netns", "exec", self.namespace], self.far_end), ([], self.host_end)):
            _run(*prefix, "tc", "qdisc", "del", "dev", device, "root", check=False)
            if mbit_per_s is not None:
                rate = ("rate", f"{mbit_per_s}mbit", "burst", "256kb", "latency", "100ms")
                _run(*prefix, "tc", "qdisc", "add", "dev", device, "root", "tbf", *rate)


def _run(*command: str, check: bool = True) -> None:
    subprocess.run(command, check=check, capture_output=True)


@contextmanager
def linked_namespace() -> Iterator[Link]:
    """A network namespace with one link to ours."""
    mark = secrets.token_hex(3)
    link = Link(f"omni-{mark}", f"om{mark}a", f"om{mark}b")
    _run("ip", "netns", "add", link.namespace)
    try:
        _run("ip", "link", "add", link.host_end, "type", "veth", "peer", "name", link.far_end)
        _run("ip", "link", "set", link.far_end, "netns", link.namespace)
        _run("ip", "addr", "add", f"{D_ADDRESS}/24", "dev", link.host_end)
        _run("ip", "link", "set", link.host_end, "up")
        inside = ("ip", "-n", link.namespace)
        _run(*inside, "addr", "add", f"{P_ADDRESS}/24", "dev", link.far_end)
        for device in (link.far_end, "lo"):
            _run(*inside, "link", "set", device, "up")
        yield link
    finally:
        _run("ip", "netns", "del", link.namespace)  # and with it the link


@contextmanager
def engine(role: str, address: str, core: int, prefix: list[str], folder: Path) -> Iterator[str]:
    """One api server with our connector; yields its URL."""
    transfer = {
        "kv_connector": "OmniConnector",
        "kv_connector_module_path": "kv_transfer.connector",
        "kv_role": role,
        "kv_load_failure_policy": "fail",
        "kv_connector_extra_config": {
            "listen_host": address,
            "listen_port": CONTROL_PORT,
            "key_file": str(folder / "key"),
            "transport": "tcp",
        },
    }
    command = [
        *prefix,
        *(sys.executable, "-m", "omni.adaptors.vllm.api_server"),
        *("--model", str(ensure_embedded_model("smollm2-135m")), "--served-model-name", "smollm2"),
        *("--host", address, "--port", str(API_PORT), "--dtype", "bfloat16", "--max-model-len", "4096"),
        *("--kv-cache-memory-bytes", str(512 << 20), "--max-num-seqs", "8", "--max-num-batched-tokens", "512"),
        *("--enforce-eager", "--kv-transfer-config", json.dumps(transfer)),
    ]
    env = {**os.environ, "VLLM_CPU_OMP_THREADS_BIND": str(core)}
    with (folder / f"{role}.log").open("wb") as log:
        process = subprocess.Popen(command, env=env, stdout=log, stderr=subprocess.STDOUT)
        try:
            yield f"http://{address}:{API_PORT}"
        finally:
            process.terminate()
            try:
                process.wait(timeout=30)
            except subprocess.TimeoutExpired:
                process.kill()


class Requests:
    """One prompt through both engines, as the proxy would send it."""

    def __init__(self, session: aiohttp.ClientSession, key: DeploymentKey, prefill: str, decode: str) -> None:
        self._session = session
        self._key = key
        self._prefill = prefill
        self._decode = decode

    async def wait_until_ready(self) -> None:
        for url in (self._prefill, self._decode):
            async with asyncio.timeout(READY_TIMEOUT_S):
                while not await self._is_healthy(url):  # noqa: ASYNC110 - another process's state
                    await asyncio.sleep(0.5)

    async def gap_s(self, mode: str, prompt: str) -> float:
        """Seconds from the end of P's answer to D's first token."""
        if mode == "pull":
            params = await self._prefill_answer(prompt, {})
            prefilled = time.perf_counter()
            first_token = await self._first_token(prompt, params)
            return first_token - prefilled
        ours = {"ticket": new_ticket(self._key, P_ADDRESS, CONTROL_PORT).as_params()}
        decode = asyncio.create_task(self._first_token(prompt, {"do_remote_prefill": True, "omni": ours}))
        await self._prefill_answer(prompt, {"omni": ours})
        prefilled = time.perf_counter()
        return await decode - prefilled

    async def _prefill_answer(self, prompt: str, more: dict[str, Any]) -> dict[str, Any]:
        body = {"max_tokens": 1, "min_tokens": 1, "kv_transfer_params": {"do_remote_decode": True, **more}}
        async with self._post(self._prefill, prompt, body) as response:
            answer = await response.json()
            if response.status != 200:
                raise RuntimeError(f"prefill answered {response.status}: {answer}")
            params: dict[str, Any] = answer["kv_transfer_params"]
            return params

    async def _first_token(self, prompt: str, params: dict[str, Any]) -> float:
        body = {"max_tokens": 2, "stream": True, "kv_transfer_params": params}
        async with self._post(self._decode, prompt, body) as response:
            chunk = await response.content.readany()
            first_token = time.perf_counter()
            if response.status != 200:
                raise RuntimeError(f"decode answered {response.status}: {chunk!r}")
            while chunk:
                chunk = await response.content.readany()
        return first_token

    def _post(self, url: str, prompt: str, more: dict[str, Any]) -> Any:
        body = {"model": "smollm2", "prompt": prompt, "temperature": 0, **more}
        return self._session.post(f"{url}/v1/completions", json=body)

    async def _is_healthy(self, url: str) -> bool:
        try:
            async with self._session.get(f"{url}/health") as response:
                return response.status == 200
        except aiohttp.ClientError:
            return False


def fresh_prompt(num_words: int) -> str:
    """One that no prefix cache has."""
    return f"{secrets.token_hex(4)} " + " ".join(secrets.choice(WORDS) for _ in range(num_words))


async def measure(requests: Requests, link: Link, num_rounds: int, num_words: int) -> dict[Case, list[float]]:
    cases = [Case(mode, rate) for rate in (None, 1000) for mode in ("pull", "layerwise")]
    gaps: dict[Case, list[float]] = {case: [] for case in cases}
    await requests.wait_until_ready()
    for case in cases:
        await requests.gap_s(case.mode, fresh_prompt(num_words))  # everything is opened and warm
    for number in range(num_rounds):
        for case in cases:
            link.narrow(case.mbit_per_s)
            gaps[case].append(await requests.gap_s(case.mode, fresh_prompt(num_words)))
        print(f"round {number + 1} of {num_rounds}", file=sys.stderr)
    return gaps


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--words", type=int, default=1800, help="of the prompt; a word is about a token")
    options = parser.parse_args()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-overlap-")))
        key = load_or_make_key(folder / "key")
        link = stack.enter_context(linked_namespace())
        inside = ["ip", "netns", "exec", link.namespace]
        prefill = stack.enter_context(engine("kv_producer", P_ADDRESS, 0, inside, folder))
        decode = stack.enter_context(engine("kv_consumer", D_ADDRESS, 1, [], folder))
        timeout = aiohttp.ClientTimeout(total=ANSWER_TIMEOUT_S)
        async with aiohttp.ClientSession(timeout=timeout) as session:
            gaps = await measure(Requests(session, key, prefill, decode), link, options.rounds, options.words)
    print("seconds from the end of prefill to decode's first token, median (min to max)")
    for case, seconds in gaps.items():
        print(f"{case.name:24} {statistics.median(seconds):6.3f} ({min(seconds):.3f} to {max(seconds):.3f})")


if __name__ == "__main__":
    asyncio.run(main())

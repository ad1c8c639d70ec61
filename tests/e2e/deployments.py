"""Real deployments for tests, started as users start them: a deployment file and `omni_cli`."""

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

import psutil
import yaml

READY_TIMEOUT_S = 600
ANSWER_TIMEOUT_S = 300
_NO_SHORT_CUTS = ("--min-prefill-tokens", "0")  # no prompt goes to D alone for being short, or to find out about it
REPOSITORY = Path(__file__).parents[2]

# Lets a test ask each worker for a digest of every KV block; see worker_digests.py.
DIGESTS: dict[str, Any] = {
    "extra_args": ["--worker-extension-cls", "tests.e2e.worker_digests.BlockDigests"],
    "env": {"VLLM_SERVER_DEV_MODE": "1"},
}


@dataclass(frozen=True)
class Server:
    """Something that answers HTTP: an engine or a proxy."""

    url: str

    def get(self, path: str) -> Any:
        with urlopen(self.url + path, timeout=ANSWER_TIMEOUT_S) as response:  # noqa: S310
            return response.read().decode()

    def post(self, path: str, body: dict[str, Any]) -> Any:
        """The JSON answer; raises HTTPError."""
        with self.open(path, body) as response:
            return json.load(response)

    def open(self, path: str, body: dict[str, Any], headers: dict[str, str] | None = None) -> Any:
        headers = {"content-type": "application/json", **(headers or {})}
        request = Request(self.url + path, json.dumps(body).encode(), headers)  # noqa: S310
        return urlopen(request, timeout=ANSWER_TIMEOUT_S)  # noqa: S310

    def stream(self, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
        """The events of a stream, which must end with [DONE]."""
        with self.open(path, {**body, "stream": True}) as response:
            events = [line.removeprefix(b"data: ").strip() for line in response if line.startswith(b"data: ")]
        assert events.pop() == b"[DONE]"
        return [json.loads(event) for event in events]

    def metric(self, name: str, **labels: str) -> float:
        """The sum of a metric over the series that have these labels; 0 when there are none."""
        total = 0.0
        for line in self.get("/metrics").splitlines():
            match = re.fullmatch(r"([\w:]+)(?:{(.*)})? (\S+)", line)
            if match and match[1] == name:
                found = dict(re.findall(r'(\w+)="([^"]*)"', match[2] or ""))
                if labels.items() <= found.items():
                    total += float(match[3])
        return total

    def block_digests(self) -> list[str]:
        """A digest of every KV block of the first worker; see DIGESTS."""
        digests: list[str] = self.post("/collective_rpc", {"method": "kv_block_digests"})["results"][0]
        return digests

    def is_ready(self) -> bool:
        try:
            self.get("/health")
        except (HTTPError, URLError, OSError):
            return False
        return True


Waiter = Callable[[], Server]


@dataclass(frozen=True)
class Deployment:
    """A running deployment."""

    name: str
    proxy: Server
    prefill: tuple[Server, ...]
    decode: tuple[Server, ...]
    mixed: tuple[Server, ...]
    model: str
    log_folder: Path
    env: dict[str, str]

    def cli(self, *arguments: str) -> "subprocess.CompletedProcess[str]":
        return omni_cli(self.env, *arguments)

    def status(self) -> dict[str, Any]:
        """What `omni_cli status --json` says of the processes; no completion is taken."""
        shown: dict[str, Any] = json.loads(self.cli("status", "--json", "--no-completion").stdout)
        return shown

    def prefill_is_idle(self) -> bool:
        """Every lease has ended and every KV block is free."""
        return all(
            p.metric("vllm:omni_kv_leases_open") == 0 and p.metric("vllm:kv_cache_usage_perc") == 0
            for p in self.prefill
        )


def omni_cli(env: dict[str, str], *arguments: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "omni.cli.main", *arguments]
    return subprocess.run(
        command, env=env, cwd=REPOSITORY, capture_output=True, text=True, check=False, timeout=READY_TIMEOUT_S
    )


@contextmanager
def deployed(
    folder: Path,
    free_ports: Callable[[int], int],
    *,
    model: str,
    prefill_groups: int,
    decode_groups: int,
    mixed_groups: int = 0,
    dp: int = 1,
    tp: int = 1,
    max_model_len: int = 2048,
    kv_transfer: dict[str, Any] | None = None,
    group_options: dict[str, dict[str, Any]] | None = None,
    proxy_options: dict[str, Any] | None = None,
) -> Iterator[Deployment]:
    """Start a deployment in float32, in which greedy tokens do not hang on rounding; stop it afterwards.

    Args:
        kv_transfer: more keys of services.kv_transfer.
        group_options: more keys of single groups, by name: "decode.group1".
        proxy_options: more keys of deployment.proxy.
    """
    kv_transfer = kv_transfer or {}
    if "connector" not in kv_transfer:  # vLLM's own know no checksum
        kv_transfer = {"checksum": True, **kv_transfer}
    name = f"test-{folder.name}"
    num_groups = prefill_groups + decode_groups + mixed_groups
    first_port = free_ports(num_groups * (2 * dp + 1) + 2)  # the last: where engines join
    ports = iter(range(first_port, first_port + 1000))

    def take(count: int) -> int:
        """The first of so many ports in a row."""
        return [next(ports) for _ in range(count)][-count]

    def groups(role: str, count: int) -> dict[str, Any]:
        return {
            f"group{index}": {
                "hosts": "127.0.0.1",
                "base_api_port": take(dp),
                "base_kv_port": take(dp),
                "master_port": take(1),
                **(group_options or {}).get(f"{role}.group{index}", {}),
            }
            for index in range(1, count + 1)
        }

    sizes = {"data_parallel_size": dp, "tensor_parallel_size": tp}
    role = {**sizes, "kv_cache_gib": 0.5, "max_model_len": max_model_len, **DIGESTS}
    content = {
        "name": name,
        "platform": "cpu",
        "deployment": {
            "prefill": groups("prefill", prefill_groups),
            "decode": groups("decode", decode_groups),
            **({"mixed": groups("mixed", mixed_groups)} if mixed_groups else {}),
            "proxy": {"host": "127.0.0.1", "listen_port": take(1), "extra_args": list(_NO_SHORT_CUTS)}
            | (proxy_options or {}),
        },
        "services": {
            "model_path": model,
            "served_model_name": "test-model",
            "dtype": "float32",
            "log_path": str(folder / "logs"),
            "prefill": role,
            "decode": role,
            "mixed": role,
            "kv_transfer": kv_transfer,
        },
    }
    config = folder / "deployment.yaml"
    config.write_text(yaml.safe_dump(content))
    env = {**os.environ, "OMNI_STATE_DIR": str(folder / "state")}
    plan = json.loads(omni_cli(env, "plan", "--json", str(config)).stdout)
    servers = {
        role: tuple(Server(process["url"]) for process in plan["processes"] if process["role"] == role)
        for role in ("prefill", "decode", "mixed", "proxy")
    }
    started = omni_cli(env, "serve", "--detach", str(config))
    assert started.returncode == 0, started.stdout + started.stderr
    try:
        yield Deployment(
            name=name,
            proxy=servers["proxy"][0],
            prefill=servers["prefill"],
            decode=servers["decode"],
            mixed=servers["mixed"],
            model="test-model",
            log_folder=folder / "logs",
            env=env,
        )
    finally:
        pids = [p["pid"] for p in json.loads(omni_cli(env, "status", "--json", "--no-completion").stdout)["processes"]]
        stopped = omni_cli(env, "stop", name)
        assert stopped.returncode == 0, stopped.stdout + stopped.stderr
        for folder in (Path("/dev/shm"), Path(tempfile.gettempdir())):  # noqa: S108
            assert not [path for pid in pids for path in folder.glob(f"omni_*_{pid}_*")]


@contextmanager
def running(
    command: list[str], port: int, log_file: Path, env: dict[str, str] | None = None, *, host: str = "127.0.0.1"
) -> Iterator[Waiter]:
    """Start a server. What is yielded waits until it is ready.

    At the end it and its children are gone, and so are the files in /dev/shm that they had mapped. Its temporary folder
    is its own: vLLM leaves sockets there.
    """
    temporary = tempfile.TemporaryDirectory(prefix="omni-test-")
    with log_file.open("wb") as log:
        env = {**os.environ, "TMPDIR": temporary.name, **(env or {})}
        process = subprocess.Popen(command, cwd=REPOSITORY, env=env, stdout=log, stderr=subprocess.STDOUT)

    def until_ready() -> Server:
        server = Server(f"http://{host}:{port}")
        deadline = time.monotonic() + READY_TIMEOUT_S
        while not server.is_ready():
            assert process.poll() is None, log_file.read_text()[-3000:]
            assert time.monotonic() < deadline, f"not ready in time: {command}"
            time.sleep(0.1)
        return server

    try:
        yield until_ready
    finally:
        family = [psutil.Process(process.pid)] if process.poll() is None else []
        family += [child for parent in family for child in parent.children(recursive=True)]
        shared = {mapping.path for member in family for mapping in member.memory_maps()}
        process.terminate()
        process.wait(timeout=60)
        _, alive = psutil.wait_procs(family, timeout=30)
        for member in alive:
            member.kill()
        temporary.cleanup()
        assert not alive, f"left by {command}: {alive}"
        left = [path for path in shared if path.startswith("/dev/shm/") and Path(path).exists()]  # noqa: S108
        assert not left, f"left by {command}: {left}"


@contextmanager
def plain_vllm(
    folder: Path, free_ports: Callable[[int], int], *, model_path: Path, max_model_len: int = 2048
) -> Iterator[Server]:
    """vLLM's own server, with nothing of ours in it."""
    port = free_ports(1)
    command = [
        *(sys.executable, "-m", "vllm.entrypoints.openai.api_server"),
        *engine_arguments(port, model_path, max_model_len),
        *("--kv-cache-memory-bytes", str(1 << 29)),
    ]
    env = {"VLLM_CPU_OMP_THREADS_BIND": "0", "TORCH_COMPILE_DISABLE": "1"}
    with running(command, port, folder / "plain.log", env) as until_ready:
        yield until_ready()


def engine_arguments(port: int, model_path: Path, max_model_len: int = 2048) -> list[str]:
    """What vLLM's api server is told, with or without a connector."""
    return [
        *("--model", str(model_path), "--served-model-name", "test-model", "--host", "127.0.0.1", "--port", str(port)),
        *("--dtype", "float32", "--max-model-len", str(max_model_len), "--max-num-seqs", "64"),
        *("--enforce-eager", "--shutdown-timeout", "5"),
    ]


@contextmanager
def proxy_over(
    folder: Path,
    free_ports: Callable[[int], int],
    prefill: tuple[Server, ...],
    decode: tuple[Server, ...],
    *more: str,
) -> Iterator[Server]:
    """One more proxy over some engines: those of a deployment in another topology, or with another connector."""
    port = free_ports(1)
    command = [sys.executable, "-m", "services.global_proxy", "--host", "127.0.0.1", "--port", str(port)]
    for option, servers in (("--prefill", prefill), ("--decode", decode)):
        for server in servers:
            command += [option, server.url]
    with running([*command, *_NO_SHORT_CUTS, *more], port, folder / f"proxy-{port}.log") as until_ready:
        yield until_ready()


def eventually(condition: Callable[[], bool], timeout_s: float) -> bool:
    """Whether it becomes true in time."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True

"""Who takes part: our 1P1D, two plain vLLM servers, and 1P1D of vLLM's NixlConnector behind vllm-router.

All engines have the same model, type, KV memory and limits, and one thread each on a core of their own; what else their
processes do, and the proxies, share both cores.
"""

import json
import sys
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from benchmarks.bench_serving.processes import Process, running, wait_until_healthy
from benchmarks.routers import nginx, nginx_command, vllm_router, vllm_router_command
from benchmarks.servers import free_port

MODEL = "m"  # as clients name it
_VLLM = "vllm.entrypoints.openai.api_server"
_GIB = 1 << 30
_MAX_NUM_SEQS = 64
_SMALL_CHUNK_TOKENS = 256
# Compiling takes minutes on a CPU, and every engine is told to be eager; this keeps single operators from it too.
_ENGINE_ENV = {"TORCH_COMPILE_DISABLE": "1"}


@dataclass(frozen=True)
class Setup:
    """What is the same for all systems."""

    model_path: Path
    model: str  # as a deployment file names it: embedded:smollm2-135m
    dtype: str
    folder: Path  # temporary
    log_folder: Path
    cores: tuple[int, ...]  # one for each engine; only these are used
    max_model_len: int  # tokens
    kv_cache_gib: float  # of each engine
    start_timeout_s: float


@dataclass(frozen=True)
class Running:
    """A system that answers."""

    url: str  # where clients send their requests
    engine_urls: tuple[str, ...]
    processes: tuple[Process, ...]

    def check(self) -> None:
        """Raises BenchmarkError if a process has ended."""
        for process in self.processes:
            process.check()


class System(ABC):
    """One way to serve with two engines."""

    name: str
    title: str

    def missing(self) -> str | None:
        """What it cannot run without and how to get it; None if all is there."""
        return None

    @abstractmethod
    def start(self, setup: Setup, stack: ExitStack) -> Running:
        """Start it, to be stopped by `stack`; returns once all of it is healthy. Raises BenchmarkError."""


class Ours(System):
    name = "ours"
    title = "ours: omni_cli serve, 1P1D"

    def start(self, setup: Setup, stack: ExitStack) -> Running:
        config = setup.folder / "bench-serving.yaml"
        content = _deployment(setup)
        config.write_text(yaml.safe_dump(content))
        command = [sys.executable, "-m", "omni.cli.main", "serve", "--quiet", str(config)]
        env = {**_ENGINE_ENV, "OMNI_STATE_DIR": str(setup.folder / "state")}
        process = stack.enter_context(running(command, setup.log_folder / "ours.log", setup.cores, env))
        groups = [content["deployment"][role]["group1"] for role in ("prefill", "decode")]
        engine_urls = tuple(f"http://127.0.0.1:{group['base_api_port']}" for group in groups)
        url = f"http://127.0.0.1:{content['deployment']['proxy']['listen_port']}"
        wait_until_healthy([url, *engine_urls], [process], setup.start_timeout_s)
        return Running(url, engine_urls, (process,))


class Plain(System):
    """Two servers that know nothing of one another."""

    name = "plain"

    def __init__(self) -> None:
        self.title = f"two plain vLLM servers, round robin ({'nginx' if nginx() else 'stand-in for nginx'})"
        self._arguments: tuple[str, ...] = ()

    def start(self, setup: Setup, stack: ExitStack) -> Running:
        ports = [free_port(), free_port()]
        engines = [
            _start_engine(setup, stack, port, core, f"{self.name}{number}", self._arguments)
            for number, (port, core) in enumerate(zip(ports, setup.cores, strict=True))
        ]
        engine_urls = tuple(f"http://127.0.0.1:{port}" for port in ports)
        wait_until_healthy(engine_urls, engines, setup.start_timeout_s)
        port = free_port()
        log_path = setup.log_folder / f"{self.name}-round-robin.log"
        balancer = stack.enter_context(running(_balancer(port, ports, setup.folder), log_path, setup.cores))
        url = f"http://127.0.0.1:{port}"
        wait_until_healthy([url], [balancer], setup.start_timeout_s)
        return Running(url, engine_urls, (*engines, balancer))


class PlainSmallChunks(Plain):
    """As a user would set them who minds ITL: a step computes fewer prompt tokens, so that answers wait less for it."""

    name = "plain-chunks"

    def __init__(self) -> None:
        super().__init__()
        self.title += f", at most {_SMALL_CHUNK_TOKENS} tokens a step"
        self._arguments = ("--max-num-batched-tokens", str(_SMALL_CHUNK_TOKENS))


class Nixl(System):
    name = "nixl"
    title = "1P1D of plain vLLM with NixlConnector behind vllm-router"

    def missing(self) -> str | None:
        return None if vllm_router() else "vllm-router's Python package is not installed: make install"

    def start(self, setup: Setup, stack: ExitStack) -> Running:
        ports = [free_port(), free_port()]
        engines = []
        for role, port, core in zip(("producer", "consumer"), ports, setup.cores, strict=True):
            transfer = {"kv_connector": "NixlConnector", "kv_role": f"kv_{role}"}
            env = {"VLLM_NIXL_SIDE_CHANNEL_HOST": "127.0.0.1", "VLLM_NIXL_SIDE_CHANNEL_PORT": str(free_port())}
            arguments = ("--kv-transfer-config", json.dumps(transfer))
            engines.append(_start_engine(setup, stack, port, core, f"nixl-{role}", arguments, env))
        engine_urls = tuple(f"http://127.0.0.1:{port}" for port in ports)
        wait_until_healthy(engine_urls, engines, setup.start_timeout_s)
        port = free_port()
        command = vllm_router_command(port, engine_urls[0], engine_urls[1])
        router = stack.enter_context(running(command, setup.log_folder / "nixl-router.log", setup.cores))
        url = f"http://127.0.0.1:{port}"
        wait_until_healthy([url], [router], setup.start_timeout_s)
        return Running(url, engine_urls, (*engines, router))


def _start_engine(
    setup: Setup,
    stack: ExitStack,
    port: int,
    core: int,
    name: str,
    arguments: Sequence[str],
    env: dict[str, str] | None = None,
) -> Process:
    """vLLM's own server, with nothing of ours in it; not ready yet."""
    command = [
        *(sys.executable, "-m", _VLLM, "--model", str(setup.model_path), "--served-model-name", MODEL),
        *("--host", "127.0.0.1", "--port", str(port), "--dtype", setup.dtype, "--enforce-eager"),
        *("--max-model-len", str(setup.max_model_len), "--max-num-seqs", str(_MAX_NUM_SEQS)),
        *("--kv-cache-memory-bytes", str(int(setup.kv_cache_gib * _GIB)), "--shutdown-timeout", "5"),
        *arguments,
    ]
    env = {**_ENGINE_ENV, "VLLM_CPU_OMP_THREADS_BIND": str(core), **(env or {})}
    return stack.enter_context(running(command, setup.log_folder / f"{name}.log", setup.cores, env))


def _deployment(setup: Setup) -> dict[str, Any]:
    """A deployment file: every default but for the ports and what is the same for all systems."""

    def group() -> dict[str, object]:
        return {"base_api_port": free_port(), "base_kv_port": free_port(), "master_port": free_port()}

    role = {
        "max_model_len": setup.max_model_len,
        "kv_cache_gib": setup.kv_cache_gib,
        "extra_args": ["--max-num-seqs", str(_MAX_NUM_SEQS)],
    }
    return {
        "name": "bench-serving",
        "platform": "cpu",
        "deployment": {
            "prefill": {"group1": group()},
            "decode": {"group1": group()},
            "proxy": {"listen_port": free_port()},
        },
        "services": {
            "model_path": setup.model,
            "served_model_name": MODEL,
            "dtype": setup.dtype,
            "log_path": str(setup.log_folder / "ours"),
            "prefill": role,
            "decode": role,
        },
    }


def _balancer(port: int, server_ports: Sequence[int], folder: Path) -> list[str]:
    """nginx, whose default is round robin; where it is not installed, a stand-in."""
    if nginx() is not None:
        return nginx_command(port, server_ports, folder, answers_health=True)
    urls = [f"http://127.0.0.1:{server_port}" for server_port in server_ports]
    return [sys.executable, "-m", "benchmarks.bench_serving.round_robin", str(port), *urls]

"""Import vLLM once, fork everything from it.

A vLLM engine is an api server, an EngineCore and a worker. Spawned, each of the three imports vLLM again, one after
the other; that is most of the start time on a CPU. Here one process imports vLLM (`import_vllm`), and the api servers
forked from it fork their EngineCores and workers in turn (`use_fork`).

Two things that spawned processes take from the environment when they load libraries must be arranged otherwise:

- Preloaded libraries (libgomp): set before the importing process itself is executed, see `exec_environment`.
- OpenMP's thread count and cores: libgomp read them when it was loaded, so the worker sets them anew after the fork.

libgomp does not survive a fork once a parallel region has run, so every process that forks keeps to one thread.
"""

import functools
import gc
import importlib
import importlib.util
import json
import multiprocessing
import multiprocessing.context
import os
import socket
import stat
import sys
from pathlib import Path
from typing import Any

from omni.process import die_with_parent

# What api server, EngineCore and worker import on their way up; each import done here is done once for all of them.
PRELOADED_MODULES = (
    "vllm.entrypoints.launchers.api_server.entry",
    "vllm.entrypoints.launchers.api_server.routers",
    "vllm.entrypoints.launchers.cli_args",
    "vllm.v1.engine.async_llm",
    "vllm.v1.engine.core",
    "vllm.v1.executor.multiproc_executor",
    "vllm.v1.worker.cpu_worker",
    "kv_transfer.connector",
)

# Every module that holds `get_mp_context`, the function that decides how vLLM starts its processes.
_START_METHOD_MODULES = (
    "vllm.utils.system_utils",
    "vllm.v1.engine.coordinator",
    "vllm.v1.engine.utils",
    "vllm.v1.executor.multiproc_executor",
)


def exec_environment(*, eager: bool) -> dict[str, str]:
    """Environment variables with which the importing process must be executed.

    One thread for every library that would start a pool on import (OpenBLAS) or in the first parallel region (libgomp),
    and torch's own libgomp preloaded, as vLLM does for the processes that it spawns.

    Args:
        eager: the engines run eagerly (--enforce-eager). vLLM compiles a few functions all the same, such as those for
            log-probabilities, and the first request that needs one waits 12 s for a C++ compiler; this prevents it.
    """
    env = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    if eager:
        env["TORCH_COMPILE_DISABLE"] = "1"
    torch_spec = importlib.util.find_spec("torch")
    if torch_spec is not None and torch_spec.origin is not None:
        package = Path(torch_spec.origin).parent
        libraries = sorted([*(package / "lib").glob("libgomp*.so*"), *(package.parent / "torch.libs").glob("libgomp*")])
        preloaded = os.environ.get("LD_PRELOAD", "")
        if libraries and str(libraries[0]) not in preloaded:
            env["LD_PRELOAD"] = f"{libraries[0]}:{preloaded}".rstrip(":")
    return env


def exec_with(environment: dict[str, str]) -> None:
    """Execute this very program again with these variables, unless it has them already. Keeps the pid."""
    if any(os.environ.get(name) != value for name, value in environment.items()):
        arguments = [sys.executable, *sys.orig_argv[1:]]
        os.execve(sys.executable, arguments, {**os.environ, **environment})  # noqa: S606 (no shell)


def import_vllm(model_path: Path) -> None:
    """Import vLLM and all that an engine for this model needs; start no thread and run no computation.

    Args:
        model_path: the model's folder; its config.json names the architecture.
    """
    print("Importing vLLM", file=sys.stderr, flush=True)
    for module in PRELOADED_MODULES:
        importlib.import_module(module)
    for architecture in json.loads((model_path / "config.json").read_text()).get("architectures") or ():
        _import_architecture(architecture)
    gc.freeze()  # what was imported stays: no child need search it for garbage, nor copy its pages in doing so


def _import_architecture(architecture: str) -> None:
    """Import the model's module here. vLLM would import it (and itself) in one more process, only to look at it."""
    from vllm.model_executor.models.registry import ModelRegistry

    registered = ModelRegistry.models.get(architecture)
    if registered is not None:
        ModelRegistry.register_model(architecture, registered.load_model_cls())


def use_fork() -> None:
    """Make vLLM fork its EngineCores and workers from the process that calls this."""
    context = _ForkContext()
    for name in _START_METHOD_MODULES:
        module: Any = importlib.import_module(name)
        if not hasattr(module, "get_mp_context"):
            raise RuntimeError(f"{name}.get_mp_context is gone: this vLLM release starts its processes in another way")
        module.get_mp_context = lambda: context


def bind_threads() -> None:
    """Give this worker the cores that vLLM chose for it (it puts them into the environment for libgomp to read)."""
    cores = [int(core) for core in os.environ.get("GOMP_CPU_AFFINITY", "").split()]
    if not cores:
        return
    import torch

    os.sched_setaffinity(0, cores)
    torch.set_num_threads(len(cores))


def _close_listening_sockets() -> None:
    """Let go of the api server's port: it must be free as soon as the api server is gone."""
    for descriptor in map(int, os.listdir("/proc/self/fd")):
        try:
            is_socket = stat.S_ISSOCK(os.fstat(descriptor).st_mode)
        except OSError:  # the descriptor of the listing itself
            continue
        if is_socket:
            with socket.socket(fileno=os.dup(descriptor)) as duplicate:
                if duplicate.family in (socket.AF_INET, socket.AF_INET6) and _is_for_listening(duplicate):
                    os.close(descriptor)


def _is_for_listening(internet_socket: socket.socket) -> bool:
    """It has a port and no peer: vLLM binds its socket early and listens late."""
    try:
        internet_socket.getpeername()
    except OSError:
        return internet_socket.type == socket.SOCK_STREAM and internet_socket.getsockname()[1] != 0
    return False


class _ForkProcess(multiprocessing.context.ForkProcess):
    """A forked EngineCore or worker."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._forking_pid = os.getpid()
        self._is_worker = self.name.startswith("VllmWorker")

    def run(self) -> None:
        die_with_parent(self._forking_pid)
        _close_listening_sockets()
        if self._is_worker:
            bind_threads()
        super().run()


class _ForkContext(multiprocessing.context.ForkContext):
    Process = functools.partial(_ForkProcess)  # type: ignore[assignment]

"""Who takes part: our proxy, vllm-router, nginx, and no proxy at all."""

import importlib.metadata
import sys
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.bench_proxy.processes import BenchmarkError, Process
from benchmarks.routers import nginx, nginx_command, vllm_router, vllm_router_command


@dataclass(frozen=True)
class Engines:
    """The two stand-ins on this host."""

    prefill_port: int
    decode_port: int
    processes: tuple[Process, ...]

    def check(self) -> None:
        """Raises BenchmarkError if one has ended."""
        for process in self.processes:
            if not process.is_running():
                raise BenchmarkError(f"a stand-in engine has died: {process.log_tail()}")

    @property
    def prefill_url(self) -> str:
        return f"http://127.0.0.1:{self.prefill_port}"

    @property
    def decode_url(self) -> str:
        return f"http://127.0.0.1:{self.decode_port}"


class Subject(ABC):
    """One way from a client to the engines."""

    name: str
    disaggregates = True  # asks P, then D

    def missing(self) -> str | None:
        """What it cannot run without and how to get it; None if all is there."""
        return None

    @abstractmethod
    def version(self) -> str: ...

    @abstractmethod
    def command(self, port: int, engines: Engines, folder: Path) -> list[str] | None:
        """How it is started so that it listens on `port`; None: there is nothing to start."""


class Ours(Subject):
    name = "ours"

    def __init__(self, arguments: Sequence[str] = ()) -> None:
        self._arguments = arguments

    def version(self) -> str:
        return importlib.metadata.version("omni_infer")

    def command(self, port: int, engines: Engines, folder: Path) -> list[str]:
        command = [sys.executable, "-m", "services.global_proxy", "--port", str(port), "--connector", "nixl"]
        return [*command, "--prefill", engines.prefill_url, "--decode", engines.decode_url, *self._arguments]


class VllmRouter(Subject):
    """At its fastest: by turns, without a log. Ours keeps its default policies and logs every request."""

    name = "vllm-router"
    at_its_fastest = True

    def missing(self) -> str | None:
        return None if vllm_router() else "its Python package is not installed: make install"

    def version(self) -> str:
        return importlib.metadata.version("vllm-router")

    def command(self, port: int, engines: Engines, folder: Path) -> list[str]:
        return vllm_router_command(port, engines.prefill_url, engines.decode_url, at_its_fastest=self.at_its_fastest)


class VllmRouterAsItIs(VllmRouter):
    """With its defaults."""

    name = "router-as-is"
    at_its_fastest = False


class Nginx(Subject):
    """A plain reverse proxy to D, with one worker: what relaying alone costs."""

    name = "nginx"
    disaggregates = False

    def missing(self) -> str | None:
        return None if nginx() else "nginx is not installed: make system-deps"

    def version(self) -> str:
        return "Debian's nginx"

    def command(self, port: int, engines: Engines, folder: Path) -> list[str]:
        return nginx_command(port, [engines.decode_port], folder)


class Direct(Subject):
    """D itself: the most that engines and load generator can do on their cores."""

    name = "direct"
    disaggregates = False

    def version(self) -> str:
        return "the stand-in engine"

    def command(self, port: int, engines: Engines, folder: Path) -> None:
        return None

"""The actors: each runs one program on its node, and Ray starts it again wherever it is lost.

Their programs die with them, even by SIGKILL, so that a new actor of the same name finds the node free. What Ray has
given to an actor (devices, cores of its bundle) is passed on to the program.
"""

import sys
import time
from dataclasses import asdict, replace
from functools import partial
from typing import Any, Final
from urllib.request import ProxyHandler, build_opener

import ray

from omni.deployment.backends.ray.claims import Claims
from omni.deployment.backends.ray.node_files import NodeFolder, group_ports, with_devices
from omni.deployment.backends.ray.program import Program, Start
from omni.deployment.backends.ray.setup import EngineSetup, Meeting, ProxySetup
from omni.deployment.run_state import ProcessState

STOP_TIMEOUT_S: Final = 30.0  # for an instance to leave its proxies and its requests to end
_MASTER_TIMEOUT_S: Final = 60.0
_PROBE_TIMEOUT_S: Final = 2.0

_opener = build_opener(ProxyHandler({}))  # $http_proxy is not asked for a neighbour on the same node


class _Actor:
    """What both have in common: a folder on the node and the program in it."""

    def __init__(self, setup: EngineSetup | ProxySetup) -> None:
        self._address: str = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
        self._folder = NodeFolder.of(setup.namespace, setup.actor_name)
        self._num_lives_before = self._folder.make(setup.key)
        self._program = Program(self._start, self._folder.logs / f"{setup.actor_name}.log")

    def _start(self) -> Start:
        raise NotImplementedError

    def states(self) -> list[dict[str, Any]]:
        """A ProcessState for each process, as a dictionary."""
        raise NotImplementedError

    def num_failures(self) -> int:
        """How often the program ended by itself, in a row; 1 for one that cannot run as written."""
        return self._program.num_failures + self._program.has_failed

    def logs(self) -> dict[str, bytes]:
        return self._folder.read_logs()

    def restart(self) -> None:
        self._program.restart(STOP_TIMEOUT_S)

    def stop(self) -> None:
        """End the program and take what is here off the node; the actor itself is then killed."""
        self._program.stop(STOP_TIMEOUT_S)
        self._folder.remove()

    def _environment(self) -> dict[str, str]:
        return {
            "OMNI_STATE_DIR": str(self._folder.state),
            "RAY_ADDRESS": ray.get_runtime_context().gcs_address,  # for vLLM's ray executor
            "RAY_USAGE_STATS_ENABLED": "0",
        }

    def _present(self, state: ProcessState) -> ProcessState:
        """What is true of a process as long as its program does not run; and how often it began anew with it."""
        program = self._program
        num_restarts = state.restarts + self._num_lives_before + program.num_restarts
        state = replace(state, host=self._address, restarts=num_restarts)
        if program.pid is not None:
            return state
        kind = "failed" if program.has_failed else "restarting" if program.message else "starting"
        return state.changed(state=kind, pid=None, message=program.message)


class EngineActor(_Actor):
    """Runs one node of a group: `python -m services.prefill`, `.decode` or `.mixed`."""

    def __init__(self, setup: EngineSetup) -> None:
        super().__init__(setup)
        self._setup = setup
        self._claims = Claims()
        self._cores = self._claims.cores(setup.num_cores) if setup.num_cores else ()
        self._base_api_port = 0  # of a further node: its master's
        if setup.master is None:
            ports = partial(group_ports, num_ranks=setup.num_ranks)
            self._base_api_port = self._claims.ports(setup.first_api_port, ports)
        self._devices = _devices()
        self._program.start()

    def meeting(self) -> Meeting:
        """For the instance's further nodes. Only the first one is asked."""
        return Meeting(address=self._address, base_api_port=self._base_api_port)

    def endpoints(self) -> list[str]:
        """HOST:PORT of each api server here."""
        return [f"{self._address}:{self._base_api_port + index}" for index in range(self._setup.num_ranks)]

    def states(self) -> list[dict[str, Any]]:
        found = self._folder.process_states()
        names = self._setup.process_names
        states = (found.get(name, ProcessState(name=name)) for name in names)
        return [asdict(self._present(state)) for state in states]

    def _start(self) -> Start:
        setup = self._setup
        meeting = self._meeting()
        self._base_api_port = meeting.base_api_port
        self._folder.forget_processes()
        self._folder.write_config(with_devices(setup.config, setup.role, setup.group, self._devices))
        command = engine_command(setup, str(self._folder.config_file), self._address, meeting)
        return Start((sys.executable, *command), self._environment(), self._cores)

    def _meeting(self) -> Meeting:
        """Asked before each start: the master's actor may have moved."""
        if self._setup.master is None:
            return self.meeting()
        master = ray.get_actor(self._setup.master, namespace=self._setup.namespace)
        answer: Any = master.meeting.remote()
        meeting: Meeting = ray.get(answer, timeout=_MASTER_TIMEOUT_S)
        return meeting


class ProxyActor(_Actor):
    """Runs the proxy. It has no instances of its own: they join it."""

    def __init__(self, setup: ProxySetup) -> None:
        super().__init__(setup)
        self._setup = setup
        self._state = ProcessState(name=setup.actor_name, since_unix_s=time.time())
        self._program.start()

    def states(self) -> list[dict[str, Any]]:
        pid = self._program.pid
        kind = "ready" if pid is not None and self._is_up() else "starting"
        self._state = self._state.changed(state=kind, pid=pid)
        return [asdict(self._present(self._state))]

    def _start(self) -> Start:
        paths = []
        for index, text in enumerate(self._setup.secret_files):
            path = self._folder.path / f"file{index}"
            self._folder.write_secret(path, text)
            paths.append(str(path))
        command = proxy_command(self._setup, paths)
        return Start((sys.executable, *command), {**self._setup.env, **self._environment()})

    def _is_up(self) -> bool:
        url = f"http://127.0.0.1:{self._setup.port}/live"
        if self._setup.is_tls:  # its certificate is for another name
            return self._program.pid is not None
        try:
            with _opener.open(url, timeout=_PROBE_TIMEOUT_S) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False


def engine_command(setup: EngineSetup, config_file: str, address: str, meeting: Meeting) -> tuple[str, ...]:
    """What follows the interpreter."""
    command = ["-m", f"services.{setup.role}", "--config", config_file, "--group", setup.group, "--listen", address]
    command += ["--base-api-port", str(meeting.base_api_port)]
    for proxy in setup.join:
        command += ["--join", proxy]
    if setup.is_spread:
        command += ["--node", str(setup.node), "--master", meeting.address]
    return tuple(command)


def proxy_command(setup: ProxySetup, secret_paths: list[str]) -> tuple[str, ...]:
    """What follows the interpreter."""
    places = {f"{{{index}}}": path for index, path in enumerate(secret_paths)}
    return ("-m", "services.global_proxy", *(places.get(part, part) for part in setup.arguments))


def _devices() -> tuple[int, ...]:
    """Those that Ray has given to this actor, by the numbers that the node has for them."""
    given = ray.get_runtime_context().get_accelerator_ids()
    return tuple(int(device) for kind in ("NPU", "GPU") for device in given.get(kind, ()))

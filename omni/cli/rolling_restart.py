"""Engines restarted one after another: out of the proxy, restarted, back in."""

import os
import signal
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import urlsplit

from omni.cli import running
from omni.deployment.admin_client import AdminClient
from omni.deployment.backends import Say, remote_backend
from omni.deployment.backends.local import ENGINE_HOST
from omni.deployment.engines_file import Engines
from omni.deployment.errors import DeploymentError
from omni.deployment.restart_request import ask_for_restart
from omni.deployment.run_state import DeploymentState, ProcessState, RunFolder

_POLL_S: Final = 0.2
_JOIN_S: Final = 5.0  # then an instance whose agent has not joined is added
_UP_TIMEOUT_S: Final = 60.0
_TOGETHER: Final = "--data-parallel-size"  # of ranks that compute each step together

Instance = Mapping[str, Any]  # as the admin API has it


@dataclass(frozen=True, kw_only=True)
class Unit:
    """What is restarted at once.

    Attributes:
        instances: HOST:PORT of each api server in it, where that is known.
    """

    role: str
    names: tuple[str, ...]
    instances: tuple[str, ...]


def units_of(names: Iterable[str], engines: Engines) -> list[Unit]:
    """Units with these processes, and with those that cannot go on without them."""
    units: list[Unit] = []
    for name in names:
        if any(name in unit.names for unit in units):
            continue
        engine = next((engine for engine in engines if engine.name == name), None)
        if engine is None:  # of a backend that plans anew where it runs
            units.append(Unit(role=name.partition(".")[0], names=(name,), instances=()))
            continue
        is_coupled = _TOGETHER in engine.command
        same = [
            other
            for other in engines
            if (other.role, other.group) == (engine.role, engine.group)
            and (is_coupled or other.dp_rank == engine.dp_rank)  # a rank's other nodes, where it has some
        ]
        # A further node's api server runs elsewhere: its requests are those that this node works for.
        addresses = dict.fromkeys(urlsplit(other.leader_url or other.url).netloc.lower() for other in same)
        units.append(Unit(role=engine.role, names=tuple(other.name for other in same), instances=tuple(addresses)))
    return units


class RollingRestart:
    """Args:
    client: None: nothing can be drained.
    wait_s: for the requests of an engine to finish.
    start_timeout_s: for a process to be ready again.
    by_force: an engine that has requests after `wait_s` is restarted all the same.
    """

    def __init__(
        self,
        deployment: DeploymentState,
        client: AdminClient | None,
        say: Say,
        wait_s: float,
        start_timeout_s: float,
        *,
        by_force: bool = False,
    ) -> None:
        self._deployment = deployment
        self._folder = RunFolder.of(deployment.name)
        self._client = client
        self._say = say
        self._wait_s = wait_s
        self._start_timeout_s = start_timeout_s
        self._by_force = by_force

    def without_a_substitute(self, units: Sequence[Unit]) -> list[Unit]:
        """Units whose requests nobody else can take while they are away."""
        instances = self._instances()
        return [unit for unit in units if instances and not _has_substitute(unit, instances)]

    def restart(self, unit: Unit) -> None:
        """Raises DeploymentError: it is busy, and goes on as before; or it does not come back."""
        before = [instance for instance in self._instances() or () if instance["name"] in unit.instances]
        began_s = time.monotonic()
        self._take_out(before)
        try:
            self._restart_processes(unit.names)
        except DeploymentError as error:
            raise DeploymentError(f"{error}{self._put_back(before) if self._is_ready(unit.names) else ''}") from None
        self._wait_until_in(before, before)
        self._say(f"{', '.join(unit.names)} restarted after {time.monotonic() - began_s:.1f} s")

    def restart_proxy(self) -> None:
        """Requests in flight have some seconds to finish; new connections are refused until it listens again.

        Raises:
            DeploymentError: it does not come back, or not all instances do.
        """
        before = [instance for instance in self._instances() or () if instance["state"] == "active"]
        began_s = time.monotonic()
        self._say("proxy restarts; connections are refused meanwhile")
        self._restart_processes(("proxy",))
        self._wait_until_in(before, [one for one in before if one["source"] == "admin"])
        self._say(f"proxy restarted after {time.monotonic() - began_s:.1f} s")

    def _instances(self) -> list[dict[str, Any]] | None:
        """None: the proxy cannot be asked."""
        return self._client.instances() if self._client is not None else None

    # --- out of the proxy, and back

    def _take_out(self, instances: Sequence[Instance]) -> None:
        """Drained, without a request, and forgotten by the proxy; all of them, or none."""
        client = self._client
        if client is None:  # then nobody knows of instances
            return
        try:
            for instance in instances:
                client.drain(instance["name"])
            for instance in instances:
                self._say(f"{instance['name']} drains")
                client.remove(instance["name"], self._wait_s, by_force=self._by_force)
        except BaseException as error:
            undone = self._put_back(instances)
            if isinstance(error, DeploymentError):
                raise DeploymentError(f"{error} (--wait-s, --force){undone}") from None
            raise

    def _put_back(self, instances: Iterable[Instance]) -> str:
        """Returns what to tell about it."""
        for instance in instances:
            try:
                _add(self._client, instance)
            except DeploymentError as error:
                url, role = instance["url"], instance["role"]
                return f"\n{url} gets no requests now ({error}): `omni_cli scale add {role} {url}`"
        return "; it gets requests as before" if instances else ""

    def _wait_until_in(self, instances: Sequence[Instance], may_be_added: Sequence[Instance]) -> None:
        """Until the proxy gives them requests again: their agents join, or else they are added."""
        began_s = time.monotonic()
        added: set[str] = set()
        while instances:
            now = {instance["name"]: instance for instance in self._instances() or ()}
            if self._client is None:
                return
            late_s = time.monotonic() - began_s
            missing = [one for one in instances if not _serves(now.get(one["name"]))]
            if not missing:
                return
            if late_s > _UP_TIMEOUT_S:
                names = ", ".join(one["name"] for one in missing)
                raise DeploymentError(f"{names}: the proxy does not give it requests after {_UP_TIMEOUT_S:g} s")
            for one in may_be_added:
                if late_s > _JOIN_S and one["name"] not in now and one["name"] not in added:
                    added.add(one["name"])
                    _add(self._client, one)
            time.sleep(_POLL_S)

    # --- the processes

    def _restart_processes(self, names: Sequence[str]) -> None:
        """Returns when all are ready. Raises DeploymentError."""
        if self._deployment.backend != "local":
            remote_backend(self._deployment.backend).restart(self._deployment, names, self._say)
            self._wait(lambda states: all(states[name].state == "ready" for name in names))
            return
        before = self._folder.processes()
        supervisor = self._supervisor_of(names, before)
        for name in names:
            ask_for_restart(self._folder, name)
        os.kill(supervisor, signal.SIGUSR1)
        self._wait(lambda states: all(_is_back(before.get(name), states[name]) for name in names))

    def _supervisor_of(self, names: Sequence[str], states: Mapping[str, ProcessState]) -> int:
        """Its pid: the proxy's is the launcher, the engines' the engine host."""
        if names == ("proxy",):
            return self._deployment.launcher_pid
        host = states.get(ENGINE_HOST)
        if host is None or host.pid is None:
            raise DeploymentError("the engine host does not run just now; it starts every engine when it is back")
        return host.pid

    def _wait(self, is_done: Callable[[Mapping[str, ProcessState]], bool]) -> None:
        deadline_s = time.monotonic() + self._start_timeout_s
        while not is_done({state.name: state for state in running.process_states(self._deployment)}):
            if time.monotonic() > deadline_s:
                raise DeploymentError(f"it is not ready after {self._start_timeout_s:g} s: see `omni_cli status`")
            if not self._deployment.is_running:
                raise DeploymentError(f"{self._deployment.name} has ended meanwhile")
            time.sleep(_POLL_S)

    def _is_ready(self, names: Sequence[str]) -> bool:
        states = {state.name: state.state for state in running.process_states(self._deployment)}
        return all(states.get(name) == "ready" for name in names)


def _has_substitute(unit: Unit, instances: Iterable[Instance]) -> bool:
    return any(
        instance["name"] not in unit.instances and instance["role"] in (unit.role, "mixed") and _serves(instance)
        for instance in instances
    )


def _serves(instance: Instance | None) -> bool:
    return instance is not None and instance["state"] == "active" and bool(instance["is_up"])


def _add(client: AdminClient | None, instance: Instance) -> None:
    """As it was."""
    if client is not None:
        addresses = {key: instance[key] for key in ("kv_address", "bootstrap_url", "kv_events") if instance.get(key)}
        client.add(instance["role"], instance["url"], **addresses)


def _is_back(before: ProcessState | None, now: ProcessState) -> bool:
    """Raises DeploymentError: it has ended since it was started again."""
    earlier = before or ProcessState(name=now.name)
    if now.restarts > earlier.restarts + (now.state != "failed"):
        message = f": {now.message}" if now.message else ""
        raise DeploymentError(f"{now.name} does not start again{message}: see `omni_cli logs {now.name}`")
    return now.state == "ready" and now.pid != earlier.pid

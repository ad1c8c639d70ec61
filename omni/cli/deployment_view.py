"""What `omni_cli status` shows of a running deployment: its supervisors' states beside what its proxy says."""

import re
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from omni.cli import running
from omni.cli.completion_proof import Completion
from omni.deployment.engines_file import Engines, read_engines
from omni.deployment.errors import DeploymentError
from omni.deployment.load import load_plan
from omni.deployment.proxy_access import ProxyAccess
from omni.deployment.run_state import DeploymentState, ProcessState, RunFolder

_NAME = re.compile(r"(?P<role>\w+)\.(?P<group>\w+)\.rank(?P<rank>\d+)(?:\.node(?P<node>\d+))?")


@dataclass(frozen=True, kw_only=True)
class ProcessView:
    """One process. Empty or None is what is not known, or what it has not."""

    state: ProcessState
    role: str
    group: str
    rank: int | None
    node: int | None
    host: str
    port: int | None
    instance: Mapping[str, Any] | None = None  # of the proxy, as its admin API has it

    @property
    def uptime_s(self) -> float | None:
        """Since it was ready."""
        if self.state.state != "ready" or not self.state.since_unix_s:
            return None
        return max(time.time() - self.state.since_unix_s, 0.0)

    def as_dict(self) -> dict[str, Any]:
        uptime_s = self.uptime_s
        return asdict(self.state) | {
            "role": self.role,
            "group": self.group,
            "rank": self.rank,
            "node": self.node,
            "host": self.host,
            "port": self.port,
            "uptime_s": None if uptime_s is None else round(uptime_s, 1),
        }


@dataclass(frozen=True, kw_only=True)
class DeploymentView:
    """A deployment at one moment.

    Attributes:
        proxy: its admin API's state: instances, requests in flight and queued; None: it did not tell.
        proxy_problem: why not.
    """

    deployment: DeploymentState
    processes: tuple[ProcessView, ...]
    proxy: Mapping[str, Any] | None = None
    proxy_problem: str | None = None

    @property
    def is_ready(self) -> bool:
        return all(process.state.state == "ready" for process in self.processes)

    @property
    def strangers(self) -> list[Mapping[str, Any]]:
        """The proxy's instances that are none of the processes: started by others, and added or joined."""
        known = {process.instance["name"] for process in self.processes if process.instance is not None}
        return [instance for instance in _instances(self.proxy) if instance["name"] not in known]

    def as_dict(self, completion: Completion | None) -> dict[str, Any]:
        """For programs. A key that is here stays."""
        return {
            "deployment": asdict(self.deployment),
            "processes": [process.as_dict() for process in self.processes],
            "instances": None if self.proxy is None else _instances(self.proxy),
            "num_in_flight": None if self.proxy is None else self.proxy.get("num_in_flight"),
            "num_queued": None if self.proxy is None else self.proxy.get("num_queued"),
            "proxy_problem": self.proxy_problem,
            "completion": None if completion is None else asdict(completion),
        }


class Viewer:
    """Looks at one deployment, as often as is wanted. What its file and plan say is read once.

    Args:
        access: None: its deployment file cannot be read, for the reason `access_problem`.
    """

    def __init__(
        self, deployment: DeploymentState, access: ProxyAccess | None, access_problem: str | None = None
    ) -> None:
        self._deployment = deployment
        self._access = access
        self._access_problem = access_problem
        self._planned: tuple[tuple[str, ...], Engines] | None = None  # for these processes

    def look(self) -> DeploymentView:
        """Raises DeploymentError: it has ended, or its hosts cannot be asked."""
        deployment = RunFolder.of(self._deployment.name).deployment()
        if deployment is None or not deployment.is_running:
            raise DeploymentError(f"{self._deployment.name} has ended")
        states = running.process_states(deployment)
        proxy, problem = self._ask_proxy()
        addresses = self._addresses(deployment)
        instances = {instance["name"]: instance for instance in _instances(proxy)}
        return DeploymentView(
            deployment=deployment,
            processes=tuple(_process_view(state, addresses.get(state.name), instances) for state in states),
            proxy=proxy,
            proxy_problem=problem,
        )

    def _ask_proxy(self) -> tuple[Mapping[str, Any] | None, str | None]:
        if self._access is None:
            return None, self._access_problem
        try:
            return self._access.admin_client().state(), None
        except DeploymentError as error:
            return None, str(error)

    def _addresses(self, deployment: DeploymentState) -> dict[str, tuple[str, int | None]]:
        """Where each process listens, by its name."""
        if self._planned is None or self._planned[0] != deployment.process_names:
            self._planned = deployment.process_names, engine_plans(deployment)
        addresses: dict[str, tuple[str, int | None]] = {e.name: (e.host, e.port or None) for e in self._planned[1]}
        proxy = urlsplit(deployment.proxy_url)
        return addresses | {"proxy": (proxy.hostname or "", proxy.port)}


def engine_plans(deployment: DeploymentState) -> Engines:
    """The engines as they run: after `omni_cli scale`, else those of the deployment file; none if it is unreadable."""
    engines = read_engines(RunFolder.of(deployment.name))
    if engines is not None:
        return engines
    try:
        return load_plan(Path(deployment.config_file)).engines
    except (DeploymentError, OSError):  # it was changed or removed since
        return ()


def _process_view(
    state: ProcessState, address: tuple[str, int | None] | None, instances: Mapping[str, Mapping[str, Any]]
) -> ProcessView:
    match = _NAME.fullmatch(state.name)
    host, port = address or ("", None)
    return ProcessView(
        state=state,
        role=match["role"] if match else state.name,
        group=match["group"] if match else "",
        rank=int(match["rank"]) if match else None,
        node=int(match["node"]) if match and match["node"] else None,
        host=state.host or host,
        port=port,
        instance=instances.get(f"{host}:{port}".lower()),
    )


def _instances(proxy: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    return list(proxy.get("instances") or ()) if proxy is not None else []

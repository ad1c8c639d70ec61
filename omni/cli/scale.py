"""`omni_cli scale`: see, add, drain and remove instances of a running deployment, with no failed request.

`omni_cli scale prefill=3 decode=2` starts and stops engines, here or where the backend has them. The other commands
speak to the proxy alone: the instances may run anywhere.
"""

import json
import os
import signal
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Final, cast, get_args

import typer
from rich.table import Table
from typer.core import TyperGroup

from kv_transfer.auth import default_key_path, load_key
from omni.cli import running
from omni.cli.clear_errors import clear_errors
from omni.cli.plain_console import plain_console
from omni.deployment.admin_client import AdminClient
from omni.deployment.backends import remote_backend
from omni.deployment.backends.local import ENGINE_HOST
from omni.deployment.deployment_file import load_deployment
from omni.deployment.engines_file import Engines, read_engines, write_engines
from omni.deployment.errors import DeploymentError
from omni.deployment.groups import Pool
from omni.deployment.line_numbers import naming_lines
from omni.deployment.model import KvTransfer
from omni.deployment.plan_types import ProcessPlan
from omni.deployment.proxy_access import ProxyAccess
from omni.deployment.run_state import DeploymentState, ProcessState, RunFolder
from omni.deployment.scaling import scale_engines

_POLL_S: Final = 0.2
_START_TIMEOUT_S: Final = 1800.0
_STOP_TIMEOUT_S: Final = 60.0
_JOIN_S: Final = 3.0

console = plain_console()


class _Scale(TyperGroup):
    """`scale prefill=3` is short for `scale to prefill=3`."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if args and "=" in args[0] and not args[0].startswith("-"):
            args = ["to", *args]
        return super().resolve_command(ctx, args)


app = typer.Typer(cls=_Scale, no_args_is_help=True, help=__doc__)

DeploymentName = Annotated[str | None, typer.Option("--deployment", help="not needed while only one runs")]
ProxyUrl = Annotated[str | None, typer.Option("--url", help="the proxy's, if it was not started by omni_cli here")]
KeyFile = Annotated[Path | None, typer.Option("--key-file", help="with --url: the deployment key")]
AsJson = Annotated[bool, typer.Option("--json", help="print JSON")]
InstanceName = Annotated[str, typer.Argument(help="HOST:PORT, as `omni_cli scale list` shows it")]
WaitS = Annotated[float, typer.Option("--wait-s", min=0, max=3600, help="for an instance's requests to finish")]
Force = Annotated[bool, typer.Option("--force", help="remove it after that time even if it has requests")]


@app.command("list")
@clear_errors
def list_instances(
    name: DeploymentName = None, url: ProxyUrl = None, key_file: KeyFile = None, as_json: AsJson = False
) -> None:
    """Show the proxy's instances with their load."""
    instances = _client(name, url, key_file).instances()
    if as_json:
        print(json.dumps(instances, indent=2))
        return
    table = Table()
    for column in ("role", "instance", "state", "from", "req.", "run", "wait", "KV used"):
        table.add_column(column, no_wrap=column == "instance")
    for instance in instances:
        report = instance["report"] or {}
        kv = f"{report['kv_used_tokens'] / report['kv_total_tokens']:.0%}" if report.get("kv_total_tokens") else ""
        state = instance["state"] if instance["is_up"] else f"{instance['state']}, down"
        load = (str(report.get(field, "")) for field in ("num_running", "num_waiting"))
        table.add_row(
            instance["role"], instance["name"], state, instance["source"], str(instance["num_requests"]), *load, kv
        )
    console.print(table)


@app.command()
@clear_errors
def add(
    role: Annotated[str, typer.Argument(help="prefill, decode or mixed")],
    instance_url: Annotated[str, typer.Argument(metavar="URL", help="http://HOST:PORT of its api server")],
    kv_address: Annotated[str | None, typer.Option(help="HOST:PORT; layer-wise prefill")] = None,
    bootstrap_url: Annotated[str | None, typer.Option(help="Mooncake prefill")] = None,
    name: DeploymentName = None,
    url: ProxyUrl = None,
    key_file: KeyFile = None,
) -> None:
    """Give requests to an instance that runs already, or again to one that was drained."""
    _client(name, url, key_file).add(role, instance_url, kv_address, bootstrap_url)
    console.print(f"{instance_url} is a {role} instance")


@app.command()
@clear_errors
def drain(instance: InstanceName, name: DeploymentName = None, url: ProxyUrl = None, key_file: KeyFile = None) -> None:
    """Give an instance nothing new; what it has goes on."""
    status = _client(name, url, key_file).drain(instance)
    console.print(f"{instance} drains; it has {status['num_requests']} requests")


@app.command()
@clear_errors
def remove(
    instance: InstanceName,
    wait_s: WaitS = 60.0,
    force: Force = False,
    name: DeploymentName = None,
    url: ProxyUrl = None,
    key_file: KeyFile = None,
) -> None:
    """Drain an instance, wait until it has no requests, and have the proxy forget it. Its process goes on."""
    _client(name, url, key_file).remove(instance, wait_s, by_force=force)
    console.print(f"{instance} is removed")


@app.command()
@clear_errors
def to(
    counts: Annotated[list[str], typer.Argument(metavar="ROLE=N...", help="for example prefill=3 decode=2")],
    wait_s: WaitS = 60.0,
    force: Force = False,
    name: DeploymentName = None,
) -> None:
    """Start or stop engines until there are so many groups of a role."""
    num_groups = parse_counts(counts)
    deployment = running.find(name)
    if deployment.backend != "local":
        with naming_lines(Path(deployment.config_file)):
            remote_backend(deployment.backend).scale(deployment, num_groups, wait_s, _say)
        return
    _LocalScaling.of(deployment).scale(num_groups, wait_s=wait_s, by_force=force)


def _say(text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def parse_counts(counts: Collection[str]) -> dict[Pool, int]:
    """`["prefill=3"]` → `{"prefill": 3}`. Raises DeploymentError."""
    num_groups: dict[Pool, int] = {}
    for word in counts:
        role, _, number = word.partition("=")
        if role not in get_args(Pool) or not number.isdecimal() or role in num_groups:
            raise DeploymentError(
                f"{word!r}: write each of prefill=N, decode=N and mixed=N at most once, N a whole number"
            )
        num_groups[cast(Pool, role)] = int(number)
    return num_groups


def _client(name: str | None, url: str | None, key_file: Path | None) -> AdminClient:
    if url is None:
        if key_file is not None:
            raise DeploymentError("--key-file: goes with --url; a deployment's own file names its key")
        return _client_of(running.find(name))
    return _client_at(url, key_file)


def _client_of(deployment: DeploymentState) -> AdminClient:
    return ProxyAccess.of(deployment).admin_client()


def _kv_transfer(deployment: DeploymentState) -> KvTransfer:
    return load_deployment(Path(deployment.config_file)).services.kv_transfer


def _client_at(url: str, key_file: Path | None) -> AdminClient:
    try:
        return AdminClient(url, load_key(key_file or default_key_path()))
    except ValueError as error:
        raise DeploymentError(str(error)) from None


@dataclass(frozen=True)
class _LocalScaling:
    """One running deployment, its engine host and its proxy."""

    deployment: DeploymentState
    folder: RunFolder
    client: AdminClient

    @classmethod
    def of(cls, deployment: DeploymentState) -> "_LocalScaling":
        return cls(deployment, RunFolder.of(deployment.name), _client_of(deployment))

    def scale(self, num_groups: Mapping[Pool, int], *, wait_s: float, by_force: bool) -> None:
        """New engines first, so that there is always somebody to take requests. Raises DeploymentError."""
        present = read_engines(self.folder)
        if present is None:
            raise DeploymentError(f"{self.deployment.name} is not up yet: ask again when `omni_cli status` says ready")
        wanted = scale_engines(Path(self.deployment.config_file), present, num_groups)
        new = tuple(engine for engine in wanted if engine not in present)
        gone = tuple(engine for engine in present if engine not in wanted)
        if new:
            self._start(present, new)
        for engine in gone:
            console.print(f"{engine.name} drains")
            self.client.remove(_instance_name(engine), wait_s, by_force=by_force)
        if gone:
            self._apply(wanted)
            self._wait(lambda states: not {engine.name for engine in gone} & states.keys(), _STOP_TIMEOUT_S)
        console.print(f"{len(new)} started, {len(gone)} stopped")

    def _start(self, present: Engines, new: Engines) -> None:
        self._apply((*present, *new))
        names = {engine.name for engine in new}
        console.print(f"{', '.join(sorted(names))} start; the log is in {self.deployment.log_folder}")
        try:
            self._wait(lambda states: all(_is_ready(states.get(name)) for name in names), _START_TIMEOUT_S)
            for engine in self._not_joined(new):
                self.client.add(engine.role, engine.url, **_kv_addresses(engine, _kv_transfer(self.deployment)))
        except BaseException:
            self._apply(present)  # none of them, rather than some that nobody knows
            raise

    def _not_joined(self, engines: Engines) -> Engines:
        """Those whose agents, if they have any, have not joined the proxy after some seconds."""
        deadline_s = time.monotonic() + _JOIN_S
        while True:
            known = {instance["name"] for instance in self.client.instances()}
            missing = tuple(engine for engine in engines if _instance_name(engine) not in known)
            if not missing or time.monotonic() > deadline_s:
                return missing
            time.sleep(_POLL_S)

    def _apply(self, engines: Engines) -> None:
        write_engines(self.folder, engines)
        names = (*(engine.name for engine in engines), self.deployment.process_names[-1])
        self.folder.write_deployment(replace(self.deployment, process_names=names))
        host = self.folder.processes().get(ENGINE_HOST)
        if host is None or host.pid is None:
            raise DeploymentError("the engine host does not run just now: it reads what there shall be when it is back")
        os.kill(host.pid, signal.SIGUSR1)

    def _wait(self, is_done: Callable[[Mapping[str, ProcessState]], bool], timeout_s: float) -> None:
        deadline_s = time.monotonic() + timeout_s
        while not is_done(self.folder.processes()):
            if time.monotonic() > deadline_s:
                raise DeploymentError(f"it took more than {timeout_s:g} s: see `omni_cli status`")
            if not self.deployment.is_running:
                raise DeploymentError(f"{self.deployment.name} has ended meanwhile")
            time.sleep(_POLL_S)


def _is_ready(state: ProcessState | None) -> bool:
    if state is not None and state.state == "failed":
        raise DeploymentError(f"{state.name} {state.message}: see `omni_cli logs {state.name}`")
    return state is not None and state.state == "ready"


def _instance_name(engine: ProcessPlan) -> str:
    return f"{engine.host}:{engine.port}".lower()


def _kv_addresses(engine: ProcessPlan, kv_transfer: KvTransfer) -> dict[str, str]:
    """What the proxy must know to drive the connector, beyond the URL."""
    if engine.role != "prefill" or engine.kv_address is None:
        return {}
    if kv_transfer.connector == "mooncake":
        return {"bootstrap_url": f"http://{engine.kv_address}"}
    return {"kv_address": engine.kv_address} if kv_transfer.mode == "layerwise" else {}

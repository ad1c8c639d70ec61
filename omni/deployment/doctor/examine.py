"""Every check that makes sense for a machine, or for a deployment file on this machine, in a fixed order."""

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from kv_transfer.auth import default_key_path, load_key, load_or_make_key
from omni.deployment.checks import check_machine
from omni.deployment.deployment_file import load_deployment
from omni.deployment.doctor import host, network
from omni.deployment.doctor.controller import controller_findings
from omni.deployment.doctor.devices import gpu_findings, npu_findings
from omni.deployment.doctor.finding import Area, Finding, of_problems, ok, problem
from omni.deployment.doctor.model_folder import model_findings
from omni.deployment.doctor.tool import find_tool
from omni.deployment.doctor.versions import engine_build, version_findings
from omni.deployment.errors import ConfigError, DeploymentError, Problem
from omni.deployment.groups import GroupSettings, group_settings
from omni.deployment.load import load_plan
from omni.deployment.machine import Machine, this_machine
from omni.deployment.memory import GIB
from omni.deployment.model import EMBEDDED, Backend, Deployment, Platform
from omni.deployment.plan_types import LaunchPlan
from omni.deployment.run_state import running_deployments

_BACKEND_EXTRAS: dict[Backend, tuple[str, ...]] = {
    "local": (),
    "ansible": ("ansible",),
    "ray": ("ray",),
    "kubernetes": (),
}
# A part of a problem's field, and the area it belongs to.
_AREAS: tuple[tuple[str, Area], ...] = (
    ("model_path", "model"),
    ("key_file", "key"),
    ("port", "network"),
    ("host", "network"),
    ("environment variable", "host"),
)


def examine_machine() -> Iterator[Finding]:
    """Without a deployment file: could anything be served here?"""
    machine, platform = this_machine(), _platform_here()
    yield from host.host_findings(machine, engines_on_cpu=platform == "cpu")
    yield host.memory(machine)
    yield host.disk(Path("logs").absolute())
    yield from npu_findings((), is_needed=platform == "npu")
    yield from gpu_findings(0, is_needed=platform == "cuda")
    yield from network.addresses(machine, ())
    yield from version_findings((platform,))
    yield deployment_key(None)


def examine_deployment(config_file: Path, on: str | None) -> Iterator[Finding]:
    """A deployment file on this machine, which is `on`, all of its hosts (backend local) or none of them.

    Raises:
        ConfigError: the file cannot be used, or this machine is not `on`.
    """
    deployment, machine = load_deployment(config_file), this_machine()
    hosts = _hosts(deployment)
    if on is not None and (on not in hosts or not machine.is_host(on)):
        wrong = "is not this machine" if on in hosts else f"is not in {config_file}, which has {', '.join(hosts)}"
        raise DeploymentError(f"--on: {on} {wrong}; name the address in the file that is this machine's")
    if on is None and deployment.backend != "local":
        yield from _as_controller(config_file, deployment, machine, hosts)
    else:
        here = tuple(h for h in hosts if on in (None, h))
        yield from _as_host(_Here(config_file, deployment, machine, here, on))


@dataclass(frozen=True)
class _Here:
    """A deployment, and the hosts of its file that are this machine."""

    config_file: Path
    deployment: Deployment
    machine: Machine
    hosts: tuple[str, ...]
    on: str | None

    @property
    def engine_groups(self) -> list[GroupSettings]:
        return [group for group in group_settings(self.deployment) if set(group.hosts) & set(self.hosts)]

    @property
    def has_proxy(self) -> bool:
        return self.deployment.deployment.proxy.host in self.hosts

    @property
    def devices(self) -> tuple[int, ...]:
        numbers = {d for group in self.engine_groups for h in self.hosts if h in group.hosts for d in group.devices(h)}
        return tuple(sorted(numbers))

    @property
    def num_workers(self) -> int:
        """Of all engines here: as many devices, where each has one."""
        return sum(
            group.num_workers // len(nodes)
            for group in self.engine_groups
            for nodes in group.ranks
            for node in nodes
            if node.host in self.hosts
        )


def _as_host(here: _Here) -> Iterator[Finding]:
    """Where processes of the deployment run."""
    deployment, machine = here.deployment, here.machine
    platform, has_engines = deployment.effective_platform, bool(here.engine_groups)
    yield from host.host_findings(machine, engines_on_cpu=platform == "cpu" and has_engines)
    yield host.disk(deployment.log_folder)
    yield from npu_findings(here.devices, is_needed=platform == "npu" and has_engines)
    yield from gpu_findings(here.num_workers if platform == "cuda" else 0, is_needed=platform == "cuda" and has_engines)
    yield from network.addresses(machine, here.hosts)
    yield from version_findings((platform,) if has_engines else ())
    yield deployment_key(deployment.services.kv_transfer.key_file)
    if here.has_proxy:
        yield from _proxy_files(deployment)
    if has_engines:
        services = deployment.services
        yield from model_findings(services.model_path, machine, platform, services.dtype)
    yield from _plan_findings(here)


def _as_controller(
    config_file: Path, deployment: Deployment, machine: Machine, hosts: Sequence[str]
) -> Iterator[Finding]:
    """Where a deployment on other hosts is started from."""
    yield from network.addresses(machine, hosts)
    yield from version_findings(_BACKEND_EXTRAS[deployment.backend])
    yield deployment_key(deployment.services.kv_transfer.key_file)
    yield from controller_findings(deployment, hosts)
    try:
        plan = load_plan(config_file)
    except ConfigError as error:
        yield from of_problems("file", error.problems)
        return
    yield ok("file", str(config_file), f"plans {len(plan.processes)} processes on {len(plan.hosts)} hosts")
    if deployment.backend == "ansible":
        yield ok("file", "each host", f"is looked at there: omni_cli doctor {config_file} --on HOST")


def _plan_findings(here: _Here) -> Iterator[Finding]:
    """What the plan needs of this machine now: ports, memory."""
    if any(state.name.partition(".")[0] == here.deployment.name for state in running_deployments()):
        yield ok("network", "ports and memory", f"{here.deployment.name} runs and has them")
        return
    if (model := _model_to_be_made(here.deployment)) is not None:
        mend = f"python -m omni.deployment.embedded_model {model}, then ask again"
        yield Finding(area="file", subject="plan", found="waits for the model", level="warning", mend=mend)
        return
    try:
        plan = load_plan(here.config_file, on=here.on)
        if here.on is not None:
            plan = replace(plan, processes=plan.on(here.on))
        _check(plan, here.machine)
    except ConfigError as error:  # the plan's, or the machine's
        for each in error.problems:
            yield from of_problems(_area(each), [each])
        return
    num_ports = sum(len(process.ports) for process in plan.processes)
    needed_bytes = sum(process.memory_bytes for process in plan.processes)
    available = f"{here.machine.available_bytes / GIB:.1f} GiB available"
    yield ok("network", "ports", f"{num_ports} free, for {len(plan.processes)} processes")
    yield ok("memory", "memory", f"{needed_bytes / GIB:.1f} GiB needed, {available}")


def _check(plan: LaunchPlan, machine: Machine) -> None:
    """`check_machine`, which makes this user's key where it is missing: here a key of no use takes its place."""
    with tempfile.TemporaryDirectory(prefix="omni-doctor-") as folder:
        key_file = Path(folder) / "deployment.key"
        load_or_make_key(key_file)
        check_machine(replace(plan, key_file=key_file), machine)


def deployment_key(written: Path | None) -> Finding:
    """`written` is services.kv_transfer.key_file."""
    path = written or default_key_path()
    if written is None and not path.exists():
        return ok("key", str(path), "is made when first needed")
    try:
        load_key(path)
    except ValueError as error:
        text, _, mend = str(error).rpartition(": ")
        return problem("key", str(path), text, mend)
    return ok("key", str(path), "this user's alone")


def _proxy_files(deployment: Deployment) -> Iterator[Finding]:
    """The files that the proxy reads as it starts."""
    proxy = deployment.deployment.proxy
    for key in ("api_keys_file", "tls_certificate_file", "tls_key_file"):
        path: Path | None = getattr(proxy, key)
        if path is None:
            continue
        try:
            path.open("rb").close()
        except OSError as error:
            mend = "make it a file that this user can read, or write another path"
            yield problem("file", f"deployment.proxy.{key}", f"{path} cannot be read ({error.strerror})", mend)
        else:
            yield ok("file", f"deployment.proxy.{key}", str(path))


def _hosts(deployment: Deployment) -> tuple[str, ...]:
    hosts = [h for group in group_settings(deployment) for h in group.hosts]
    return tuple(dict.fromkeys((*hosts, deployment.deployment.proxy.host)))


def _platform_here() -> Platform:
    """What the installed engine is built for, else what this machine has."""
    if (build := engine_build()) is not None:
        return build
    if find_tool("npu-smi"):
        return "npu"
    return "cuda" if find_tool("nvidia-smi") else "cpu"


def _model_to_be_made(deployment: Deployment) -> str | None:
    if not deployment.services.model_path.startswith(EMBEDDED):
        return None
    # Imported here: most deployments need neither the converters nor what they import.
    from omni.deployment.embedded_model import EMBEDDED_MODELS, embedded_model_path

    name = deployment.services.model_path.removeprefix(EMBEDDED)
    return name if name in EMBEDDED_MODELS and not embedded_model_path(name).is_dir() else None


def _area(each: Problem) -> Area:
    return next((area for part, area in _AREAS if part in each.field.rpartition("/")[2]), "memory")

"""`backend: ray`: what `omni_cli` asks of a deployment on a Ray cluster.

Everything that runs is found again in the cluster by name; this machine keeps the cluster's address and the processes'
names alone.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Final
from urllib.error import URLError
from urllib.request import ProxyHandler, build_opener

from omni.deployment.backends import Say
from omni.deployment.errors import DeploymentError, MachineError, Problem, raise_any

try:
    import ray  # noqa: F401 (so that its absence is told here)
except ImportError as error:
    raise DeploymentError("backend: ray needs Ray on this machine: pip install 'omni_infer[ray]'") from error

from kv_transfer.auth import default_key_path, load_key, load_or_make_key
from omni.deployment.backends.ray import instances, rendering, scaling
from omni.deployment.backends.ray.actors import ProxyActor
from omni.deployment.backends.ray.capacity import capacity_problems
from omni.deployment.backends.ray.cluster import Cluster, NoClusterError, connected
from omni.deployment.backends.ray.cluster import ask as ask_actors
from omni.deployment.backends.ray.placement import PROXY, InstancePlan, instance_plans, ray_problems
from omni.deployment.backends.ray.proxy_setup import is_tls, joined_proxies, proxy_setup
from omni.deployment.backends.ray.setup import EngineSetup, ProxySetup
from omni.deployment.groups import Pool, group_settings
from omni.deployment.plan_types import LaunchPlan
from omni.deployment.run_state import DeploymentState, ProcessState, RunFolder, one_at_a_time

_ADDRESS_FILE: Final = "ray_address"  # in the run folder: the cluster that it was started on
_HEALTH_S: Final = 60.0
_opener = build_opener(ProxyHandler({}))


class Backend:
    """Args:
    reserve_s: how long to wait for resources that the cluster has, but not free.
    start_s: how long engines may take to start.
    """

    def __init__(self, *, reserve_s: float = 60.0, start_s: float = 1800.0) -> None:
        self._reserve_s = reserve_s
        self._start_s = start_s

    def problems(self, plan: LaunchPlan) -> Iterable[Problem]:
        return ray_problems(plan)

    def render(self, plan: LaunchPlan, folder: Path) -> tuple[Path, ...]:
        raise_any(ray_problems(plan))
        return rendering.render(plan, folder)

    def serve(self, plan: LaunchPlan, say: Say) -> DeploymentState:
        raise_any(ray_problems(plan))
        key = key_text(plan)
        proxy = proxy_setup(plan, key)
        planned = instance_plans(plan.deployment)
        with connected(plan.deployment.ray.address, plan.name) as cluster:
            raise_any(capacity_problems(planned, cluster.nodes()), MachineError)
            state = _claim(plan, cluster)
            try:
                instances.reserve(cluster, planned, self._reserve_s)
                self._start(plan, cluster, planned, proxy, say)
                instances.wait_until_ready(cluster, state.process_names, self._start_s, say)
                instances.wait_until(lambda: _is_healthy(plan, state), _HEALTH_S, "joining the proxy")
            except BaseException:
                say("it did not start: what was started is stopped again")
                self._undo(cluster, state)
                raise
        return state

    def stop(self, deployment: DeploymentState, say: Say) -> None:
        try:
            with connected(_address(deployment), deployment.name) as cluster:
                instances.fetch_logs(cluster, Path(deployment.log_folder))
                say(f"logs are in {deployment.log_folder}")
                self._undo(cluster, deployment)
        except NoClusterError as error:
            folder = RunFolder.of(deployment.name).path
            raise DeploymentError(f"{error}; if it is gone for good, nothing of it runs: delete {folder}") from None

    def restart(self, deployment: DeploymentState, names: Sequence[str], say: Say) -> None:
        """An instance's ranks on one node are started again together."""
        unknown = sorted(set(names) - {*deployment.process_names})
        if unknown:
            raise DeploymentError(f"{', '.join(unknown)}: no such process; there are {list(deployment.process_names)}")
        wanted = list(names) or list(deployment.process_names)
        with connected(_address(deployment), deployment.name) as cluster:
            actors = {
                name: cluster.actor(name)
                for name in cluster.actor_names()
                if any(instances.instance_of(process, [name]) for process in wanted)
            }
            say(f"{', '.join(actors)}: started again")
            ask_actors(actors, "restart", self._start_s)
            instances.wait_until_ready(cluster, wanted, self._start_s, say)

    def scale(self, deployment: DeploymentState, num_groups: Mapping[Pool, int], wait_s: float, say: Say) -> None:
        with connected(_address(deployment), deployment.name) as cluster:
            scaling.Scaling(cluster, deployment, self._reserve_s, self._start_s, say).to(num_groups, wait_s)

    def process_states(self, deployment: DeploymentState) -> list[ProcessState]:
        try:
            with connected(_address(deployment), deployment.name) as cluster:
                return instances.process_states(cluster, deployment.process_names)
        except DeploymentError as error:
            return [ProcessState(name=name, state="failed", message=str(error)) for name in deployment.process_names]

    def fetch_logs(self, deployment: DeploymentState, folder: Path) -> None:
        with connected(_address(deployment), deployment.name) as cluster:
            instances.fetch_logs(cluster, folder)

    def _start(
        self, plan: LaunchPlan, cluster: Cluster, planned: Sequence[InstancePlan], proxy: ProxySetup, say: Say
    ) -> None:
        cluster.start_on_head(ProxyActor, proxy, PROXY)
        join = joined_proxies(plan, cluster.head_address())
        for instance, group in zip(planned, group_settings(plan.deployment), strict=True):
            setups: tuple[EngineSetup, ...] = instances.engine_setups(
                plan.deployment, instance, group, join=join, key=proxy.key
            )
            instances.start(cluster, instance, setups)
        say(f"{len(planned)} groups start")

    def _undo(self, cluster: Cluster, state: DeploymentState) -> None:
        instances.end_all(cluster, state.name, instances.instance_names(state.process_names))
        RunFolder.of(state.name).remove()


def key_text(plan: LaunchPlan) -> str:
    """The deployment key as its file has it; made if it is this user's own and not there yet.

    Raises:
        DeploymentError: it cannot be read, or is none.
    """
    path = plan.key_file or default_key_path()
    try:
        if plan.key_file is None:
            load_or_make_key(path)
        else:
            load_key(path)
        return path.read_text(encoding="ascii").strip()
    except (ValueError, OSError) as error:
        raise DeploymentError(str(error)) from None


def _claim(plan: LaunchPlan, cluster: Cluster) -> DeploymentState:
    """Note down what is about to be started, so that `omni_cli stop` finds it whatever happens.

    Raises:
        DeploymentError: it runs already, here or as somebody else's on this cluster.
    """
    folder = RunFolder.of(plan.name)
    mend = f"`omni_cli stop {plan.name}` first, or give this one another `name`"
    actors = [actor for instance in instance_plans(plan.deployment) for actor in instance.actors]
    state = DeploymentState(
        name=plan.name,
        config_file=str(plan.config_file.resolve()),
        log_folder=str(plan.proxy.log_file.parent.resolve()),
        proxy_url=_proxy_url(plan, cluster),
        served_model_name=plan.served_model_name,
        process_names=(*(name for actor in actors for name in actor.process_names), PROXY),
        launcher_pid=0,
        launcher_start_ticks=None,
        backend="ray",
    )
    with one_at_a_time():
        earlier = folder.deployment()
        if earlier is not None and earlier.is_running:
            raise DeploymentError(f"deployment {plan.name!r} is running already: {mend}")
        if names := cluster.actor_names():
            raise DeploymentError(f"the Ray cluster runs {plan.name!r} already ({', '.join(names)}): {mend}")
        folder.remove()
        folder.write_deployment(state)
        (folder.path / _ADDRESS_FILE).write_text(cluster.address)
    rendering.render(plan, folder.path / "rendered")
    return state


def _address(deployment: DeploymentState) -> str:
    try:
        return (RunFolder.of(deployment.name).path / _ADDRESS_FILE).read_text()
    except OSError:
        return "auto"


def _proxy_url(plan: LaunchPlan, cluster: Cluster) -> str:
    scheme = "https" if is_tls(plan.deployment.deployment.proxy) else "http"
    return f"{scheme}://{cluster.head_address()}:{plan.proxy.port}"


def _is_healthy(plan: LaunchPlan, state: DeploymentState) -> bool:
    if is_tls(plan.deployment.deployment.proxy):  # its certificate is for a name that only clients know
        return True
    try:
        with _opener.open(f"{state.proxy_url}/health", timeout=5.0) as answer:
            return bool(answer.status == 200)
    except (URLError, OSError):
        return False

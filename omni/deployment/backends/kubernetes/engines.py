"""A group's manifest: a Deployment where it has one host in the file, a LeaderWorkerSet where it has more."""

from collections.abc import Iterator, Mapping, Sequence

from omni.deployment.backends.kubernetes.names import Names
from omni.deployment.backends.kubernetes.nodes import PodNode
from omni.deployment.backends.kubernetes.paths import CONFIG, LOGS
from omni.deployment.backends.kubernetes.pod_config import CONFIG_FILE, PodConfig
from omni.deployment.backends.kubernetes.pods import (
    Manifest,
    container,
    host_path,
    http_probe,
    memory_volume,
    mount,
    pod_spec,
)
from omni.deployment.groups import POOLS, GroupSettings
from omni.deployment.model import EMBEDDED, Platform
from omni.deployment.plan_types import LaunchPlan

LEADER_WORKER_SET = "leaderworkerset.x-k8s.io/v1"
DRAIN_S = 600  # the proxy's own limit for a request
_STOP_S = 60  # from SIGTERM to the end of every process
_START_S = 3600  # to load a model over a slow disk
_PROBE_S = 10
_HANG_S = 1800  # the supervisor in the pod starts an engine again by itself; the pod goes when that takes for ever
_MIB = 1 << 20

# It sets CANN's variables. Images that docker/Dockerfile.ascend makes have it; their entry point is not used here.
_PREFIX: Mapping[Platform, tuple[str, ...]] = {"npu": ("with-cann",)}

# Ascend's device plugin gives a pod its devices; of the driver it needs these, as they are on the node.
_DRIVER = (
    ("driver", "/usr/local/Ascend/driver", "Directory"),
    ("dcmi", "/usr/local/dcmi", "Directory"),
    ("npu-smi", "/usr/local/bin/npu-smi", "File"),
    ("hccn", "/etc/hccn.conf", "File"),
)


class EngineManifests:
    """The groups of one plan."""

    def __init__(self, plan: LaunchPlan, names: Names, config: PodConfig) -> None:
        self._plan = plan
        self._names = names
        self._config = config
        self._platform = plan.deployment.effective_platform
        image = plan.deployment.services.docker_image
        assert image is not None
        self._image: str = image

    def manifest(self, group: GroupSettings, nodes: Sequence[PodNode]) -> Manifest:
        if len(nodes) == 1:
            return self._deployment(group, nodes[0])
        return self._leader_worker_set(group, nodes)

    def _deployment(self, group: GroupSettings, node: PodNode) -> Manifest:
        labels = self._names.labels(group.role, group.name)
        return {
            "apiVersion": "apps/v1",
            "kind": "Deployment",
            "metadata": self._metadata(group),
            "spec": {
                "replicas": 1,
                "progressDeadlineSeconds": _START_S + _STOP_S,
                "strategy": {"type": "Recreate"},  # there are no devices for two of it
                "selector": {"matchLabels": labels},
                "template": self._template(group, node, node.num_api_servers),
            },
        }

    def _leader_worker_set(self, group: GroupSettings, nodes: Sequence[PodNode]) -> Manifest:
        leader, *workers = nodes
        num_probed = min(node.num_api_servers for node in workers)
        return {
            "apiVersion": LEADER_WORKER_SET,
            "kind": "LeaderWorkerSet",
            "metadata": self._metadata(group),
            "spec": {
                "replicas": 1,
                "startupPolicy": "LeaderCreated",  # the leader is ready only with its workers
                "leaderWorkerTemplate": {
                    "size": len(nodes),
                    "restartPolicy": "RecreateGroupOnPodRestart",  # what is left of a group cannot go on
                    "leaderTemplate": self._template(group, leader, leader.num_api_servers, "0"),
                    "workerTemplate": self._template(group, workers[0], num_probed, "$(LWS_WORKER_INDEX)"),
                },
            },
        }

    def _metadata(self, group: GroupSettings) -> Manifest:
        return {
            "name": self._names.group(group),
            "labels": self._names.labels(group.role, group.name),
            "annotations": {"omni/deployment": self._plan.name},
        }

    def _template(self, group: GroupSettings, node: PodNode, num_probed: int, number: str | None = None) -> Manifest:
        """Args: number: which node of the group it is; None: the only one."""
        engine = container(
            self._names,
            name="engine",
            image=self._image,
            platform=self._platform,
            command=self._command(group, number),
            env=list(self._env()),
            mounts=list(self._mounts()),
            resources=node.resources(),
            **(self._probes() if num_probed else {}),
            **self._ports_and_drain(node),
        )
        spec = pod_spec(
            self._names,
            engine,
            platform=self._platform,
            grace_s=DRAIN_S + _STOP_S,
            volumes=self._volumes(node),
            **self._apart(),
        )
        return {
            "metadata": {
                "labels": self._names.labels(group.role, group.name),
                "annotations": {"omni/config": self._config.digest(group)},
            },
            "spec": spec,
        }

    def _command(self, group: GroupSettings, number: str | None) -> list[str]:
        command = [*_PREFIX.get(self._platform, ()), "python3", "-m", f"services.{group.role}"]
        command += ["--config", f"{CONFIG}/{CONFIG_FILE}"]
        command += ["--group", group.name, "--listen", "$(POD_IP)"]
        others = self._plan.deployment.deployment.proxy.other_control_addresses
        for address in (f"{self._names.control}:{self._plan.proxy.control_port}", *others):
            command += ["--join", address]
        if number is not None:
            command += ["--node", number, "--master", "$(LWS_LEADER_ADDRESS)"]
        return command

    def _apart(self) -> Manifest:
        """On CPUs each engine binds its threads to all cores of its node, so better nobody else's are there."""
        if self._platform != "cpu":
            return {}
        engines = {"key": "app.kubernetes.io/component", "operator": "In", "values": list(POOLS)}
        term = {"labelSelector": {"matchExpressions": [engines]}, "topologyKey": "kubernetes.io/hostname"}
        wish = [{"weight": 100, "podAffinityTerm": term}]
        return {"affinity": {"podAntiAffinity": {"preferredDuringSchedulingIgnoredDuringExecution": wish}}}

    def _env(self) -> Iterator[Manifest]:
        yield {"name": "VLLM_HOST_IP", "value": "$(POD_IP)"}
        if self._platform == "npu":
            yield {"name": "HCCL_IF_IP", "value": "$(POD_IP)"}  # by which HCCL's ranks find one another

    def _probes(self) -> Manifest:
        return {
            "startupProbe": http_probe("/health", "api", period_s=_PROBE_S, num_failures=_START_S // _PROBE_S),
            "readinessProbe": http_probe("/health", "api", period_s=_PROBE_S, num_failures=3),
            "livenessProbe": http_probe(
                "/health", "api", period_s=_PROBE_S, num_failures=_HANG_S // _PROBE_S, timeout_s=_PROBE_S
            ),
        }

    def _ports_and_drain(self, node: PodNode) -> Manifest:
        ports = node.api_ports
        if not ports:
            return {}
        names = ("api", *(f"api-{index}" for index in range(1, len(ports))))
        container_ports = [{"name": name, "containerPort": port} for name, port in zip(names, ports, strict=True)]
        return {"ports": container_ports} | self._drain(ports)

    def _drain(self, ports: Sequence[int]) -> Manifest:
        """The proxy gives the instance nothing new, then waits for its requests and its KV; only then SIGTERM comes.

        SIGTERM alone gives requests in flight 5 s. With TLS the proxy's certificate does not have the Service's name.
        """
        proxy = self._plan.deployment.deployment.proxy
        if proxy.tls_key_file is not None:
            return {}
        url = f"http://{self._names.control}:{proxy.listen_port}"
        remove = f'python3 -m omni.cli.main scale remove "$POD_IP:$port" --url {url} --wait-s {DRAIN_S}'
        script = f"for port in {' '.join(map(str, ports))}; do {remove} & done; wait"
        return {"lifecycle": {"preStop": {"exec": {"command": ["sh", "-c", script]}}}}

    def _mounts(self) -> Iterator[Manifest]:
        yield mount("config", CONFIG, read_only=True)
        yield mount("logs", LOGS)
        yield mount("shm", "/dev/shm")  # noqa: S108 (where Linux keeps POSIX shared memory)
        for name, path, _ in self._host_paths():
            yield mount(name, path, read_only=True)

    def _volumes(self, node: PodNode) -> Iterator[Manifest]:
        yield {"name": "config", "configMap": {"name": self._names.config_map}}
        yield {"name": "logs", "emptyDir": {}}
        yield memory_volume("shm", f"{node.shm_bytes // _MIB}Mi")
        for name, path, kind in self._host_paths():
            yield host_path(name, path, kind)

    def _host_paths(self) -> Iterator[tuple[str, str, str]]:
        """Volume, path on the node and in the pod, kind: what every node has, as every host has it elsewhere."""
        services = self._plan.deployment.services
        if not services.model_path.startswith(EMBEDDED):
            yield ("model", str(self._plan.model_path), "Directory")
        if self._platform == "npu":
            yield from _DRIVER
            if services.rank_table_path is not None:
                yield ("rank-tables", services.rank_table_path, "Directory")

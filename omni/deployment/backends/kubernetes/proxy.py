"""The proxy's manifests: a Deployment, the Service for clients, and the one for the engines."""

import contextlib
import math
from collections.abc import Iterator, Sequence
from itertools import zip_longest

from omni.deployment.backends.kubernetes.names import Names
from omni.deployment.backends.kubernetes.paths import API_KEYS_NAME, CERTIFICATE_NAME, PROXY_SECRET, TLS_KEY_NAME
from omni.deployment.backends.kubernetes.pods import Manifest, container, http_probe, mount, pod_spec
from omni.deployment.plan_types import LaunchPlan

_MIB = 1 << 20
_LEAVE_S = 5  # until no node sends it new connections
_DEFAULT_DRAIN_S = 30.0  # of the proxy's --drain-timeout-s
_STOP_S = 10

# Instances come by joining, and the key is where $OMNI_STATE_DIR says.
_OF_INSTANCES = ("--prefill", "--decode", "--mixed", "--kv-address", "--bootstrap", "--kv-events", "--key-file")
_ELSEWHERE = {
    "--host": "0.0.0.0",  # the pod's address is its own
    "--api-keys": f"{PROXY_SECRET}/{API_KEYS_NAME}",
    "--tls-certificate": f"{PROXY_SECRET}/{CERTIFICATE_NAME}",
    "--tls-key": f"{PROXY_SECRET}/{TLS_KEY_NAME}",
}


class ProxyManifests:
    """The proxy of one plan."""

    def __init__(self, plan: LaunchPlan, names: Names) -> None:
        self._plan = plan
        self._proxy = plan.deployment.deployment.proxy
        self._names = names
        self._labels = names.labels("proxy")
        self._is_tls = self._proxy.tls_key_file is not None

    def manifests(self) -> Iterator[Manifest]:
        port = {"name": "api", "port": self._proxy.listen_port, "targetPort": "api"}
        control = {"name": "control", "port": self._plan.proxy.control_port, "targetPort": "control"}
        yield self._service(self._names.proxy, [port])
        # The proxy is ready once engines have joined, so they must reach it before.
        yield self._service(self._names.control, [port, control], publishNotReadyAddresses=True)
        yield self._deployment()

    def _service(self, name: str, ports: Sequence[Manifest], **more: bool) -> Manifest:
        return {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {"name": name, "labels": self._labels},
            "spec": {"type": "ClusterIP", "selector": self._labels, "ports": list(ports), **more},
        }

    def _deployment(self) -> Manifest:
        return {
            "apiVersion": "apps/v1",
            "kind": "Deployment",
            "metadata": {
                "name": self._names.proxy,
                "labels": self._labels,
                "annotations": {"omni/deployment": self._plan.name},
            },
            "spec": {
                "replicas": 1,
                "strategy": {"type": "Recreate"},  # of two proxies, each would know a part of the engines
                "selector": {"matchLabels": self._labels},
                "template": {"metadata": {"labels": self._labels}, "spec": self._pod()},
            },
        }

    def _pod(self) -> Manifest:
        services, has_files = self._plan.deployment.services, bool(proxy_files(self._plan))
        proxy = container(
            self._names,
            name="proxy",
            image=services.docker_image or "",
            platform="cpu",
            command=self._command(),
            env=list(self._env()),
            mounts=[mount("files", PROXY_SECRET, read_only=True)] if has_files else [],
            resources={"requests": self._requests()},
            ports=[
                {"name": "api", "containerPort": self._proxy.listen_port},
                {"name": "control", "containerPort": self._plan.proxy.control_port},
            ],
            startupProbe=http_probe("/live", "api", period_s=2, num_failures=60, is_tls=self._is_tls),
            livenessProbe=http_probe("/live", "api", period_s=10, num_failures=6, is_tls=self._is_tls),
            readinessProbe=http_probe("/health", "api", period_s=5, num_failures=2, is_tls=self._is_tls),
            lifecycle={"preStop": {"exec": {"command": ["sleep", str(_LEAVE_S)]}}},
        )
        files = {"name": "files", "secret": {"secretName": self._names.proxy_secret, "defaultMode": 0o440}}
        return pod_spec(
            self._names,
            proxy,
            platform="cpu",
            grace_s=_LEAVE_S + math.ceil(self._drain_s()) + _STOP_S,
            volumes=[files] if has_files else [],
        )

    def _command(self) -> list[str]:
        """The plan's, without the engines, and with files where the pod has them."""
        arguments, own = self._plan.proxy.arguments, self._proxy.extra_args
        planned = arguments[: len(arguments) - len(own)]
        command = ["python3", "-m", "services.global_proxy"]
        for flag, value in zip(planned[::2], planned[1::2], strict=True):
            if flag not in _OF_INSTANCES:
                command += [flag, _ELSEWHERE.get(flag, value)]
        return [*command, *own]

    def _env(self) -> Iterator[Manifest]:
        """For what the proxy sends outside, such as traces; engines are reached directly."""
        if http_proxy := self._plan.deployment.services.http_proxy:
            direct = "localhost,127.0.0.1,.svc,.cluster.local"
            for name, value in (("http_proxy", http_proxy), ("https_proxy", http_proxy), ("no_proxy", direct)):
                yield {"name": name, "value": value}

    def _requests(self) -> dict[str, str]:
        memory_bytes = self._plan.proxy.memory_bytes * self._proxy.workers
        return {"cpu": str(self._proxy.workers), "memory": f"{math.ceil(memory_bytes / _MIB)}Mi"}

    def _drain_s(self) -> float:
        own = self._proxy.extra_args
        for part, following in zip_longest(own, own[1:], fillvalue=""):
            flag, equals, value = part.partition("=")
            if flag == "--drain-timeout-s":
                with contextlib.suppress(ValueError):  # the proxy itself says what is wrong with it
                    return float(value if equals else following)
        return _DEFAULT_DRAIN_S


def proxy_files(plan: LaunchPlan) -> dict[str, str]:
    """What the proxy's Secret holds: name there → file of the machine from which it is made."""
    proxy = plan.deployment.deployment.proxy
    files = {
        API_KEYS_NAME: proxy.api_keys_file,
        CERTIFICATE_NAME: proxy.tls_certificate_file,
        TLS_KEY_NAME: proxy.tls_key_file,
    }
    return {name: str(path) for name, path in files.items() if path is not None}

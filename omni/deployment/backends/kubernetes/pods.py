"""What the pods of a deployment have in common: who they run as, their volumes, their probes."""

from collections.abc import Iterable, Sequence
from typing import Any

from omni.deployment.backends.kubernetes.names import Names
from omni.deployment.backends.kubernetes.paths import HOME, KEY_NAME, KEY_SECRET, STATE
from omni.deployment.model import Platform

Manifest = dict[str, Any]

USER = 1000  # any that is not root; the image needs no entry for it
_STATE_SIZE = "64Mi"
_KEY_VOLUME = "key"


def pod_spec(
    names: Names,
    container: Manifest,
    *,
    platform: Platform,
    grace_s: int,
    volumes: Iterable[Manifest],
    **more: Any,
) -> Manifest:
    """A pod with one container, into which `volumes` are mounted already.

    Args:
        grace_s: between the first word that it shall end and SIGKILL.
        more: fields of the pod that only some have.
    """
    return {
        "automountServiceAccountToken": False,  # nothing here asks Kubernetes for anything
        "enableServiceLinks": False,  # of a Service named vllm, $VLLM_PORT would change what vLLM does
        # Number 1 is the pause container then: it collects orphans, and SIGTERM ends a program that has no handler yet.
        "shareProcessNamespace": True,
        "terminationGracePeriodSeconds": grace_s,
        "securityContext": _pod_security(platform),
        "initContainers": [_copy_key(container)],
        "containers": [container],
        "volumes": [
            {"name": _KEY_VOLUME, "secret": {"secretName": names.key_secret, "defaultMode": 0o440}},
            memory_volume("state", _STATE_SIZE),
            *volumes,
            {"name": "home", "emptyDir": {}},
            {"name": "tmp", "emptyDir": {}},
        ],
        **more,
    }


def container(
    names: Names,
    *,
    name: str,
    image: str,
    platform: Platform,
    command: Sequence[str],
    env: Sequence[Manifest] = (),
    mounts: Sequence[Manifest] = (),
    **more: Any,
) -> Manifest:
    """Args: more: fields of the container that only some have."""
    return {
        "name": name,
        "image": image,
        "command": list(command),
        "workingDir": HOME,  # some programs of CANN write where they are started
        "env": [
            {"name": "POD_IP", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}},
            {"name": "OMNI_STATE_DIR", "value": STATE},
            {"name": "HOME", "value": HOME},
            {"name": "USER", "value": "omni"},  # for Python's getpass, which knows no user 1000
            *env,
        ],
        "envFrom": [{"secretRef": {"name": names.env_secret, "optional": True}}],
        "securityContext": _container_security(platform),
        "volumeMounts": [mount("state", STATE), *mounts, mount("home", HOME), mount("tmp", "/tmp")],  # noqa: S108
        **more,
    }


def mount(volume: str, path: str, *, read_only: bool = False) -> Manifest:
    return {"name": volume, "mountPath": path} | ({"readOnly": True} if read_only else {})


def memory_volume(name: str, size: str) -> Manifest:
    return {"name": name, "emptyDir": {"medium": "Memory", "sizeLimit": size}}


def host_path(name: str, path: str, kind: str) -> Manifest:
    return {"name": name, "hostPath": {"path": path, "type": kind}}


def http_probe(
    path: str, port: str, *, period_s: int, num_failures: int, timeout_s: int = 5, is_tls: bool = False
) -> Manifest:
    target = {"path": path, "port": port} | ({"scheme": "HTTPS"} if is_tls else {})
    return {
        "httpGet": target,
        "periodSeconds": period_s,
        "timeoutSeconds": timeout_s,
        "failureThreshold": num_failures,
    }


def _copy_key(container: Manifest) -> Manifest:
    """A key is refused if others may read it, and Kubernetes gives a Secret's file to root and to a group."""
    return {
        "name": "key",
        "image": container["image"],
        "command": ["install", "-m", "0600", f"{KEY_SECRET}/{KEY_NAME}", f"{STATE}/{KEY_NAME}"],
        "resources": {"requests": {"cpu": "100m", "memory": "32Mi"}},
        "securityContext": container["securityContext"],
        "volumeMounts": [mount(_KEY_VOLUME, KEY_SECRET, read_only=True), mount("state", STATE)],
    }


def _pod_security(platform: Platform) -> Manifest:
    """Ascend's device files belong to a group whose number differs from host to host, and CANN's images run as root."""
    common: Manifest = {"fsGroup": USER, "seccompProfile": {"type": "RuntimeDefault"}}
    if platform == "npu":
        return common
    return {"runAsNonRoot": True, "runAsUser": USER, "runAsGroup": USER, **common}


def _container_security(platform: Platform) -> Manifest:
    if platform == "npu":
        return {"allowPrivilegeEscalation": False}
    return {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }

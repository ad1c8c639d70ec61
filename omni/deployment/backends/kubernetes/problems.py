"""What a deployment file may say elsewhere, and not in Kubernetes."""

import re
from collections.abc import Iterator, Mapping, Sequence

from omni.deployment.backends.kubernetes.names import Names
from omni.deployment.errors import Problem
from omni.deployment.groups import POOLS, GroupSettings, group_settings
from omni.deployment.model import EngineOptions
from omni.deployment.plan_types import LaunchPlan
from omni.deployment.ports import control_port
from omni.deployment.relocate import master_problems

# These move KV between processes of one pid namespace, and no two pods share one.
_WITHIN_A_HOST = ("shared_memory", "process_vm")
_SECRET = re.compile(r"(^|[-_])(api)?(key|token)s?$|secret|passw|credential", re.IGNORECASE)
_CREDENTIALS = re.compile(r"://\S*@")  # a password may have a slash
# The proxy's options for files that no pod has.
_FILES = {
    "--api-keys": "delete it and write deployment.proxy.api_keys_file",
    "--tls-key": "delete it and write deployment.proxy.tls_key_file",
}


def problems(plan: LaunchPlan) -> Iterator[Problem]:
    services = plan.deployment.services
    names = Names(plan.deployment.name)
    if services.docker_image is None:
        yield Problem("services.docker_image", "is missing", "write the image that the pods run; see docker/")
    if control_port(plan.deployment) is None:
        text = "0, and the engines in pods join the proxy there, for nobody knows their addresses before"
        yield Problem("deployment.proxy.control_port", text, "delete the line")
    if services.kv_transfer.transport in _WITHIN_A_HOST:
        text = f"{services.kv_transfer.transport} works within one host, and every pod counts as one"
        yield Problem("services.kv_transfer.transport", text, "write auto or tcp")
    for group in group_settings(plan.deployment):
        yield from _device_problems(group)
        yield from master_problems(group)
    yield from _secret_problems(plan, names)


def _device_problems(group: GroupSettings) -> Iterator[Problem]:
    if len({len(group.devices(host)) for host in group.hosts}) > 1:
        numbers = ", ".join(f"{len(group.devices(host))} on {host}" for host in group.hosts)
        text = f"{numbers}; the pods of a group are alike"
        yield Problem(f"{group.path}.ascend_rt_visible_devices", text, "list equally many for each host")


def _secret_problems(plan: LaunchPlan, names: Names) -> Iterator[Problem]:
    """Passwords and tokens, by their names or as a part of a URL.

    Every block counts as it is written, used by a group or not: the pods' file has it as it is.
    """
    deployment = plan.deployment
    proxy = deployment.deployment.proxy
    for field, url, all_may_read in (
        ("services.http_proxy", deployment.services.http_proxy, "a ConfigMap"),
        ("deployment.proxy.otlp_endpoint", proxy.otlp_endpoint, "a command line"),
    ):
        if "@" in (url or ""):  # with or without http:// in front
            mend = _secret_mend(names) if field == "services.http_proxy" else "write it without user and password"
            yield Problem(field, f"holds a password, and all may read {all_may_read}", mend)
    yield from _argument_problems("deployment.proxy.extra_args", proxy.extra_args)
    blocks: list[tuple[str, EngineOptions]] = [
        (f"services.{role}", getattr(deployment.services, role)) for role in POOLS
    ]
    blocks += [(group.path, group.group) for group in group_settings(deployment)]
    for path, block in blocks:
        yield from _env_problems(f"{path}.env", block.env or {}, names)
        yield from _argument_problems(f"{path}.extra_args", block.extra_args or ())


def _env_problems(field: str, env: Mapping[str, str], names: Names) -> Iterator[Problem]:
    for name, value in env.items():
        if _is_secret(name):
            text = "is a secret by its name, and all may read a ConfigMap"
        elif _has_credentials(value) or (name.lower().endswith("_proxy") and "@" in value):
            text = "holds a password, and all may read a ConfigMap"
        else:
            continue
        yield Problem(f"{field}.{name}", text, _secret_mend(names))


def _argument_problems(field: str, arguments: Sequence[str]) -> Iterator[Problem]:
    flag = ""
    for part in arguments:
        if part.startswith("-"):
            flag = part.partition("=")[0]
            if _is_secret(flag):
                text = f"{flag} is a secret by its name, and all may read a ConfigMap and a command line"
                yield Problem(field, text, _FILES.get(flag, "delete it"))
                continue
        if _has_credentials(part):
            text = f"{flag or 'an argument'} holds a password, and all may read a ConfigMap and a command line"
            yield Problem(field, text, "write it without user and password")


def _has_credentials(value: str) -> bool:
    return _CREDENTIALS.search(value) is not None


def _is_secret(name: str) -> bool:
    """Of a variable or an option; `--long-prefill-token-threshold` and `TOKENIZERS_PARALLELISM` hide nothing."""
    return _SECRET.search(name) is not None


def _secret_mend(names: Names) -> str:
    return (
        "delete it here and put it into a file of NAME=VALUE lines for `kubectl create secret generic "
        f"{names.env_secret} --from-env-file=FILE`: every pod gets what is there"
    )

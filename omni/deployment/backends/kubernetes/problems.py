"""What a deployment file may say elsewhere, and not in Kubernetes."""

import re
from collections.abc import Iterator

from omni.deployment.backends.kubernetes.names import Names
from omni.deployment.errors import Problem
from omni.deployment.groups import GroupSettings, group_settings
from omni.deployment.plan_types import LaunchPlan
from omni.deployment.ports import control_port

# These move KV between processes of one pid namespace, and no two pods share one.
_WITHIN_A_HOST = ("shared_memory", "process_vm")
_SECRET = re.compile(r"(^|[-_])(api)?(key|token)s?$|secret|passw|credential", re.IGNORECASE)
_CREDENTIALS = re.compile(r"//[^/]*@")


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
    if _CREDENTIALS.search(services.http_proxy or ""):
        yield Problem("services.http_proxy", "holds a password, and all may read a ConfigMap", _secret_mend(names))
    for group in group_settings(plan.deployment):
        yield from _device_problems(group)
    yield from _secret_problems(plan, names)


def _device_problems(group: GroupSettings) -> Iterator[Problem]:
    if len({len(group.devices(host)) for host in group.hosts}) > 1:
        numbers = ", ".join(f"{len(group.devices(host))} on {host}" for host in group.hosts)
        text = f"{numbers}; the pods of a group are alike"
        yield Problem(f"{group.path}.ascend_rt_visible_devices", text, "list equally many for each host")


def _secret_problems(plan: LaunchPlan, names: Names) -> Iterator[Problem]:
    """Passwords and tokens, by their names, in `env` or `extra_args`; what a role has in common, once."""
    found: dict[str, Problem] = {}
    for group in group_settings(plan.deployment):
        for name in filter(_is_secret, group.env):
            path = group.path if name in (group.group.env or {}) else f"services.{group.role}"
            text = "is a secret by its name, and all may read a ConfigMap"
            problem = Problem(f"{path}.env.{name}", text, _secret_mend(names))
            found[problem.field] = problem
        for flag in (part.partition("=")[0] for part in group.extra_args if part.startswith("-")):
            if _is_secret(flag):
                text = f"{flag} is a secret by its name, and all may read a ConfigMap and a command line"
                problem = Problem(group.field("extra_args"), text, "delete it")
                found[problem.field] = problem
    yield from found.values()


def _is_secret(name: str) -> bool:
    """Of a variable or an option; `--long-prefill-token-threshold` and `TOKENIZERS_PARALLELISM` hide nothing."""
    return _SECRET.search(name) is not None


def _secret_mend(names: Names) -> str:
    return (
        "delete it here and put it into a file of NAME=VALUE lines for `kubectl create secret generic "
        f"{names.env_secret} --from-env-file=FILE`: every pod gets what is there"
    )

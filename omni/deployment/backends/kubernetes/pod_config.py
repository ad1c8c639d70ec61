"""The deployment file as pods read it, from a ConfigMap: without logins and keys, in terms of pods instead of hosts.

A pod has an address of its own and counts its devices from 0. So each host becomes a name that nobody else has, ports
are those of the group on all of them, and devices are numbered anew.
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from omni.deployment import strict_yaml
from omni.deployment.backends.kubernetes.manifest_yaml import to_yaml
from omni.deployment.backends.kubernetes.names import Names
from omni.deployment.backends.kubernetes.paths import LOGS
from omni.deployment.groups import GroupSettings, group_settings
from omni.deployment.model import EMBEDDED
from omni.deployment.plan_types import LaunchPlan

CONFIG_FILE = "deployment.yaml"
_MAX_BYTES = 1 << 20  # of a ConfigMap
_DIGEST_CHARS = 16

# What means a host, or a login there; `host <IP>` blocks too.
_OF_HOSTS = ("user", "private_key", "password", "hosts", "ascend_rt_visible_devices")
# The image has the code; keys come in Secrets.
_OF_OTHER_BACKENDS = ("docker_image", "runtime", "venv_path", "code_path", "local_code_path")


class PodConfig:
    """What the pods of one plan are told."""

    def __init__(self, plan: LaunchPlan, names: Names) -> None:
        self._plan = plan
        self._names = names
        self._groups = list(group_settings(plan.deployment))
        self._written: Mapping[str, Any] = strict_yaml.read(plan.config_file.read_text(encoding="utf-8")).data
        self._common = self._make_common()

    def text(self) -> str:
        """The file. Raises ValueError: it is too large for a ConfigMap."""
        pools: dict[str, Any] = {}
        for group in self._groups:
            pools.setdefault(group.role, {})[group.name] = self._group(group)
        data = {**self._common, "deployment": pools | {"proxy": self._proxy()}}
        text = to_yaml([data], explicit_start=False)
        if (size := len(text.encode())) > _MAX_BYTES:
            raise ValueError(f"{size} bytes without its comments, and a ConfigMap holds {_MAX_BYTES}")
        return text

    def digest(self, group: GroupSettings) -> str:
        """Changes when the group must start anew: with what concerns it, and not with the other groups."""
        told = json.dumps([self._common, self._proxy(), self._group(group)], sort_keys=True)
        return hashlib.sha256(told.encode()).hexdigest()[:_DIGEST_CHARS]

    def _make_common(self) -> dict[str, Any]:
        deployment = self._plan.deployment
        return {
            "name": deployment.name,
            "platform": deployment.effective_platform,
            "backend": "kubernetes",
            "services": self._services(),
        }

    def _services(self) -> dict[str, Any]:
        services = {name: value for name, value in self._written["services"].items() if name not in _OF_OTHER_BACKENDS}
        if not str(services["model_path"]).startswith(EMBEDDED):
            services["model_path"] = str(self._plan.model_path)
        if "kv_transfer" in services:
            kv_transfer = services["kv_transfer"] or {}
            services["kv_transfer"] = {name: value for name, value in kv_transfer.items() if name != "key_file"}
        return services | {"log_path": LOGS, "served_model_name": self._plan.served_model_name}

    def _proxy(self) -> dict[str, Any]:
        """As much as the engines need: the proxy itself has all of it on its command line."""
        proxy = self._plan.proxy
        return {"host": self._names.control, "listen_port": proxy.port, "control_port": proxy.control_port}

    def _group(self, group: GroupSettings) -> dict[str, Any]:
        written = self._written["deployment"][group.role][group.name]
        data = {key: value for key, value in written.items() if key not in _OF_HOSTS and not key.startswith("host ")}
        num_nodes = len({node.host for nodes in group.ranks for node in nodes})
        data["hosts"] = ",".join(f"{group.role}-{group.name}-{number}" for number in range(num_nodes))
        if num_devices := len(group.devices(group.hosts[0])):
            data["ascend_rt_visible_devices"] = ",".join(map(str, range(num_devices)))
        return data

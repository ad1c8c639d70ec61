"""What an actor puts on its node: a folder of its own with a deployment file for its group, the key, states, logs."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from kv_transfer.auth import default_key_path
from omni.deployment.groups import POOLS, GroupSettings
from omni.deployment.model import EVENT_PORT_OFFSET, HOST_KEY, KV_PORT_OFFSET, MASTER_PORT_OFFSET, Deployment
from omni.deployment.run_state import ProcessState, RunFolder
from omni.process import remove_traces

_MAX_LOG_BYTES = 16 << 20  # of each log, its end: what is fetched travels through memory
# Of a host: where Ray starts something is Ray's business, and nobody logs in anywhere.
_NOT_WITH_RAY = {"user", "private_key", "password"}
_DEVICES = "ascend_rt_visible_devices"
_OF_PROXY = {"host", "listen_port", "control_port"}  # the rest is its own actor's


@dataclass(frozen=True)
class NodeFolder:
    """One actor's folder. Another actor in its place, after a restart, finds it by the actor's name."""

    path: Path

    @classmethod
    def of(cls, namespace: str, actor_name: str) -> "NodeFolder":
        return cls(deployment_folder(namespace) / actor_name)

    @property
    def config_file(self) -> Path:
        return self.path / "deployment.yaml"

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    @property
    def state(self) -> Path:
        """`$OMNI_STATE_DIR` of what the actor runs: each has one of its own, though many share a node."""
        return self.path / "state"

    def make(self, key: str) -> int:
        """Empty but for earlier logs, and with the deployment key. Returns how often that was done before.

        Raises:
            OSError: another user's folder is in the way, or the disk is full.
        """
        parent = self.path.parent
        for folder in (parent.parent, parent, self.path):
            folder.mkdir(mode=0o700, exist_ok=True)
            if folder.stat().st_uid != os.geteuid():
                raise PermissionError(f"{folder} belongs to another user: delete it, or set TMPDIR for Ray")
        shutil.rmtree(self.state, ignore_errors=True)
        for folder in (self.state, self.logs):
            folder.mkdir(mode=0o700, exist_ok=True)
        self.write_secret(self.state / default_key_path().name, key)
        lives = self.path / "lives"
        num_before = int(lives.read_text()) if lives.exists() else 0
        lives.write_text(str(num_before + 1))
        return num_before

    def write_secret(self, path: Path, text: str) -> None:
        """A new file that this user alone can read."""
        path.unlink(missing_ok=True)
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(text)

    def write_config(self, config: Mapping[str, Any]) -> None:
        config = {**config, "services": {**config["services"], "log_path": str(self.logs)}}
        self.config_file.write_text(yaml.safe_dump(config, sort_keys=False))

    def process_states(self) -> dict[str, ProcessState]:
        return {name: state for folder in self._run_folders() for name, state in folder.processes().items()}

    def forget_processes(self) -> None:
        """Before a start: a killed program has not written that it ended."""
        for folder in self._run_folders():
            folder.remove()

    def read_logs(self) -> dict[str, bytes]:
        """The end of each log, by the log's name."""
        logs = {}
        for path in self.logs.glob("*.log"):
            with path.open("rb") as file:
                file.seek(max(0, os.fstat(file.fileno()).st_size - _MAX_LOG_BYTES))
                logs[path.name] = file.read()
        return logs

    def _run_folders(self) -> list[RunFolder]:
        return [RunFolder(path) for path in self.state.glob("*") if path.is_dir()]

    def remove(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)
        remove_if_empty(self.path.parent)


def deployment_folder(namespace: str) -> Path:
    """On this node."""
    return Path(tempfile.gettempdir(), f"omni-ray-{os.geteuid()}", namespace)


def clean_node(namespace: str) -> None:
    """Take off this node what actors left that were lost: their folders, and their programs' shared memory."""
    shutil.rmtree(deployment_folder(namespace), ignore_errors=True)
    remove_if_empty(deployment_folder(namespace))
    remove_traces()


def remove_if_empty(folder: Path) -> None:
    """It and the one above."""
    for path in (folder, folder.parent):
        with contextlib.suppress(OSError):  # something of another actor's is in it, or it is gone
            path.rmdir()


def group_config(deployment: Deployment, group: GroupSettings, *, uses_executor: bool) -> dict[str, Any]:
    """The deployment file for one group, for `with_devices` to be completed on a node. No password or key is in it.

    Args:
        uses_executor: the group's workers are those of vLLM's ray executor.
    """
    config = deployment.model_dump(mode="json", by_alias=True, exclude_unset=True)
    pools = config["deployment"]
    config["deployment"] = {
        **{role: {name: _group(written) for name, written in pools[role].items()} for role in POOLS if pools.get(role)},
        "proxy": {key: value for key, value in pools.get("proxy", {}).items() if key in _OF_PROXY},
    }
    own = config["deployment"][group.role][group.name]
    own["tensor_parallel_size"] = group.tensor_parallel_size
    own["pipeline_parallel_size"] = group.pipeline_parallel_size
    own["data_parallel_size"] = group.data_parallel_size
    for host in group.hosts:  # what differs between hosts are ports and numbers of devices: both are found on the node
        own.pop(f"host {host}", None)
    num_hosts = 1 if uses_executor else len(group.hosts)
    own["hosts"] = ",".join(f"{group.role}-{group.name}-{node}" for node in range(num_hosts))  # no other group's
    if uses_executor:
        own["extra_args"] = ["--distributed-executor-backend", "ray", *group.extra_args]
        own.pop(_DEVICES, None)
    config["platform"] = deployment.effective_platform
    config["backend"] = "local"
    config["services"].get("kv_transfer", {}).pop("key_file", None)  # on the node it is where it is without that
    return config


def with_devices(config: Mapping[str, Any], role: str, name: str, devices: Sequence[int]) -> dict[str, Any]:
    """`group_config` with the devices that Ray has given."""
    pools = config["deployment"]
    group: dict[str, Any] = dict(pools[role][name])
    if devices and config["platform"] == "npu":
        group[_DEVICES] = _as_text(devices)
    if devices and config["platform"] == "cuda":
        group["env"] = {"CUDA_VISIBLE_DEVICES": _as_text(devices), **(group.get("env") or {})}
    return {**config, "deployment": {**pools, role: {**pools[role], name: group}}}


def group_ports(base_api_port: int, num_ranks: int) -> tuple[int, ...]:
    """All that a group may listen on, on one node."""
    api = range(base_api_port, base_api_port + max(1, num_ranks))
    first_event = base_api_port + EVENT_PORT_OFFSET
    events = range(first_event, first_event + 2 * len(api))
    return (*api, *(port + KV_PORT_OFFSET for port in api), *events, base_api_port + MASTER_PORT_OFFSET)


def _group(written: Mapping[str, Any]) -> dict[str, Any]:
    """As a file has it: the blocks for single hosts are keys of their own there."""
    group = _as_written({key: value for key, value in written.items() if key != HOST_KEY})
    blocks = written.get(HOST_KEY, {})
    return group | {f"host {host}": _as_written(block) for host, block in blocks.items()}


def _as_written(block: Mapping[str, Any]) -> dict[str, Any]:
    """Without secrets; hosts and devices as text with commas between."""
    kept = {key: value for key, value in block.items() if key not in _NOT_WITH_RAY}
    return kept | {key: _as_text(kept[key]) for key in ("hosts", _DEVICES) if kept.get(key)}


def _as_text(values: Sequence[object]) -> str:
    return ",".join(map(str, values))

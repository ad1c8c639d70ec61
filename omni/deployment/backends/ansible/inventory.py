"""Deployment → Ansible's inventory, without passwords, and the passwords by themselves."""

from collections.abc import Mapping, Sequence
from typing import Any, Final

import yaml

from omni.deployment.backends.ansible.machines import (
    LETTERS,
    PROXY_GROUP,
    InventoryHost,
    Machine,
    inventory_hosts,
    machines_of,
)
from omni.deployment.engine_env import rank_table_folder
from omni.deployment.model import EMBEDDED, Deployment, Services

# A host that is new is remembered; one that has changed is refused. Long commands keep their connection.
_SSH_ARGUMENTS: Final = "-o StrictHostKeyChecking=accept-new -o ServerAliveInterval=15 -o ServerAliveCountMax=8"
_HEADER: Final = """\
# Made from a deployment file. With playbook.yml beside it: ansible-playbook -i inventory.yml playbook.yml
# P, D, M: prefill, decode and mixed instances; C: the proxy. p1_node1 is the second host of p1's instance.
# machines and engines name each machine once, whatever it is: where things are done that one must not do twice.
"""


def inventory_text(deployment: Deployment) -> str:
    """inventory.yml"""
    hosts = inventory_hosts(deployment)
    machines = machines_of(hosts)
    machine_of = {host.name: machine for machine in machines for host in machine.hosts}
    groups: dict[str, Any] = {
        letter: {
            "hosts": {host.name: _host_variables(host, hosts, machine_of) for host in hosts if host.group == letter}
        }
        for letter in (*LETTERS.values(), PROXY_GROUP)
    }
    groups["machines"] = {"hosts": {machine.first.name: None for machine in machines}}
    groups["engines"] = {"hosts": {machine.first.name: None for machine in machines if machine.has_engines}}
    content = {"all": {"vars": _shared_variables(deployment), "children": groups}}
    return _HEADER + yaml.dump(content, Dumper=_Dumper, sort_keys=False, width=120)


def password_texts(deployment: Deployment) -> Mapping[str, str]:
    """For each host that is logged in to with a password, by name: a file of variables for Ansible."""
    return {
        host.name: yaml.dump({"ansible_password": _Literal(host.access.password.get_secret_value())}, Dumper=_Dumper)
        for host in inventory_hosts(deployment)
        if host.access.password is not None
    }


def _shared_variables(deployment: Deployment) -> dict[str, Any]:
    services = deployment.services
    code_path = services.code_path or ""
    return {
        "ansible_ssh_common_args": _SSH_ARGUMENTS,
        "ansible_ssh_password_mechanism": "ssh_askpass",  # no password on a command line
        "ansible_pipelining": True,
        "deployment_name": deployment.name,
        "deployment_file": "{{ inventory_dir }}/deployment.yml",
        "deployment_key_file": str(services.kv_transfer.key_file or ""),
        "runtime": deployment.runtime,
        "platform": deployment.effective_platform,
        "docker_image": services.docker_image or "",
        "local_code_path": services.local_code_path or "",
        "code_path": code_path,
        "venv_path": services.venv_path or f"{code_path}/.venv",
        "log_path": str(deployment.log_folder),
        "model_path": "" if services.model_path.startswith(EMBEDDED) else services.model_path,
        "expert_map_path": _expert_map(services),
        "rank_table_path": rank_table_folder(deployment) or "",
        "http_proxy": services.http_proxy or "",
    }


def _expert_map(services: Services) -> str:
    placement = services.expert_placement
    return (placement.config_path or "") if placement is not None else ""


def _host_variables(
    host: InventoryHost, hosts: Sequence[InventoryHost], machine_of: Mapping[str, Machine]
) -> dict[str, Any]:
    machine = machine_of[host.name]
    variables: dict[str, Any] = {"ansible_host": host.address}
    if host.access.user:
        variables["ansible_user"] = host.access.user
    if host.access.private_key:
        variables["ansible_ssh_private_key_file"] = host.access.private_key
    if host.instance:
        variables |= {"instance": host.instance, "node_rank": host.node_rank}
        if host.node_rank == 0:
            variables["instance_hosts"] = _Flow(other.name for other in hosts if other.instance == host.instance)
    variables["api_port"] = host.api_port
    if host.instance:
        variables["devices"] = _Flow(host.devices)
    if machine.first == host:
        variables["machine_devices"] = _Flow(machine.devices)
        variables["machine_instances"] = _Flow(machine.instances)
        variables["machine_files"] = _Flow(machine.files)
    return variables


class _Flow(list[Any]):
    """A list on one line."""


class _Literal(str):
    """A text that Ansible is not to read as a template."""


class _Dumper(yaml.SafeDumper):
    pass


def _flow(dumper: _Dumper, data: _Flow) -> yaml.Node:
    return dumper.represent_sequence("tag:yaml.org,2002:seq", data, flow_style=True)


def _literal(dumper: _Dumper, data: _Literal) -> yaml.Node:
    return dumper.represent_scalar("!unsafe", str(data), style='"')


def _nothing(dumper: _Dumper, _data: None) -> yaml.Node:
    return dumper.represent_scalar("tag:yaml.org,2002:null", "")


_Dumper.add_representer(_Flow, _flow)
_Dumper.add_representer(_Literal, _literal)
_Dumper.add_representer(type(None), _nothing)

"""More or fewer groups of a role than the deployment file has, while it runs: which engines there shall be then.

A new group is a copy of the role's first one, with ports of its own and as much KV memory. Groups are stopped from the
last. What runs stays as it is: on a CPU a new engine's cores may be others' too.
"""

import socket
from collections.abc import Iterable, Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Final

from omni.deployment.deployment_file import load_deployment
from omni.deployment.engines_file import Engines
from omni.deployment.errors import ConfigError, MachineError, Problem, raise_any
from omni.deployment.groups import POOLS, Pool
from omni.deployment.line_numbers import naming_lines
from omni.deployment.load import load_plan
from omni.deployment.machine import Machine, this_machine
from omni.deployment.memory import GIB
from omni.deployment.model import EVENT_PORT_OFFSET, KV_PORT_OFFSET, MASTER_PORT_OFFSET, Deployment, Group
from omni.deployment.model_info import read_model_info
from omni.deployment.plan import make_plan
from omni.deployment.ports import port_claims, port_problems

_PORT_STEP: Final = 10
_HIGHEST_API_PORT: Final = 65535 - EVENT_PORT_OFFSET - _PORT_STEP


def scale_engines(
    config_file: Path, present: Engines, num_groups: Mapping[Pool, int], machine: Machine | None = None
) -> Engines:
    """The engines that there shall be: those of `present` that stay, then the new ones.

    Args:
        present: the engines that run now.
        num_groups: how many groups of each role there shall be; a role that is left out stays as it is.

    Raises:
        ConfigError: it cannot be done; the text says where and what to do.
    """
    staying = list(present)
    wanted: list[tuple[Pool, str]] = []
    for role, number in num_groups.items():
        names = _group_names(present, role)
        if number < 1:
            raise ConfigError([Problem(f"{role}={number}", "a deployment has one of each", "write 1 or more")])
        gone = set(names[number:])
        staying = [engine for engine in staying if not (engine.role == role and engine.group in gone)]
        free = (f"group{n}" for n in count(1) if f"group{n}" not in names)
        wanted += [(role, next(free)) for _ in range(number - len(names))]
    if not wanted:
        return tuple(staying)
    machine = machine or this_machine()
    with naming_lines(config_file):
        new = _new_engines(load_deployment(config_file), config_file, present, wanted, machine)
    needed = sum(engine.memory_bytes for engine in new)
    if needed > machine.available_bytes:
        text = f"{needed / GIB:.1f} GiB of memory are needed, {machine.available_bytes / GIB:.1f} GiB is available"
        raise MachineError([Problem(_asked(num_groups), text, "ask for fewer, or end other programs")])
    return (*staying, *new)


def _new_engines(
    deployment: Deployment,
    config_file: Path,
    present: Engines,
    wanted: Sequence[tuple[Pool, str]],
    machine: Machine,
) -> Engines:
    taken = {port for engine in present for port in engine.ports}
    for claim in port_claims(deployment):
        taken.update(range(claim.first, claim.last + 1))
    pools: dict[str, dict[str, Group]] = {role: dict(getattr(deployment.deployment, role)) for role in POOLS}
    for role, name in wanted:
        written = pools[role].get(name)  # of the file, and stopped some time ago
        pools[role][name] = written or _copy(deployment, role, present, taken)
    enlarged = deployment.model_copy(update={"deployment": deployment.deployment.model_copy(update=pools)})
    raise_any(port_problems(enlarged))
    model = read_model_info(load_plan(config_file, machine).model_path)
    plan = make_plan(enlarged, model, machine, config_file=config_file)
    return tuple(engine for engine in plan.processes if (engine.role, engine.group) in set(wanted))


def _copy(deployment: Deployment, role: Pool, present: Engines, taken: set[int]) -> Group:
    """A group like the first of its role. `taken` grows by its ports."""
    pool: dict[str, Group] = getattr(deployment.deployment, role)
    if not pool:
        text = f"has no {role} group to make others like it"
        raise ConfigError([Problem(f"deployment.{role}", text, "write one there and start it again")])
    name, first = next(iter(pool.items()))
    if deployment.effective_platform != "cpu":
        text = "a new group needs devices of its own, and the deployment file alone knows which"
        raise ConfigError([Problem(f"deployment.{role}", text, "write the group there and start it again")])
    running = next(engine for engine in present if engine.role == role)
    num_ranks = sum((engine.role, engine.group) == (role, running.group) for engine in present)
    port = next(
        (
            port
            for port in range(first.base_api_port + _PORT_STEP, _HIGHEST_API_PORT, _PORT_STEP)
            if _are_free(running.host, _ports(port, num_ranks), taken)
        ),
        None,
    )
    if port is None:
        raise MachineError([Problem(f"deployment.{role}.{name}.base_api_port", "no ports above are free", "lower it")])
    taken.update(_ports(port, num_ranks))
    changes: dict[str, object] = {
        "base_api_port": port,
        "base_kv_port": None,
        "base_event_port": None,
        "master_port": None,
        "host_overrides": {},  # they would win with the first one's ports
        "kv_cache_gib": running.kv_bytes / GIB,
    }
    return first.model_copy(update=changes)


def _ports(base_api_port: int, num_ranks: int) -> set[int]:
    api = range(base_api_port, base_api_port + num_ranks)
    events = range(base_api_port + EVENT_PORT_OFFSET, base_api_port + EVENT_PORT_OFFSET + 2 * num_ranks)
    return {*api, *(port + KV_PORT_OFFSET for port in api), *events, base_api_port + MASTER_PORT_OFFSET}


def _are_free(host: str, ports: Iterable[int], taken: set[int]) -> bool:
    return all(port not in taken and _is_free(host, port) for port in ports)


def _is_free(host: str, port: int) -> bool:
    try:
        socket.create_server((host, port)).close()
    except OSError:
        return False
    return True


def _group_names(engines: Engines, role: str) -> list[str]:
    """In the order in which they were started."""
    return list(dict.fromkeys(engine.group for engine in engines if engine.role == role))


def _asked(num_groups: Mapping[Pool, int]) -> str:
    return " ".join(f"{role}={number}" for role, number in num_groups.items())

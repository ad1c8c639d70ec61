"""A launch plan for people (a table) and for programs (a dictionary that json takes). Neither shows a secret."""

import re
import shlex
from collections.abc import Iterator, Mapping
from typing import Any

from rich.table import Table
from rich.text import Text

from omni.deployment.memory import GIB
from omni.deployment.plan_types import LaunchPlan, ProcessPlan

HIDDEN = "***"
_DEVICES = "ASCEND_RT_VISIBLE_DEVICES"
# "key" and "token" as the last word: --tokenizer and --long-prefill-token-threshold hide nothing.
# In URLs with and without a scheme, up to the last "@": a password may have one.
_CREDENTIALS = re.compile(r"""(//|(?:^|[\s"'=,;])(?=[^\s"'=,;/@:]*:(?!//)))[^\s"']*@""")
_SECRET_NAME = re.compile(r"(^|[-_])(api)?(key|token)$|secret|passw|credential", re.IGNORECASE)


def plan_table(plan: LaunchPlan) -> Table:
    title = f"{plan.name}: {plan.served_model_name} in {plan.dtype}"
    caption = f"memory in GiB\nmodel {plan.model_path}\nlogs in {plan.proxy.log_file.parent}"
    if plan.control_addresses:
        caption += f"\nengines join at {', '.join(plan.control_addresses)}"
    if plan.deployment.backend != "local":
        caption += f"\nbackend {plan.deployment.backend}; each host decides about cores and KV when it starts its part"
    if not plan.model_is_known:
        caption += "\nthe model is not on this machine: arguments that depend on it are decided on the hosts, too"
    has_devices = any(_DEVICES in process.env for process in plan.processes)
    # Text, so that rich takes no part of a path or a name for its markup.
    table = Table(title=Text(title, style="table.title"), caption=Text(caption, style="table.caption"))
    for heading in ("process", "url", "devices" if has_devices else "cores"):
        table.add_column(heading, overflow="fold")
    for heading in ("KV", "memory"):
        table.add_column(heading, justify="right")
    for process in plan.processes:
        url = f"(on {process.host})" if process.is_headless else process.url
        cores = ",".join(map(str, process.cpu_cores)) or "any"
        kv = _gib(process.kv_bytes) if process.kv_bytes else "-"
        where = process.env.get(_DEVICES, "") if has_devices else cores
        table.add_row(Text(process.name), Text(url), Text(where), kv, _gib(process.memory_bytes))
    table.add_section()
    table.add_row("total", f"{len(plan.hosts)} host(s)", "", "", _gib(sum(p.memory_bytes for p in plan.processes)))
    return table


def plan_as_dict(plan: LaunchPlan) -> dict[str, Any]:
    """Everything in the plan, for showing: hidden values cannot be started from."""
    return {
        "name": plan.name,
        "config_file": str(plan.config_file),
        "model_path": str(plan.model_path),
        "served_model_name": plan.served_model_name,
        "dtype": plan.dtype,
        "connector": plan.connector,
        "backend": plan.deployment.backend,
        "model_is_known": plan.model_is_known,
        "key_file": None if plan.key_file is None else str(plan.key_file),
        "control_addresses": list(plan.control_addresses),
        "processes": [_process_as_dict(process) for process in plan.processes],
    }


def shown_command(process: ProcessPlan) -> str:
    """The command as one would type it."""
    return shlex.join(_without_secrets(process.command))


def _process_as_dict(process: ProcessPlan) -> dict[str, Any]:
    return {
        "name": process.name,
        "role": process.role,
        "group": process.group,
        "dp_rank": process.dp_rank,
        "node_rank": process.node_rank,
        "host": process.host,
        "url": None if process.is_headless else process.url,
        "kv_address": process.kv_address,
        "command": list(_without_secrets(process.command)),
        "env": dict(_env_without_secrets(process.env)),
        "log_file": str(process.log_file),
        "cpu_cores": list(process.cpu_cores),
        "kv_bytes": process.kv_bytes,
        "memory_bytes": process.memory_bytes,
    }


def _is_secret(name: str) -> bool:
    return _SECRET_NAME.search(name) is not None


def _env_without_secrets(env: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    for name, value in env.items():
        yield name, HIDDEN if _is_secret(name) else _without_credentials(value)


def _without_secrets(command: tuple[str, ...]) -> Iterator[str]:
    """Hides what follows a flag such as --api-key, up to the next flag, what stands behind its "=", and in URLs."""
    hiding = False
    for part in command:
        if part.startswith("-"):
            flag, equals, _ = part.partition("=")
            hiding = _is_secret(flag)
            yield f"{flag}={HIDDEN}" if hiding and equals else _without_credentials(part)
        else:
            yield HIDDEN if hiding else _without_credentials(part)


def _without_credentials(text: str) -> str:
    """ "http://user:password@proxy:3128" → "http://***@proxy:3128\""""
    return _CREDENTIALS.sub(rf"\1{HIDDEN}@", text)


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / GIB:.2f}"

"""Before anything starts: does this machine have, now, what the plan needs?"""

import os
import socket
from collections.abc import Iterator

import psutil

from kv_transfer.auth import default_key_path, load_key, load_or_make_key
from omni.deployment.errors import MachineError, Problem, raise_any
from omni.deployment.line_numbers import naming_lines
from omni.deployment.machine import Machine, this_machine
from omni.deployment.memory import GIB
from omni.deployment.plan_types import LaunchPlan, ProcessPlan

# Inherited by every engine, it would silently win over the plan's --kv-cache-memory-bytes.
_OVERRIDING_VARIABLE = "VLLM_CPU_KVCACHE_SPACE"


def check_machine(plan: LaunchPlan, machine: Machine | None = None) -> None:
    """Looks at this machine's ports, memory, the model's folder and the environment.

    Raises:
        MachineError: with every problem found.
    """
    machine = machine or this_machine()
    found = [
        *_model_problems(plan),
        *_expert_problems(plan),
        *_key_problems(plan),
        *_environment_problems(),
        *_port_problems(plan),
        *_memory_problems(plan, machine),
    ]
    with naming_lines(plan.config_file):
        raise_any(found, MachineError)


def _model_problems(plan: LaunchPlan) -> Iterator[Problem]:
    if not (plan.model_path / "config.json").is_file():
        text = f"{plan.model_path} holds no config.json"
        yield Problem("services.model_path", text, "write the path of a Hugging Face model folder")


def _key_problems(plan: LaunchPlan) -> Iterator[Problem]:
    """This user's own key is made here; one that the file names must be there."""
    try:
        load_or_make_key(default_key_path()) if plan.key_file is None else load_key(plan.key_file)
    except ValueError as error:
        yield Problem("services.kv_transfer.key_file", str(error), "or write the path of another key")


def _expert_problems(plan: LaunchPlan) -> Iterator[Problem]:
    """vLLM 0.32 starts such engines on a CPU, and then fails every request with NotImplementedError."""
    for process in plan.processes:
        if process.dp_rank == 0 and process.cpu_cores and "--enable-expert-parallel" in process.command:
            field = f"deployment.{process.role}.{process.group}.data_parallel_size"
            text = f"{process.env['VLLM_DP_SIZE']}: vLLM has no CPU kernel for experts that are spread over DP ranks"
            yield Problem(field, text, "write 1, and more groups in its place")


def _environment_problems() -> Iterator[Problem]:
    if os.environ.get(_OVERRIDING_VARIABLE):
        text = "is set, and vLLM would size its KV caches by it instead of by the plan"
        yield Problem(f"environment variable {_OVERRIDING_VARIABLE}", text, f"unset {_OVERRIDING_VARIABLE}")


def _port_problems(plan: LaunchPlan) -> Iterator[Problem]:
    for process in plan.processes:
        for key, port in _ports(process):
            if _is_taken(process.host, port):
                pool = f"deployment.{process.role}"
                field = f"{pool}.{process.group}.{key}" if process.group else f"{pool}.{key}"
                text = f"port {port} on {process.host} for {process.name} is taken{_taker(port)}"
                mend = "end that process or write another port"
                yield Problem(field, text, f"{mend}, or 0 for none" if key == "control_port" else mend)


def _ports(process: ProcessPlan) -> Iterator[tuple[str, int]]:
    """What the process listens on, each with the key that decides it."""
    if process.is_headless:
        return
    yield ("base_api_port" if process.group else "listen_port"), process.port
    if process.kv_port is not None:
        yield "base_kv_port", process.kv_port
    if process.control_port is not None:
        yield "control_port", process.control_port
    if process.event_port is not None:
        yield "base_event_port", process.event_port
        yield "base_event_port", process.event_port + 1
    if process.link_address is not None and not process.is_headless:
        link_port = int(process.link_address.rpartition(":")[2])
        yield from (("master_port", link_port - 1), ("master_port", link_port))
    if process.dp_rank == 0 and "--data-parallel-rpc-port" in process.command:
        yield "master_port", int(process.env["VLLM_DP_MASTER_PORT"])


def _is_taken(host: str, port: int) -> bool:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        # As servers do: a port whose last connections are still fading counts as free.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return True
    return False


def _taker(port: int) -> str:
    """Who listens there, where the system tells us."""
    try:
        for connection in psutil.net_connections("tcp"):
            is_it = connection.status == psutil.CONN_LISTEN and connection.laddr and connection.laddr.port == port
            if is_it and connection.pid:
                return f" by process {connection.pid} ({psutil.Process(connection.pid).name()})"
    except psutil.Error:  # another user's process, or one that has just ended
        pass
    return ""


def _memory_problems(plan: LaunchPlan, machine: Machine) -> Iterator[Problem]:
    needed = sum(process.memory_bytes for process in plan.processes)
    if needed <= machine.available_bytes:
        return
    each = ", ".join(
        f"{process.name} {_gib(process.memory_bytes)} ({_gib(process.kv_bytes)} of it KV cache)"
        if process.kv_bytes
        else f"{process.name} {_gib(process.memory_bytes)}"
        for process in plan.processes
    )
    text = f"needs {_gib(needed)} GiB of memory, {_gib(machine.available_bytes)} GiB is available; in GiB: {each}"
    mend = "lower max_model_len or kv_cache_gib, take out a group, or end other programs"
    yield Problem(str(plan.config_file), text, mend)


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / GIB:.1f}"

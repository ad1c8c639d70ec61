"""Runs engines of one deployment on this host: imports vLLM once, forks and supervises one api server per DP rank.

`python -m services.engine_host --config FILE` runs every group; with `--on HOST` what the file has on that host.
`python -m services.prefill --config FILE --group group1` (or services.decode, services.mixed) runs one group; where a
cluster gives out addresses, `--listen` and `--join` say where it is and which proxies it joins.
"""

import argparse
import logging
import os
import signal
import socket
import sys
import traceback
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import NoReturn

from kv_transfer.auth import DeploymentKey, default_key_path, load_key, load_or_make_key
from omni.adaptors.vllm import api_server, fork_start
from omni.adaptors.vllm.load_report import LoadReader, vllm_version
from omni.deployment.backends.local import RUN_NAME
from omni.deployment.engines_file import read_engines, write_engines
from omni.deployment.errors import DeploymentError
from omni.deployment.groups import Pool
from omni.deployment.load import load_plan
from omni.deployment.machine import interface_of
from omni.deployment.plan_types import LaunchPlan, ProcessPlan
from omni.deployment.relocate import Relocation
from omni.deployment.run_state import RunFolder
from omni.process import die_with_parent, mark_traces, obey_parent, remove_traces
from omni.supervisor import STOP_SIGNALS, Child, Supervisor
from services.instance_agent import AgentSettings, InstanceAgent
from services.node_link import FirstNode, join_first_node

# What vLLM logs on its way up, how far that is, and what it is doing then.
STAGES = (
    (b"Importing vLLM", 0.05, "importing vLLM"),
    (b"non-default args", 0.2, "reading the configuration"),
    (b"Initializing a V1 LLM engine", 0.4, "starting the engine"),
    (b"Starting to load model", 0.55, "loading weights"),
    (b"KV cache size", 0.75, "making the KV cache"),
    (b"Supported tasks", 0.9, "starting the api server"),
)


def main(role: Pool | None = None) -> int:
    obey_parent()
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # until the supervisor listens; it reads what there shall be then
    args = _parser(role).parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    try:
        plan, engines = _engines(args, role)
    except DeploymentError as error:
        print(error, file=sys.stderr)
        return 2
    return run(plan, engines)


def _parser(role: Pool | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True, help="deployment file")
    if role is None:
        parser.add_argument("--on", metavar="HOST", help="this machine, as the file names it")
        return parser
    parser.add_argument("--group", required=True, help="the group to run, for example group1")
    parser.add_argument("--listen", metavar="ADDRESS", help="this machine's, if not the one in the file")
    parser.add_argument(
        "--join",
        action="append",
        default=[],
        type=_address,
        metavar="HOST:PORT",
        help="with --listen: a proxy's control port",
    )
    parser.add_argument("--node", type=int, default=0, help="with --listen: which of the group's hosts this is")
    parser.add_argument("--master", metavar="ADDRESS", help="with --node: that of node 0")
    parser.add_argument("--base-api-port", type=_port, help="with --listen: instead of the file's")
    return parser


def run(plan: LaunchPlan, engines: tuple[ProcessPlan, ...]) -> int:
    """Supervise these engines until SIGTERM; returns the exit code. All of a local deployment's can be scaled."""
    remove_traces()
    eager = all("--enforce-eager" in engine.command for engine in engines)
    fork_start.exec_with(fork_start.exec_environment(eager=eager))
    folder = RunFolder.of(os.environ.get(RUN_NAME) or plan.folder_name)
    fork_start.import_vllm(plan.model_path)
    deployment = folder.deployment()
    is_whole = engines == plan.engines and plan.proxy_elsewhere is None
    if deployment is None or not deployment.is_running or not is_whole:  # nobody could ask for others
        return Supervisor([_child(plan, engine) for engine in engines], folder).run()
    scaled = read_engines(folder)  # if this host was started again
    if scaled is None:
        write_engines(folder, engines)
    children = [_child(plan, engine) for engine in scaled or engines]
    return Supervisor(children, folder, on_request=partial(_scale, plan, folder)).run()


def _child(plan: LaunchPlan, engine: ProcessPlan, *, is_optional: bool = False) -> Child:
    return Child(
        name=engine.name,
        start=partial(_fork, partial(_serve, plan, engine)),
        log_file=engine.log_file,
        ready_url=f"{engine.leader_url or engine.url}/health",
        stages=STAGES,
        is_optional=is_optional,
    )


def _scale(plan: LaunchPlan, folder: RunFolder, supervisor: Supervisor) -> None:
    """Start and stop engines until they are those of the file that `omni_cli scale` has written."""
    engines = read_engines(folder)
    if engines is None:
        return
    running = supervisor.names
    for name in set(running) - {engine.name for engine in engines}:
        supervisor.stop(name)
    for engine in engines:
        if engine.name not in running:
            supervisor.add(_child(plan, engine, is_optional=True))


def _engines(args: argparse.Namespace, role: Pool | None) -> tuple[LaunchPlan, tuple[ProcessPlan, ...]]:
    """The plan and those of its engines that run here."""
    if role is None:
        plan = _plan_here(args.config, args.on, "--on HOST")
        part = plan if args.on is None else plan.part(args.on, "engines")
        return part, part.engines
    if args.listen is None:
        _refuse_without_listen(args)
        plan = _plan_here(args.config, None, "--listen ADDRESS")
        engines = plan.instance(role, args.group)
    else:
        relocation = Relocation(
            role=role,
            group=args.group,
            listen=args.listen,
            join=tuple(args.join),
            node=args.node,
            master=args.master,
            base_api_port=args.base_api_port,
        )
        plan = load_plan(args.config, relocation=relocation)
        engines = tuple(engine for engine in plan.instance(role, args.group) if engine.host == args.listen)
    if not engines:
        groups = sorted({process.group for process in plan.processes if process.role == role})
        raise DeploymentError(f"--group: there is no {role} group {args.group!r}; the deployment file has {groups}")
    return plan, engines


def _plan_here(config: Path, on: str | None, option: str) -> LaunchPlan:
    plan = load_plan(config, on=on)
    if on is None and plan.deployment.backend != "local":
        text = f"is needed with backend {plan.deployment.backend}: which of its engines run on this machine?"
        raise DeploymentError(f"{option}: {text}")
    return plan


def _refuse_without_listen(args: argparse.Namespace) -> None:
    for option in ("join", "node", "master", "base_api_port"):
        if getattr(args, option):
            raise DeploymentError(f"--{option.replace('_', '-')}: goes with --listen ADDRESS; write that, too")


def _port(text: str) -> int:
    if not text.isdecimal() or not 1024 <= int(text) <= 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is not a port number; write a number from 1024 to 65535")
    return int(text)


def _address(text: str) -> str:
    host, _, port = text.rpartition(":")
    if not host or not port.isdecimal() or not 1 <= int(port) <= 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is not HOST:PORT; write one such as 10.0.0.1:7001")
    return text


def _serve(plan: LaunchPlan, engine: ProcessPlan) -> None:
    os.environ.update(engine.env)
    if "VLLM_HOST_IP" in engine.env:
        _choose_interface(engine.host)
    key = load_or_make_key(default_key_path()) if plan.key_file is None else load_key(plan.key_file)
    if engine.link_address is not None:
        _hold_on_to_other_nodes(engine, engine.link_address, key)
    if engine.is_headless:
        api_server.work_for_another_host(engine.arguments)
        return
    if not plan.control_addresses:
        api_server.serve(engine.arguments)
        return
    api_server.serve(engine.arguments, partial(InstanceAgent, _agent_settings(plan, engine), key, LoadReader()))


def _choose_interface(host: str) -> None:
    """Have gloo and HCCL use the network of the file's address; by themselves they go by the host's name."""
    try:
        address = socket.gethostbyname(host)
    except OSError:
        return  # nor will vLLM find it, and it says so
    if interface := interface_of(address):
        os.environ.setdefault("HCCL_IF_IP", address)
        for name in ("GLOO_SOCKET_IFNAME", "TP_SOCKET_IFNAME", "HCCL_SOCKET_IFNAME"):
            os.environ.setdefault(name, interface)


def _hold_on_to_other_nodes(engine: ProcessPlan, link_address: str, key: DeploymentKey) -> None:
    host, _, port = link_address.rpartition(":")
    if engine.is_headless:
        join_first_node((host, int(port)), engine.node_rank, key)
    else:
        FirstNode((host, int(port)), key)


def _agent_settings(plan: LaunchPlan, engine: ProcessPlan) -> AgentSettings:
    is_prefill = engine.role == "prefill"
    return AgentSettings(
        proxies=plan.control_addresses,
        role=engine.role,
        url=engine.url,
        kv_address=engine.kv_address if is_prefill and plan.mode == "layerwise" else None,
        bootstrap_url=f"http://{engine.kv_address}" if is_prefill and plan.connector == "mooncake" else None,
        kv_events=engine.event_address,
        facts={
            "model": plan.served_model_name,
            "vllm": vllm_version(),
            "dtype": plan.dtype,
            "connector": plan.connector,
            "mode": plan.mode,
        },
    )


def _fork(serve: Callable[[], None], output: int) -> int:
    """Run `serve` in a child with `output` as its stdout and stderr; returns the child's pid."""
    parent_pid = os.getpid()
    # Held back until the child answers them itself: the supervisor's handler would swallow them there.
    held_back = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        pid = os.fork()
        if pid:
            return pid
        _run_child(serve, output, parent_pid, held_back)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, held_back)


def _run_child(serve: Callable[[], None], output: int, parent_pid: int, mask: Iterable[int]) -> NoReturn:
    code = 1
    try:
        die_with_parent(parent_pid)
        os.dup2(output, 1)
        os.dup2(output, 2)
        _close_inherited()
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGUSR1, signal.SIG_DFL)
        for number in STOP_SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        mark_traces()
        serve()
        code = 0
    except SystemExit as stop:
        code = _exit_code(stop)
    except BaseException:
        traceback.print_exc()
    finally:
        try:
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(code)  # whatever happens: what is below on the stack is the supervisor's


def _exit_code(stop: SystemExit) -> int:
    if stop.code is None or isinstance(stop.code, int):
        return stop.code or 0
    print(stop.code, file=sys.stderr)
    return 1


def _close_inherited() -> None:
    """Close the supervisor's descriptors; those of the child are 0, 1 and 2."""
    for name in os.listdir("/proc/self/fd"):
        if int(name) > 2:
            try:
                os.close(int(name))
            except OSError:  # the listing's own, closed already
                continue


if __name__ == "__main__":
    sys.exit(main())

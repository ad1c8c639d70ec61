"""Run a launch plan, or this host's part of one: an engine host for all engines (one import of vLLM), and the proxy."""

import os
import sys
from collections.abc import Callable, Sequence
from functools import partial

from omni.deployment.errors import DeploymentError
from omni.deployment.plan_types import LaunchPlan
from omni.deployment.run_state import DeploymentState, RunFolder, one_at_a_time
from omni.process import parent_environment, remove_traces, start_ticks
from omni.supervisor import Child, Supervisor

ENGINE_HOST = "engine_host"
RUN_NAME = "OMNI_RUN_NAME"  # tells the engine host whose run folder is its own


def serve(plan: LaunchPlan, *, on: str | None = None, on_tick: Callable[[], bool] | None = None) -> int:
    """Run the deployment until SIGTERM or SIGINT; returns the exit code.

    Args:
        on: the host of the file that this machine is, if `plan` is only its part.
        on_tick: called some times a second until it returns False.

    Raises:
        DeploymentError: a deployment of that name is running.
    """
    folder = claim_folder(plan, state=_state(plan))
    remove_traces()
    log_folder = plan.proxy.log_file.parent
    children = []
    if plan.engines:
        where = () if on is None else ("--on", on)
        command = (sys.executable, "-m", "services.engine_host", "--config", str(plan.config_file), *where)
        children.append(
            Child(
                name=ENGINE_HOST,
                start=partial(_spawn, command, {RUN_NAME: plan.folder_name}),
                log_file=log_folder / f"{ENGINE_HOST}.log",
                stop_timeout_s=30,
                final_codes=(1, 2),
            )
        )
    if plan.runs_proxy:
        children.append(
            Child(
                name=plan.proxy.name,
                start=partial(_spawn, plan.proxy.command, dict(plan.proxy.env)),
                log_file=plan.proxy.log_file,
                ready_url=f"{plan.proxy.url}/live",
            )
        )
    try:
        return Supervisor(children, folder, on_tick=on_tick).run()
    finally:
        remove_traces()
        folder.remove()


def claim_folder(plan: LaunchPlan, *, state: DeploymentState | None = None) -> RunFolder:
    """The deployment's run folder, emptied of what a killed launcher left there, and with `state` in it.

    Raises:
        DeploymentError: a deployment of that name is running.
    """
    folder = RunFolder.of(plan.folder_name)
    with one_at_a_time():
        earlier = folder.deployment()
        if earlier is not None and earlier.is_running:
            by = f"pid {earlier.launcher_pid}" if earlier.backend == "local" else f"backend {earlier.backend}"
            raise DeploymentError(
                f"deployment {plan.folder_name!r} is running already ({by}): "
                f"`omni_cli stop {plan.folder_name}` first, or give this one another `name`"
            )
        folder.remove()
        if state is not None:
            folder.write_deployment(state)
    return folder


def _state(plan: LaunchPlan) -> DeploymentState:
    return DeploymentState(
        name=plan.folder_name,
        config_file=str(plan.config_file.resolve()),
        log_folder=str(plan.proxy.log_file.parent.resolve()),
        proxy_url=plan.proxy.url,
        served_model_name=plan.served_model_name,
        process_names=tuple(process.name for process in plan.processes),
        launcher_pid=os.getpid(),
        launcher_start_ticks=start_ticks(os.getpid()),
    )


def _spawn(command: Sequence[str], env: dict[str, str], output: int) -> int:
    """Start a program with `output` as its stdout and stderr; returns its pid. It ends when this process ends."""
    return os.posix_spawn(
        command[0],
        list(command),
        {**os.environ, **env, **parent_environment()},
        file_actions=[
            (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),  # to read the terminal would stop it
            (os.POSIX_SPAWN_DUP2, output, 1),
            (os.POSIX_SPAWN_DUP2, output, 2),
        ],
        # Ctrl-C is for the launcher alone, which then stops its children in order. No session of its own: between
        # sessions Linux shares out each core (autogroup), and 6.18 lets the proxy wait for seconds beside engines.
        setpgroup=0,
    )

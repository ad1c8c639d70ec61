"""`omni_cli serve`, `stop` and `render`: start a deployment, here or elsewhere, end it, or write what would run."""

import time
from pathlib import Path
from typing import Annotated, Final, get_args

import typer

from omni.cli import detached, running
from omni.cli.clear_errors import clear_errors
from omni.cli.plain_console import plain_console
from omni.cli.progress import StartProgress
from omni.deployment.backends import local, remote_backend
from omni.deployment.checks import check_machine
from omni.deployment.errors import DeploymentError
from omni.deployment.line_numbers import naming_lines
from omni.deployment.load import load_plan
from omni.deployment.model import Backend
from omni.deployment.plan_types import LaunchPlan, Part
from omni.deployment.run_state import RunFolder, one_at_a_time

REMOTE: Final = tuple(name for name in get_args(Backend) if name != "local")

console = plain_console()

Config = Annotated[Path, typer.Argument(help="deployment file, for example configs/demo.yaml")]
Name = Annotated[str | None, typer.Argument(help="deployment name; not needed while only one runs")]


@clear_errors
def serve(
    config: Config,
    detach: Annotated[bool, typer.Option("--detach", help="return once it is ready; `omni_cli stop` ends it")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="no progress bars")] = False,
    on: Annotated[str | None, typer.Option("--on", metavar="HOST", help="only what the file has on this host")] = None,
    part: Annotated[str | None, typer.Option("--part", help="with --on: engines or proxy; default: both")] = None,
    start_timeout_s: Annotated[
        float, typer.Option("--start-timeout-s", min=1, max=86400, help="with --detach: for all to be ready")
    ] = detached.START_TIMEOUT_S,
) -> None:
    """Start a deployment. On this machine Ctrl-C stops all of it; other backends go on until `omni_cli stop`."""
    launch_plan = _part(config, on, part)
    if on is None and launch_plan.deployment.backend != "local":
        _serve_elsewhere(launch_plan)
        return
    check_machine(launch_plan)
    if detach:
        detached.start(launch_plan, console, on=on, part=part, timeout_s=start_timeout_s)
        return
    folder = RunFolder.of(launch_plan.folder_name)
    if quiet:
        raise typer.Exit(local.serve(launch_plan, on=on))
    with StartProgress(folder, tuple(p.name for p in launch_plan.processes), console) as progress:

        def draw() -> bool:
            starting = progress.update()
            if not starting:
                progress.close()
                _print_ready(launch_plan)
            return starting

        code = local.serve(launch_plan, on=on, on_tick=draw)
    raise typer.Exit(code)


@clear_errors
def stop(name: Name = None) -> None:
    """Stop a running deployment; returns once all its processes have ended."""
    deployment = running.find(name)
    if deployment.backend == "local":
        running.stop(deployment)
    else:
        remote_backend(deployment.backend).stop(deployment, _say)
        RunFolder.of(deployment.name).remove()
    console.print(f"{deployment.name} stopped")


@clear_errors
def render(
    config: Config,
    output: Annotated[Path, typer.Option("--output", "-o", help="folder to write to; made if it is not there")],
    backend: Annotated[
        str | None, typer.Option("--backend", help=f"{', '.join(REMOTE)}; default: the deployment file's")
    ] = None,
) -> None:
    """Write what a backend would run, and run nothing."""
    launch_plan = load_plan(config, backend=backend)
    chosen = launch_plan.deployment.backend
    if chosen == "local":
        raise DeploymentError(f"backend local has nothing to write: see `omni_cli plan {config}`, or give --backend")
    started_s = time.monotonic()
    with naming_lines(launch_plan.config_file):
        files = remote_backend(chosen).render(launch_plan, output)
    for file in files:
        console.print(str(file), highlight=False, soft_wrap=True)
    console.print(
        f"{len(files)} files for {len(launch_plan.processes)} processes, {time.monotonic() - started_s:.1f} s"
    )


def _part(config: Path, on: str | None, part: str | None) -> LaunchPlan:
    if on is None:
        if part is not None:
            raise DeploymentError("--part: goes with --on HOST; without it all parts run here")
        return load_plan(config)
    kind: Part | None = next((known for known in get_args(Part) if known == part), None)
    if part is not None and kind is None:
        raise DeploymentError(f"--part: {part!r} is not one of {', '.join(get_args(Part))}")
    plan = load_plan(config, on=on).part(on, kind)
    if not plan.processes:
        text = f"{on} has no {part or 'process'} in {config}; leave out --part, or name another host"
        raise DeploymentError(f"--on: {text}")
    return plan


def _serve_elsewhere(plan: LaunchPlan) -> None:
    folder = RunFolder.of(plan.name)
    with one_at_a_time():
        earlier = folder.deployment()
        if earlier is not None and earlier.is_running and earlier.backend != plan.deployment.backend:
            raise DeploymentError(
                f"deployment {plan.name!r} runs by backend {earlier.backend}: `omni_cli stop {plan.name}` first"
            )
    started_s = time.monotonic()
    with naming_lines(plan.config_file):
        state = remote_backend(plan.deployment.backend).serve(plan, _say)
    folder.write_deployment(state)
    console.print(
        f"ready after {time.monotonic() - started_s:.0f} s: {state.served_model_name} at {state.proxy_url}; "
        f"`omni_cli status {state.name}` shows it, `omni_cli stop {state.name}` ends it",
        soft_wrap=True,
    )


def _say(text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def _print_ready(launch_plan: LaunchPlan) -> None:
    console.print(
        f"ready: {launch_plan.served_model_name} ({launch_plan.dtype}) at {launch_plan.proxy.url}; Ctrl-C stops"
    )

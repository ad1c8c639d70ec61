"""`omni_cli restart`: start engines again, one after another, with no failed request.

Each engine is drained and removed from the proxy, restarted by its supervisor, and given requests again when ready.
"""

import sys
from collections.abc import Sequence
from typing import Annotated, Final

import typer

from omni.cli import running
from omni.cli.clear_errors import clear_errors
from omni.cli.deployment_view import engine_plans
from omni.cli.plain_console import plain_console
from omni.cli.rolling_restart import RollingRestart, Unit, units_of
from omni.deployment.admin_client import AdminClient
from omni.deployment.errors import DeploymentError
from omni.deployment.proxy_access import ProxyAccess
from omni.deployment.run_state import DeploymentState

PROXY: Final = "proxy"

console = plain_console()

Processes = Annotated[
    list[str] | None,
    typer.Argument(metavar="PROCESS", help="for example decode.group1.rank0, or proxy; without any: every engine"),
]
DeploymentName = Annotated[str | None, typer.Option("--deployment", help="not needed while only one runs")]
WaitS = Annotated[float, typer.Option("--wait-s", min=0, max=3600, help="for an engine's requests to finish")]
StartTimeoutS = Annotated[float, typer.Option("--start-timeout-s", min=1, max=86400, help="for one to be ready again")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="also where nobody else serves meanwhile; ask nothing")]
Force = Annotated[bool, typer.Option("--force", help="after --wait-s restart it even if it has requests, which fail")]


@clear_errors
def restart(
    processes: Processes = None,
    deployment_name: DeploymentName = None,
    wait_s: WaitS = 60.0,
    start_timeout_s: StartTimeoutS = 1800.0,
    yes: Yes = False,
    force: Force = False,
) -> None:
    """Restart processes of a running deployment, one after another.

    No request fails while at least two engines of a role are up. An engine that is the only one of its role is
    restarted after a question, or with --yes. The ranks of a group that compute together are restarted together.
    """
    deployment = running.find(deployment_name)
    names = _names(deployment, processes or ())
    here = tuple(engine for engine in engine_plans(deployment) if engine.name in deployment.process_names)
    units = units_of([name for name in names if name != PROXY], here)
    client, problem = _admin_client(deployment)
    rolling = RollingRestart(deployment, client, _say, wait_s, start_timeout_s, by_force=force)
    if not yes:
        _ask(units, rolling.without_a_substitute(units), problem)
    for number, unit in enumerate(units):
        try:
            rolling.restart(unit)
        except DeploymentError as error:
            rest = [name for later in units[number + 1 :] for name in later.names] + [PROXY] * (PROXY in names)
            raise DeploymentError(f"{error}{_how_to_go_on(deployment, rest)}") from None
    if PROXY in names:
        rolling.restart_proxy()
    _say(f"{len(names)} restarted")


def _names(deployment: DeploymentState, wanted: Sequence[str]) -> list[str]:
    """In the order of the deployment. Raises DeploymentError."""
    known = deployment.process_names
    for name in wanted:
        if name not in known:
            raise DeploymentError(f"{deployment.name} has no process {name!r}; it has {', '.join(known)}")
    names = [name for name in known if (name in wanted if wanted else name != PROXY)]
    if not names:
        raise DeploymentError(f"{deployment.name} has no engines here: name one of {', '.join(known)}")
    return names


def _admin_client(deployment: DeploymentState) -> tuple[AdminClient | None, str]:
    """None: nothing can be drained, for a reason."""
    try:
        client = ProxyAccess.of(deployment).admin_client()
        client.instances()
    except (DeploymentError, OSError) as error:
        return None, str(error)
    return client, ""


def _ask(units: Sequence[Unit], alone: Sequence[Unit], problem: str) -> None:
    """Where requests may fail. Raises DeploymentError: there is nobody to ask."""
    names = ", ".join(name for unit in alone for name in unit.names)
    if units and problem:
        text = f"nothing can be drained, so requests may fail: {problem}"
    elif alone:
        text = f"{names}: nobody else of this role is up, so requests wait or fail until it is ready again"
    else:
        return
    if not sys.stdin.isatty():
        raise DeploymentError(f"{text}. Nothing was restarted; --yes does it all the same")
    typer.confirm(f"{text}. Restart?", abort=True)


def _say(line: str) -> None:
    console.print(line, markup=False, highlight=False, soft_wrap=True)


def _how_to_go_on(deployment: DeploymentState, rest: Sequence[str]) -> str:
    if not rest:
        return ""
    return (
        f"\nnot restarted: {', '.join(rest)}. When all is well again: "
        f"`omni_cli restart --deployment {deployment.name} {' '.join(rest)}`"
    )

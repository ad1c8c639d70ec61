"""Ways to run a launch plan. `local` runs it on this machine; the others, each a package, start it elsewhere."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Protocol, cast

from omni.deployment.errors import Problem
from omni.deployment.groups import Pool
from omni.deployment.plan_types import LaunchPlan
from omni.deployment.run_state import DeploymentState, ProcessState

Say = Callable[[str], None]  # prints a line of progress for people


class RemoteBackend(Protocol):
    """What the command line asks of a backend that starts processes on other hosts.

    Each method raises DeploymentError for what the user can mend; its text says how.
    """

    def problems(self, plan: LaunchPlan) -> Iterable[Problem]:
        """What this backend cannot do of the plan; found without asking any host."""
        ...

    def render(self, plan: LaunchPlan, folder: Path) -> tuple[Path, ...]:
        """Write into `folder` what `serve` would run; returns the files. Starts nothing, asks no host."""
        ...

    def serve(self, plan: LaunchPlan, say: Say) -> DeploymentState:
        """Start everything and return once it is ready. If that fails, what was started is stopped, or the error says
        what still runs and how to end it."""
        ...

    def stop(self, deployment: DeploymentState, say: Say) -> None:
        """End every process, wherever it runs. Once is enough; twice does no harm."""
        ...

    def restart(self, deployment: DeploymentState, names: Sequence[str], say: Say) -> None:
        """Start these processes again, where they have ended too; all of them if none is named."""
        ...

    def scale(self, deployment: DeploymentState, num_groups: Mapping[Pool, int], wait_s: float, say: Say) -> None:
        """Have so many groups of each role named; those that go are drained through the proxy first."""
        ...

    def process_states(self, deployment: DeploymentState) -> list[ProcessState]:
        """One for each process of the deployment, in its order; those of a host that does not answer say so."""
        ...

    def fetch_logs(self, deployment: DeploymentState, folder: Path) -> None:
        """Copy every process's log to `folder`/<process name>.log."""
        ...


def remote_backend(name: str) -> RemoteBackend:
    """The backend that a deployment file names, other than local."""
    module = import_module(f"omni.deployment.backends.{name}.backend")  # each has libraries that others need not
    return cast(RemoteBackend, module.Backend())

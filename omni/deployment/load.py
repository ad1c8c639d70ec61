"""Deployment file → launch plan for this machine: the one call that commands make."""

from pathlib import Path
from typing import get_args

from omni.deployment.deployment_file import load_deployment
from omni.deployment.errors import ConfigError, Problem, raise_any
from omni.deployment.line_numbers import naming_lines
from omni.deployment.local_hosts import host_problems
from omni.deployment.machine import Machine, this_machine
from omni.deployment.model import EMBEDDED, Backend, Deployment
from omni.deployment.model_info import FIELD, ModelInfo, read_model_info, unknown_model
from omni.deployment.plan import make_plan
from omni.deployment.plan_types import LaunchPlan
from omni.deployment.relocate import Relocation
from omni.deployment.validate import cross_field_problems


def load_plan(
    config_file: Path | str,
    machine: Machine | None = None,
    *,
    on: str | None = None,
    relocation: Relocation | None = None,
    backend: str | None = None,
) -> LaunchPlan:
    """Reads a deployment file and plans it. An embedded model is made first where it is missing (a minute).

    Args:
        on: the host of the file that this machine is, where each has its own part of the deployment.
        backend: instead of the file's.
        relocation: where the one group that is of interest runs, if not where the file says.

    Raises:
        ConfigError: the file, or the model it names, cannot be used; the text says where, with the line, and what to
            write instead.
    """
    config_file = Path(config_file).absolute()
    with naming_lines(config_file):
        deployment = load_deployment(config_file)
        if backend is not None:
            deployment = deployment.model_copy(update={"backend": _known(backend)})
            raise_any(cross_field_problems(deployment))  # its own rules may be others
        if relocation is not None:
            deployment, on = relocation.of(deployment), relocation.listen
        return _plan(deployment, machine or this_machine(), config_file, on)


def _plan(deployment: Deployment, machine: Machine, config_file: Path, on: str | None) -> LaunchPlan:
    wrong_hosts = tuple(host_problems(deployment, machine, on))
    if wrong_hosts and deployment.services.model_path.startswith(EMBEDDED):
        raise ConfigError(wrong_hosts)  # now rather than after a minute of making the model
    try:
        model = _model(deployment, on)
    except ConfigError as error:
        # A model that is missing here is no news when it lives on other hosts.
        raise ConfigError(wrong_hosts or error.problems) from None
    return make_plan(deployment, model, machine, config_file=config_file, on=on)


def _known(backend: str) -> str:
    if backend not in get_args(Backend):
        raise ConfigError([Problem("--backend", f"{backend!r} is not known", f"write {', '.join(get_args(Backend))}")])
    return backend


def _model(deployment: Deployment, on: str | None) -> ModelInfo:
    written = deployment.services.model_path
    if not written.startswith(EMBEDDED):
        folder = Path(written).expanduser().absolute()
        is_elsewhere = deployment.backend != "local" and on is None and not folder.exists()
        return unknown_model(folder) if is_elsewhere else read_model_info(folder)
    # Imported here: most deployments need neither the converters nor what they import.
    from omni.deployment.embedded_model import ensure_embedded_model

    try:
        folder = ensure_embedded_model(written.removeprefix(EMBEDDED))
    except (ValueError, ImportError, OSError) as error:
        mend = "write a model folder's path, or mend what the message names"
        raise ConfigError([Problem(FIELD, f"{written}: {error}", mend)]) from error
    return read_model_info(folder)

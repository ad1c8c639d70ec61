"""Deployment file → launch plan for this machine: the one call that commands make."""

from pathlib import Path

from omni.deployment.deployment_file import load_deployment
from omni.deployment.errors import ConfigError, Problem
from omni.deployment.local_hosts import host_problems
from omni.deployment.machine import Machine, this_machine
from omni.deployment.model import EMBEDDED, Deployment
from omni.deployment.model_info import FIELD, ModelInfo, read_model_info
from omni.deployment.plan import make_plan
from omni.deployment.plan_types import LaunchPlan


def load_plan(config_file: Path | str, machine: Machine | None = None) -> LaunchPlan:
    """Reads a deployment file and plans it. An embedded model is made first where it is missing (a minute).

    Raises:
        ConfigError: the file, or the model it names, cannot be used; the text says where and what to write instead.
    """
    config_file = Path(config_file).absolute()
    deployment = load_deployment(config_file)
    machine = machine or this_machine()
    wrong_hosts = tuple(host_problems(deployment, machine))
    if wrong_hosts and deployment.services.model_path.startswith(EMBEDDED):
        raise ConfigError(wrong_hosts)  # now rather than after a minute of making the model
    try:
        model = _model(deployment)
    except ConfigError as error:
        # A model that is missing here is no news when it lives on other hosts.
        raise ConfigError(wrong_hosts or error.problems) from None
    return make_plan(deployment, model, machine, config_file=config_file)


def _model(deployment: Deployment) -> ModelInfo:
    written = deployment.services.model_path
    if not written.startswith(EMBEDDED):
        return read_model_info(Path(written).expanduser().absolute())
    # Imported here: most deployments need neither the converters nor what they import.
    from omni.deployment.embedded_model import ensure_embedded_model

    try:
        folder = ensure_embedded_model(written.removeprefix(EMBEDDED))
    except (ValueError, ImportError, OSError) as error:
        mend = "write a model folder's path, or mend what the message names"
        raise ConfigError([Problem(FIELD, f"{written}: {error}", mend)]) from error
    return read_model_info(folder)

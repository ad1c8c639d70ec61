"""Kubernetes as a backend: it writes manifests, and leaves it to kubectl to apply them."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NoReturn

from omni.deployment.backends import Say
from omni.deployment.backends.kubernetes.engines import EngineManifests
from omni.deployment.backends.kubernetes.manifest_yaml import to_yaml
from omni.deployment.backends.kubernetes.names import Names
from omni.deployment.backends.kubernetes.nodes import pod_nodes
from omni.deployment.backends.kubernetes.pod_config import CONFIG_FILE, PodConfig
from omni.deployment.backends.kubernetes.pods import Manifest
from omni.deployment.backends.kubernetes.problems import problems
from omni.deployment.backends.kubernetes.proxy import ProxyManifests
from omni.deployment.backends.kubernetes.secrets_script import SCRIPT_NAME, secrets_script
from omni.deployment.errors import ConfigError, DeploymentError, Problem, raise_any
from omni.deployment.groups import POOLS, Pool, group_settings
from omni.deployment.line_numbers import naming_lines, shown_path
from omni.deployment.plan_types import LaunchPlan, ProcessPlan
from omni.deployment.run_state import DeploymentState, ProcessState

_HEAD = "# Written by omni_cli from {file}. First `sh {script}`, then `kubectl apply --server-side -f` this folder.\n"


class Backend:
    """Renders. What it would take to run is said by the error that each of the other methods raises."""

    def problems(self, plan: LaunchPlan) -> Iterable[Problem]:
        return problems(plan)

    def render(self, plan: LaunchPlan, folder: Path) -> tuple[Path, ...]:
        """Write the manifests and the script that makes the Secrets; equal plans give equal bytes.

        Raises:
            ConfigError: the deployment file asks for what pods cannot do, or lacks what they need.
            DeploymentError: the folder cannot be written.
        """
        with naming_lines(plan.config_file):
            raise_any(problems(plan))
            texts = self._texts(plan)
        try:
            return _write(folder, texts)
        except OSError as error:
            raise DeploymentError(f"{folder}: cannot be written ({error.strerror}): name another folder") from None

    def serve(self, plan: LaunchPlan, say: Say) -> DeploymentState:
        _refuse(plan.name, plan.config_file)

    def stop(self, deployment: DeploymentState, say: Say) -> None:
        _refuse(deployment.name, Path(deployment.config_file))

    def restart(self, deployment: DeploymentState, names: Sequence[str], say: Say) -> None:
        _refuse(deployment.name, Path(deployment.config_file))

    def scale(self, deployment: DeploymentState, num_groups: Mapping[Pool, int], wait_s: float, say: Say) -> None:
        _refuse(deployment.name, Path(deployment.config_file))

    def process_states(self, deployment: DeploymentState) -> list[ProcessState]:
        _refuse(deployment.name, Path(deployment.config_file))

    def fetch_logs(self, deployment: DeploymentState, folder: Path) -> None:
        _refuse(deployment.name, Path(deployment.config_file))

    @staticmethod
    def _texts(plan: LaunchPlan) -> dict[str, str]:
        """Every file that a rendered folder may have; an empty text: not this one."""
        names = Names(plan.name)
        config = PodConfig(plan, names)
        try:
            config_map = _config_map(names, config.text())
        except ValueError as error:
            mend = "spread its groups over several deployments"
            raise ConfigError([Problem(shown_path(plan.config_file), str(error), mend)]) from None
        head = _HEAD.format(file=plan.config_file.name, script=SCRIPT_NAME)
        engines: dict[str, list[Manifest]] = {role: [] for role in POOLS}
        for role, manifest in _engine_manifests(plan, names, config):
            engines[role].append(manifest)
        return {
            SCRIPT_NAME: secrets_script(plan, names),
            "config.yaml": head + to_yaml([config_map]),
            "proxy.yaml": head + to_yaml(list(ProxyManifests(plan, names).manifests())),
            **{f"{role}.yaml": head + to_yaml(own) if own else "" for role, own in engines.items()},
        }


def _engine_manifests(plan: LaunchPlan, names: Names, config: PodConfig) -> Iterator[tuple[Pool, Manifest]]:
    processes: dict[tuple[str, str], list[ProcessPlan]] = defaultdict(list)
    for process in plan.engines:
        processes[process.role, process.group].append(process)
    manifests = EngineManifests(plan, names, config)
    for group in group_settings(plan.deployment):
        nodes = pod_nodes(
            group,
            processes[group.role, group.name],
            plan.deployment.effective_platform,
            model_is_known=plan.model_is_known,
        )
        yield group.role, manifests.manifest(group, nodes)


def _config_map(names: Names, text: str) -> Manifest:
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": names.config_map, "labels": names.labels("config")},
        "data": {CONFIG_FILE: text},
    }


def _write(folder: Path, texts: Mapping[str, str]) -> tuple[Path, ...]:
    """What an earlier rendering left of groups that are gone must not be applied."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, text in texts.items():
        path = folder / name
        if text:
            path.write_text(text, encoding="utf-8")
            written.append(path)
        else:
            path.unlink(missing_ok=True)
    return tuple(written)


def _refuse(name: str, config_file: Path) -> NoReturn:
    """Raises DeploymentError with what to type."""
    labels = Names(name).selector
    raise DeploymentError(
        f"deployment {name!r} has the backend kubernetes, and that is driven by kubectl:\n"
        f"  omni_cli render {shown_path(config_file)} --backend kubernetes --output DIR   writes what it needs\n"
        f"  sh DIR/{SCRIPT_NAME} && kubectl apply --server-side -f DIR   starts it, or changes what has changed\n"
        f"  kubectl get pods -l {labels}   shows how it is\n"
        f"  kubectl logs -l {labels}   shows what it says\n"
        "  kubectl delete -f DIR   stops it"
    )

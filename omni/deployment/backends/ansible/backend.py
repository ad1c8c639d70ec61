"""`backend: ansible`: what `omni_cli` asks of a deployment on hosts that are reached by ssh."""

import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final
from urllib.error import URLError
from urllib.request import ProxyHandler, build_opener

from kv_transfer.auth import default_key_path, load_key, load_or_make_key
from omni.deployment.backends import Say
from omni.deployment.backends.ansible import logs, rendering, states
from omni.deployment.backends.ansible.leaving import stop_what_left
from omni.deployment.backends.ansible.machines import inventory_hosts
from omni.deployment.backends.ansible.playbook_run import Outcome, run_playbook
from omni.deployment.backends.ansible.scaling import Scaling
from omni.deployment.deployment_file import load_deployment
from omni.deployment.errors import DeploymentError, Problem, raise_any
from omni.deployment.groups import Pool
from omni.deployment.model import Deployment
from omni.deployment.plan_types import LaunchPlan
from omni.deployment.run_state import DeploymentState, ProcessState, RunFolder

_RENDERED: Final = "rendered"
_SERVE_TIMEOUT_S: Final = 4 * 3600  # an image may be pulled, and a large model read
_STOP_TIMEOUT_S: Final = 300
_ASK_TIMEOUT_S: Final = 60
_HEALTH_TIMEOUT_S: Final = 120.0
_POLL_S: Final = 0.5

_opener = build_opener(ProxyHandler({}))


class Backend:
    """All of it is runs of one playbook; see `playbook/playbook.yml` for its steps."""

    def problems(self, plan: LaunchPlan) -> Iterable[Problem]:
        return rendering.backend_problems(plan.deployment)

    def render(self, plan: LaunchPlan, folder: Path) -> tuple[Path, ...]:
        raise_any(rendering.backend_problems(plan.deployment))
        return rendering.render(plan, folder)

    def serve(self, plan: LaunchPlan, say: Say) -> DeploymentState:
        """Again for a deployment that runs: starts what does not, and restarts what another plan had started."""
        raise_any(rendering.backend_problems(plan.deployment))
        _check_key(plan)
        folder = RunFolder.of(plan.name)
        rendered = folder.path / _RENDERED
        stop_what_left(rendered, plan, say, _STOP_TIMEOUT_S)
        rendering.render(plan, rendered)
        try:
            _check_hosts(plan, rendered)
        except BaseException:
            if folder.deployment() is None:  # of an earlier serve there may be much to stop
                folder.remove()
            raise
        state = _state(plan)
        folder.write_deployment(state)  # from now on `omni_cli stop` knows where to look
        outcome = run_playbook(rendered, say=say, timeout_s=_SERVE_TIMEOUT_S)
        if not outcome.is_good:
            raise DeploymentError(
                f"{plan.name} did not start on every host:\n{_with_addresses(outcome, plan.deployment)}\n"
                f"What has started runs on. Mend it and `omni_cli serve {plan.config_file}` again: what runs is left "
                f"alone. Or `omni_cli stop {plan.name}` ends all of it"
            )
        _wait_for_health(plan)
        return state

    def stop(self, deployment: DeploymentState, say: Say) -> None:
        rendered = _rendered(deployment)
        outcome = run_playbook(rendered, tags=("stop_server", "remove_docker"), say=say, timeout_s=_STOP_TIMEOUT_S)
        if not outcome.is_good:
            written = load_deployment(Path(deployment.config_file))
            raise DeploymentError(
                f"{deployment.name} was not stopped on every host:\n{_with_addresses(outcome, written)}\n"
                f"`omni_cli stop {deployment.name}` again when they can be reached"
            )

    def restart(self, deployment: DeploymentState, names: Sequence[str], say: Say) -> None:
        """A host that has lost all of its processes is given them again."""
        present = self.process_states(deployment)
        wanted = names or [state.name for state in present]
        if unknown := sorted(set(wanted) - {state.name for state in present}):
            raise DeploymentError(
                f"{deployment.name} has no process {', '.join(unknown)}; it has {', '.join(deployment.process_names)}"
            )
        hosts = states.hosts_of(load_deployment(Path(deployment.config_file)), deployment.process_names)
        gone = [state.name for state in present if state.name in wanted and state.state == "stopped"]
        by_host: dict[str, Any] = {}
        for name in [name for name in wanted if name not in gone]:
            part = "proxy" if name == "proxy" else "engines"
            entry = by_host.setdefault(hosts[name], {"run": f"{deployment.name}.{part}", "names": []})
            entry["names"].append(name)
        rendered = _rendered(deployment)
        if gone:
            outcome = run_playbook(
                rendered,
                tags=("run_docker", "run_server", "run_proxy"),
                hosts=sorted({hosts[name] for name in gone}),
                say=say,
                timeout_s=_SERVE_TIMEOUT_S,
            )
            _raise_if_bad(outcome, deployment, "did not start again everywhere")
        if by_host:
            outcome = run_playbook(
                rendered,
                tags=("restart_server",),
                hosts=by_host,
                variables={"restart": by_host},
                say=say,
                timeout_s=_SERVE_TIMEOUT_S,
            )
            _raise_if_bad(outcome, deployment, "was not restarted everywhere")

    def scale(self, deployment: DeploymentState, num_groups: Mapping[Pool, int], wait_s: float, say: Say) -> None:
        """Groups of the deployment file, the first so many of each role."""
        Scaling(deployment, _rendered(deployment), say).to(num_groups, wait_s)

    def process_states(self, deployment: DeploymentState) -> list[ProcessState]:
        written = load_deployment(Path(deployment.config_file))
        outcome = run_playbook(_rendered(deployment), tags=("report",), timeout_s=_ASK_TIMEOUT_S)
        if outcome.trouble and not outcome.outputs:
            raise DeploymentError(f"the hosts of {deployment.name} cannot be asked:\n{outcome.trouble}")
        return states.process_states(deployment, written, outcome)

    def fetch_logs(self, deployment: DeploymentState, folder: Path) -> None:
        logs.fetch(_rendered(deployment), folder, _STOP_TIMEOUT_S)


def _rendered(deployment: DeploymentState) -> Path:
    folder = RunFolder.of(deployment.name).path / _RENDERED
    if not (folder / "inventory.yml").exists():
        raise DeploymentError(f"{folder} is gone: `omni_cli serve {deployment.config_file}` makes it again")
    return folder


def _state(plan: LaunchPlan) -> DeploymentState:
    return DeploymentState(
        name=plan.name,
        config_file=str(plan.config_file.resolve()),
        log_folder=str(plan.deployment.log_folder),
        proxy_url=plan.proxy.url,
        served_model_name=plan.served_model_name,
        process_names=tuple(process.name for process in plan.processes),
        launcher_pid=0,
        launcher_start_ticks=None,
        backend="ansible",
    )


def _check_key(plan: LaunchPlan) -> None:
    try:
        load_or_make_key(default_key_path()) if plan.key_file is None else load_key(plan.key_file)
    except ValueError as error:
        field = "services.kv_transfer.key_file"
        raise_any([Problem(field, str(error), "or write the path of another key on this machine")])


def _check_hosts(plan: LaunchPlan, rendered: Path) -> None:
    """Nothing has been touched when one of them cannot be reached."""
    outcome = run_playbook(rendered, tags=("check_hosts",), timeout_s=_ASK_TIMEOUT_S)
    if not outcome.is_good:
        raise DeploymentError(
            f"not every host can be logged in to:\n{_with_addresses(outcome, plan.deployment)}\n"
            f"Nothing was started. Look at user, private_key and password in {plan.config_file}"
        )


def _with_addresses(outcome: Outcome, deployment: Deployment) -> str:
    """Hosts as the file names them, too."""
    addresses = {host.name: host.address for host in inventory_hosts(deployment)}
    lines = [
        str(failure).replace(failure.host, f"{failure.host} ({addresses.get(failure.host, '?')})", 1)
        for failure in outcome.failures
    ]
    return "\n".join([*lines, *([outcome.trouble] if outcome.trouble else [])])


def _raise_if_bad(outcome: Outcome, deployment: DeploymentState, what: str) -> None:
    if not outcome.is_good:
        written = load_deployment(Path(deployment.config_file))
        raise DeploymentError(
            f"{deployment.name} {what}:\n{_with_addresses(outcome, written)}\n"
            f"`omni_cli status {deployment.name}` shows what runs; `omni_cli serve {deployment.config_file}` starts "
            "the rest"
        )


def _wait_for_health(plan: LaunchPlan) -> None:
    """Until the proxy serves. With TLS its processes' states must do: the certificate may name anything."""
    if plan.deployment.deployment.proxy.tls_certificate_file is not None:
        return
    deadline_s = time.monotonic() + _HEALTH_TIMEOUT_S
    problem = ""
    while time.monotonic() < deadline_s:
        try:
            with _opener.open(f"{plan.proxy.url}/health", timeout=5):
                return
        except (URLError, OSError) as error:
            problem = str(error)
        time.sleep(_POLL_S)
    raise DeploymentError(
        f"every process runs, but {plan.proxy.url}/health does not say so after {_HEALTH_TIMEOUT_S:.0f} s ({problem}): "
        f"`omni_cli status {plan.name}`, `omni_cli logs --deployment {plan.name}`"
    )

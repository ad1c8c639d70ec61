"""What the hosts report, as the states of a deployment's processes."""

from collections.abc import Mapping, Sequence

from omni.deployment.backends.ansible.machines import inventory_hosts, machines_of
from omni.deployment.backends.ansible.playbook_run import Failure, Outcome, reports
from omni.deployment.groups import group_settings
from omni.deployment.model import Deployment
from omni.deployment.run_state import DeploymentState, ProcessState

_PROXY = "proxy"


def process_states(deployment: DeploymentState, written: Deployment, outcome: Outcome) -> list[ProcessState]:
    """One for each process, in the deployment's order."""
    found: dict[str, ProcessState] = {}
    for report in reports(outcome):
        for fields in report["processes"]:
            state = ProcessState(**fields)
            found[state.name] = state
    problems = {failure.host: failure for failure in outcome.failures}
    addresses = {host.name: host.address for host in inventory_hosts(written)}
    hosts = hosts_of(written, deployment.process_names)
    return [
        _state(name, found.get(name), addresses[hosts[name]], problems.get(hosts[name]))
        for name in deployment.process_names
    ]


def _state(name: str, found: ProcessState | None, address: str, problem: Failure | None) -> ProcessState:
    if found is not None:
        return found.changed(host=address)
    if problem is not None:
        return ProcessState(name=name, state="failed", host=address, message=problem.short)
    return ProcessState(name=name, state="stopped", host=address, message="does not run there")


def hosts_of(written: Deployment, process_names: Sequence[str]) -> Mapping[str, str]:
    """Of each process the inventory's host that runs it: the one that acts for the machine; c0 for the proxy."""
    hosts = inventory_hosts(written)
    acts_for = {machine.first.address: machine.first.name for machine in machines_of(hosts)}
    where = {_PROXY: hosts[-1].name}
    for group in group_settings(written):
        for dp_rank, nodes in enumerate(group.ranks):
            stem = f"{group.role}.{group.name}.rank{dp_rank}"
            for node_rank, node in enumerate(nodes):
                where[f"{stem}.node{node_rank}" if node_rank else stem] = acts_for[node.host]
    return {name: where[name] for name in process_names}

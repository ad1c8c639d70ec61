"""Hosts' reports as process states; failures in our words; which processes a change of scale starts and ends."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from omni.deployment.backends.ansible.backend import Backend, _state
from omni.deployment.backends.ansible.playbook_run import Failure, Outcome, failure_text
from omni.deployment.backends.ansible.scaling import wanted_names, whole_machines
from omni.deployment.backends.ansible.states import hosts_of, process_states
from omni.deployment.errors import ConfigError, DeploymentError
from omni.deployment.load import load_plan
from omni.deployment.plan_types import LaunchPlan
from omni.deployment.run_state import ProcessState
from tests.omni.deployment.backends.ansible.samples import content, plan_of
from tests.omni.deployment.samples import FIELD_FILE


@pytest.fixture
def plan(tmp_path: Path) -> LaunchPlan:
    data = content()
    data["deployment"]["prefill"]["group2"] = {
        **data["deployment"]["prefill"]["group1"],
        "hosts": "10.0.0.6",
    }
    return plan_of(tmp_path, data)


def report(host: str, part: str, *states: ProcessState) -> Outcome:
    answer = {"run": f"sample.{part}", "is_running": True, "processes": [asdict(state) for state in states]}
    return Outcome(outputs={(host, f"report {part}"): json.dumps(answer)})


class TestStates:
    def test_each_is_what_its_host_says(self, plan: LaunchPlan) -> None:
        outcome = report("p1", "engines", ProcessState(name="prefill.group1.rank0", state="ready", pid=7))
        states = {s.name: s for s in process_states(_state(plan), plan.deployment, outcome)}
        assert list(states) == [process.name for process in plan.processes]
        first = states["prefill.group1.rank0"]
        assert (first.state, first.pid, first.host) == ("ready", 7, "10.0.0.1")
        assert states["proxy"].state == "stopped"

    def test_a_host_that_does_not_answer(self, plan: LaunchPlan) -> None:
        outcome = Outcome(failures=[Failure("c0", "report proxy", "no route", is_unreachable=True)])
        proxy = process_states(_state(plan), plan.deployment, outcome)[-1]
        assert (proxy.state, proxy.message, proxy.host) == ("failed", "c0: cannot be reached: no route", "10.0.0.4")

    def test_every_process_of_a_large_deployment_has_a_host(self) -> None:
        plan = load_plan(FIELD_FILE)
        where = hosts_of(plan.deployment, [process.name for process in plan.processes])
        assert set(where.values()) == {"p1", "p2", "p3", "p4", "d1", "d1_node1", "d1_node2", "d1_node3", "c0"}

    def test_a_rank_on_two_hosts(self, tmp_path: Path) -> None:
        data = content()
        data["deployment"]["prefill"]["group1"]["hosts"] = "10.0.0.1,10.0.0.8"
        plan = plan_of(tmp_path, data)
        where = hosts_of(plan.deployment, [process.name for process in plan.processes])
        assert where["prefill.group1.rank0"] == "p1"
        assert where["prefill.group1.rank0.node1"] == "p1_node1"


class TestFailures:
    def test_the_end_of_stderr(self) -> None:
        text = failure_text({"msg": "non-zero return code", "stderr": "\n".join(map(str, range(100))), "stdout": "x"})
        assert text.splitlines() == [str(number) for number in range(85, 100)]

    def test_of_the_first_item_that_failed(self) -> None:
        result = {"msg": "One or more items failed", "results": [{"failed": False}, {"failed": True, "msg": "this"}]}
        assert failure_text(result) == "this"

    def test_a_run_that_was_never_rendered(
        self, plan: LaunchPlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("OMNI_STATE_DIR", str(tmp_path / "state"))
        with pytest.raises(DeploymentError, match="omni_cli serve"):
            Backend().stop(_state(plan), print)


class TestScaling:
    def names(self, plan: LaunchPlan, **num_groups: int) -> set[str]:
        present = [process.name for process in plan.processes]
        return wanted_names(plan, present, num_groups)  # type: ignore[arg-type]

    def test_the_first_groups_stay(self, plan: LaunchPlan) -> None:
        names = self.names(plan, prefill=1)
        assert "prefill.group1.rank0" in names
        assert "prefill.group2.rank0" not in names
        assert "proxy" in names
        assert any(name.startswith("decode.group1") for name in names)

    @pytest.mark.parametrize("number", [0, 3])
    def test_no_more_than_the_file_has_and_one_at_least(self, plan: LaunchPlan, number: int) -> None:
        with pytest.raises(ConfigError, match=r"2 prefill groups; write 1 to 2"):
            self.names(plan, prefill=number)

    def test_a_role_that_is_not_there(self, plan: LaunchPlan) -> None:
        with pytest.raises(ConfigError, match="leave it out"):
            self.names(plan, mixed=1)

    def test_a_machine_that_others_need_stays(self, tmp_path: Path) -> None:
        data = content()
        first = data["deployment"]["prefill"]["group1"]
        other = {**first, "base_api_port": 9500, "ascend_rt_visible_devices": "2,3"}
        data["deployment"]["prefill"]["group2"] = other
        plan = plan_of(tmp_path, data)
        with pytest.raises(DeploymentError, match=r"10\.0\.0\.1 runs prefill\.group1\.rank0, too"):
            whole_machines(plan, ["prefill.group2.rank0"], ["prefill.group1.rank0"])
        assert whole_machines(plan, ["prefill.group1.rank0", "prefill.group2.rank0"], ["proxy"]) == ["p1"]

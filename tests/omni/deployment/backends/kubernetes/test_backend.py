"""The folder as a whole, and what is said instead of serving."""

from pathlib import Path
from typing import Any

import pytest

from omni.deployment.backends import remote_backend
from omni.deployment.errors import DeploymentError
from omni.deployment.run_state import DeploymentState

from ...samples import put
from .samples import Rendered, in_cluster, plan_of, rendered, with_known_model

CONFIGS = Path(__file__).parents[5] / "configs"


def texts(folder: Path) -> dict[str, str]:
    return {file.name: file.read_text() for file in sorted(folder.iterdir())}


def test_equal_plans_give_equal_bytes(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, in_cluster(3, 2))
    Rendered(tmp_path / "one", plan)
    Rendered(tmp_path / "two", plan)
    assert texts(tmp_path / "one") == texts(tmp_path / "two")


def test_groups_that_are_gone_leave_no_file(tmp_path: Path) -> None:
    assert {file.name for file in rendered(tmp_path, in_cluster()).files} == texts(tmp_path / "out").keys()
    data = in_cluster()
    data["deployment"] = {"mixed": {"group1": {"base_api_port": 9000}}, "proxy": {"listen_port": 7000}}
    rendered(tmp_path, data)
    assert texts(tmp_path / "out").keys() == {"make-secrets.sh", "config.yaml", "proxy.yaml", "mixed.yaml"}


def test_names_are_unique(tmp_path: Path) -> None:
    manifests = rendered(tmp_path, put(in_cluster(3, 3), "name", "X" * 64)).manifests
    names = [(manifest["kind"], manifest["metadata"]["name"]) for manifest in manifests]
    assert len(set(names)) == len(names)


def test_a_file_for_this_machine_can_be_rendered_too(tmp_path: Path) -> None:
    data = with_known_model(tmp_path, in_cluster()) | {"backend": "local"}
    result = rendered(tmp_path, data)
    assert result.config()["backend"] == "kubernetes"


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, in_cluster())
    with pytest.raises(DeploymentError, match=r"chat\.yaml: cannot be written \(File exists\): name another folder"):
        remote_backend("kubernetes").render(plan, plan.config_file)


def test_the_example(tmp_path: Path) -> None:
    from omni.deployment.load import load_plan

    result = Rendered(tmp_path, load_plan(CONFIGS / "kubernetes.yaml"))
    assert len(result.of_kind("Deployment")) == 4


def test_many_ranks(tmp_path: Path) -> None:
    """144 P and 288 D: everything is there. How long it takes is measured elsewhere."""
    data = in_cluster(144, 288)
    for role in ("prefill", "decode"):
        for number, group in enumerate(data["deployment"][role].values()):
            group |= {"hosts": f"{role}-{number}", "base_api_port": 9000}
    result = rendered(tmp_path, data)
    assert len(result.of_kind("Deployment")) == 433
    assert len(result.config_text()) < 256 << 10


def calls() -> dict[str, Any]:
    state = DeploymentState(
        name="Chat",
        config_file="/somewhere/chat.yaml",
        log_folder="",
        proxy_url="",
        served_model_name="",
        process_names=(),
        launcher_pid=1,
        launcher_start_ticks=None,
    )
    backend = remote_backend("kubernetes")
    return {
        "stop": lambda: backend.stop(state, print),
        "restart": lambda: backend.restart(state, (), print),
        "scale": lambda: backend.scale(state, {"prefill": 2}, 60.0, print),
        "process_states": lambda: backend.process_states(state),
        "fetch_logs": lambda: backend.fetch_logs(state, Path("logs")),
    }


@pytest.mark.parametrize("name", ["stop", "restart", "scale", "process_states", "fetch_logs"])
def test_what_kubectl_does_is_said(name: str) -> None:
    with pytest.raises(DeploymentError) as caught:
        calls()[name]()
    for words in (
        "omni_cli render /somewhere/chat.yaml --backend kubernetes --output DIR",
        "sh DIR/make-secrets.sh && kubectl apply --server-side -f DIR",
        "kubectl get pods -l app.kubernetes.io/name=omni,app.kubernetes.io/instance=omni-chat-",
        "kubectl delete -f DIR",
    ):
        assert words in str(caught.value)


def test_serve_says_it_too(tmp_path: Path) -> None:
    with pytest.raises(DeploymentError, match=r"kubectl apply --server-side -f DIR"):
        remote_backend("kubernetes").serve(plan_of(tmp_path, in_cluster()), print)

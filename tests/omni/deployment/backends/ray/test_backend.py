"""What needs no cluster: refusals before one is asked. The rest is tests/e2e/test_ray.py's."""

import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from omni.deployment.backends import remote_backend
from omni.deployment.deployment_file import load_deployment
from omni.deployment.errors import ConfigError, DeploymentError
from omni.deployment.run_state import DeploymentState, RunFolder
from tests.omni.deployment.samples import content, planned, put


def test_a_proxy_that_nothing_can_join_is_refused(tmp_path: Path) -> None:
    data = put(put(content(), "backend", "ray"), "deployment/proxy/control_port", 0)
    backend = remote_backend("ray")
    for refused in (
        lambda: backend.render(planned(tmp_path, data), tmp_path / "out"),
        lambda: backend.serve(planned(tmp_path, data), print),
    ):
        with pytest.raises(ConfigError, match=r"deployment\.proxy\.control_port: 0"):
            refused()
    assert not (tmp_path / "out").exists()


def test_a_key_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    data = put(put(content(), "backend", "ray"), "services/kv_transfer/key_file", str(tmp_path / "absent"))
    with pytest.raises(DeploymentError, match="absent cannot be read"):
        remote_backend("ray").serve(planned(tmp_path, data), print)


def test_without_a_cluster_it_says_how_to_start_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray's own search is replaced: it would find any cluster of this machine."""

    def init(**_: object) -> None:
        raise ConnectionError("Could not find any running Ray instance.\nMore of it.")

    monkeypatch.setattr("ray.init", init)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    message = (
        r"no Ray cluster answers at 'auto' \(Could not find any running Ray instance\.\): "
        r"start one with `ray start --head`, or write ray\.address"
    )
    with pytest.raises(DeploymentError, match=message), _connected("auto"):
        pytest.fail("connected")
    assert os.environ["RAY_USAGE_STATS_ENABLED"] == "0"


def test_an_address_that_nothing_listens_at_is_told_at_once(free_ports: Callable[[int], int]) -> None:
    address = f"127.0.0.1:{free_ports(1)}"
    with (
        pytest.raises(DeploymentError, match=rf"no Ray cluster answers at '{address}' \(.*refused"),
        _connected(address),
    ):
        pytest.fail("connected")
    with pytest.raises(DeploymentError, match=r"it is not HOST:PORT; Ray Client"), _connected("ray://head:10001"):
        pytest.fail("connected")


def test_a_cluster_that_is_gone(tmp_path: Path, free_ports: Callable[[int], int]) -> None:
    """`stop` cannot know whether it is gone for good; `status` has something to say about each process."""
    state = _state()
    folder = RunFolder.of(state.name)
    folder.write_deployment(state)
    (folder.path / "ray_address").write_text(f"127.0.0.1:{free_ports(1)}")
    states = remote_backend("ray").process_states(state)
    assert [(s.name, s.state) for s in states] == [("prefill.group1.rank0", "failed"), ("proxy", "failed")]
    with pytest.raises(DeploymentError, match=f"gone for good, nothing of it runs: delete {folder.path}"):
        remote_backend("ray").stop(state, print)
    assert folder.deployment() == state


def test_an_unknown_process_is_not_started_again() -> None:
    with pytest.raises(DeploymentError, match=r"prefill\.group9\.rank0: no such process; there are"):
        remote_backend("ray").restart(_state(), ["prefill.group9.rank0"], print)


def test_the_example_is_planned() -> None:
    deployment = load_deployment(Path(__file__).parents[5] / "configs" / "ray.yaml")
    assert deployment.backend == "ray"
    assert deployment.ray.address == "auto"


def _connected(address: str) -> AbstractContextManager[object]:
    from omni.deployment.backends.ray.cluster import connected

    return connected(address, "trial")


def _state() -> DeploymentState:
    return DeploymentState(
        name="trial",
        config_file="",
        log_folder="",
        proxy_url="",
        served_model_name="",
        process_names=("prefill.group1.rank0", "proxy"),
        launcher_pid=0,
        launcher_start_ticks=None,
        backend="ray",
    )

"""More groups than the file has: what a new one is like."""

from pathlib import Path

from omni.deployment.scaling import scale_engines

from .samples import content, machine, model_folder, planned, put


def test_a_new_group_has_ports_of_its_own_beside_one_with_a_host_block(tmp_path: Path) -> None:
    block = {"user": "me", "base_api_port": 9030, "master_port": 9040}
    data = put(put(content(), "deployment/prefill/group1/host 127.0.0.1", block), "backend", "local")
    data["services"]["model_path"] = str(model_folder(tmp_path / "model"))
    present = planned(tmp_path, data).processes[:-1]
    assert present[0].port == 9030
    new = scale_engines(tmp_path / "trial.yaml", present, {"prefill": 2}, machine())[-1]
    assert (new.group, new.port) == ("group2", 9010)

from pathlib import Path

import yaml

from omni.deployment.backends.ray.rendering import render
from tests.omni.deployment.samples import content, planned, put


def test_what_would_be_asked_of_ray(tmp_path: Path) -> None:
    data = put(content(), "deployment/decode/group1/hosts", "10.0.0.1,10.0.0.2")
    data = put(data, "deployment/decode/group1/ascend_rt_visible_devices", "0,1")
    files = render(planned(tmp_path, put(data, "backend", "ray")), tmp_path / "out")
    assert [file.name for file in files] == ["ray.yaml", "prefill.group1.yaml", "decode.group1.yaml"]
    assert files[1].stat().st_mode & 0o777 == 0o600
    shown = yaml.safe_load(files[0].read_text())
    assert (shown["address"], shown["namespace"]) == ("auto", "omni.trial")
    assert shown["proxy"]["resources"] == {"node:__internal_head__": 0.001}
    prefill, decode = shown["placement_groups"]
    assert prefill["bundles"] == [{"NPU": 1.0, "CPU": 1.0}]
    assert decode["strategy"] == "STRICT_SPREAD"
    second = decode["actors"][1]
    assert second["name"] == "decode.group1.node1"
    assert " ".join(second["command"]) == (
        "python -m services.decode --config <its deployment file> --group group1 --listen <node> --base-api-port 9500 "
        "--join <head node>:7001 --node 1 --master <first node>"
    )


def test_what_vllm_reserves_itself_is_said(tmp_path: Path) -> None:
    data = put(content(), "platform", "cuda")
    data = put(data, "deployment/prefill/group1/hosts", "10.0.0.1,10.0.0.2")
    data = put(data, "deployment/prefill/group1/tensor_parallel_size", 16)
    file, *_ = render(planned(tmp_path, put(data, "backend", "ray")), tmp_path / "out")
    prefill = yaml.safe_load(file.read_text())["placement_groups"][0]
    assert prefill["reserved_by_vllm"] == {"GPU": 16}
    assert prefill["bundles"] == [{"CPU": 1.0}]


def test_twice_it_is_the_same(tmp_path: Path) -> None:
    plan = planned(tmp_path, put(content(), "backend", "ray"))
    first = [file.read_text() for file in render(plan, tmp_path / "out")]
    assert [file.read_text() for file in render(plan, tmp_path / "out")] == first

"""What a pod asks of its node."""

from pathlib import Path

import pytest

from ...samples import put
from .samples import Manifest, engine, in_cluster, on_devices, rendered, with_known_model

MIB = 1 << 20


def resources(folder: Path, data: Manifest, ending: str = "prefill-group1") -> Manifest:
    found: Manifest = engine(rendered(folder, data).pod(ending))["resources"]
    return found


def test_of_a_model_that_is_not_here_nothing_is_said_of_memory(tmp_path: Path) -> None:
    assert resources(tmp_path, in_cluster()) == {"requests": {"cpu": "1"}}


def memory_mib(folder: Path, kv_cache_gib: float) -> int:
    data = with_known_model(folder, put(in_cluster(), "services/prefill/kv_cache_gib", kv_cache_gib))
    found = resources(folder, data)
    assert found["limits"] == {"memory": found["requests"]["memory"]}
    return int(found["requests"]["memory"].removesuffix("Mi"))


def test_memory_of_a_model_that_is_here(tmp_path: Path) -> None:
    more = memory_mib(tmp_path, 2) - memory_mib(tmp_path, 1)
    assert more == pytest.approx(1024 / 0.9, abs=1), "the pod leaves a tenth of its memory alone"


def test_a_kv_cache_of_unknown_size_is_not_limited(tmp_path: Path) -> None:
    found = resources(tmp_path, with_known_model(tmp_path, in_cluster()))
    assert found.keys() == {"requests"}
    assert found["requests"].keys() == {"cpu", "memory"}


def test_cores_that_the_plan_knows(tmp_path: Path) -> None:
    data = with_known_model(tmp_path, in_cluster()) | {"backend": "local"}
    assert resources(tmp_path, data)["requests"]["cpu"] == "2", "half of the four"
    assert "cpu" not in resources(tmp_path, data).get("limits", {})


def test_devices(tmp_path: Path) -> None:
    found = resources(tmp_path, on_devices(devices="0,1,2,3"))
    assert found["limits"] == {"huawei.com/Ascend910": "4"}
    assert found["requests"] == {"cpu": "6", "huawei.com/Ascend910": "4"}, "one rank of four workers"
    assert resources(tmp_path, on_devices(devices="0,1,2,3"), "decode-group1")["requests"]["cpu"] == "12"


def test_gpus(tmp_path: Path) -> None:
    data = put(put(in_cluster(), "platform", "cuda"), "services/prefill/tensor_parallel_size", 2)
    put(data, "services/prefill/data_parallel_size", 3)
    assert resources(tmp_path, data)["limits"] == {"nvidia.com/gpu": "6"}
    assert resources(tmp_path, data, "decode-group1")["limits"] == {"nvidia.com/gpu": "1"}

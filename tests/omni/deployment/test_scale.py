"""The largest deployments: 144 prefill and 288 decode ranks."""

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import yaml
from rich.console import Console

from omni.deployment.deployment_file import load_deployment
from omni.deployment.errors import ConfigError
from omni.deployment.plan import make_plan
from omni.deployment.plan_types import LaunchPlan
from omni.deployment.render import plan_as_dict, plan_table

from .samples import machine, model

DEVICES = ",".join(map(str, range(16)))
Pools = tuple[dict[str, Any], dict[str, Any]]


def ranks_alone(scale: int = 48) -> Pools:
    """3 groups of one rank on one device for each step of `scale`, each group on a host of its own."""
    prefill = {f"group{n}": _group(f"10.0.{n // 200}.{n % 200 + 1}", "0") for n in range(3 * scale)}
    decode = {f"group{n}": _group(f"10.1.{n // 200}.{n % 200 + 1}", "0") for n in range(6 * scale)}
    return prefill, decode


def whole_hosts(scale: int = 48) -> Pools:
    """Groups of 16 ranks, each on a host with 16 devices."""
    prefill = {f"p{n}": _group(f"10.0.0.{n}", DEVICES) | {"tensor_parallel_size": 1} for n in range(3 * scale // 16)}
    decode = {f"d{n}": _group(f"10.1.0.{n}", DEVICES) for n in range(6 * scale // 16)}
    return prefill, decode


def one_large_group(scale: int = 48) -> Pools:
    """P as `whole_hosts`, and one D over many hosts."""
    hosts = ",".join(f"10.1.0.{n}" for n in range(6 * scale // 16))
    return whole_hosts(scale)[0], {"d1": _group(hosts, DEVICES)}


def _group(hosts: str, devices: str) -> dict[str, Any]:
    login = {"user": "root", "private_key": "/k"}
    return {"hosts": hosts, "base_api_port": 9000, "ascend_rt_visible_devices": devices} | login


def written(folder: Path, pools: Pools) -> Path:
    prefill, decode = pools
    deployment = {"prefill": prefill, "decode": decode, "proxy": {"host": "10.2.0.1", "listen_port": 7000}}
    data = {"backend": "ansible", "deployment": deployment, "services": {"model_path": "/m"}}
    file = folder / "large.yaml"
    file.write_text(yaml.safe_dump(data))
    return file


def planned(file: Path) -> LaunchPlan:
    plan = make_plan(load_deployment(file), model(), machine(), config_file=file)
    json.dumps(plan_as_dict(plan))
    with (file.parent / "table").open("w") as output:
        Console(file=output, width=200).print(plan_table(plan))
    return plan


@contextmanager
def counted_calls() -> Iterator[list[int]]:
    """How many functions were called in the block, as its only element: the same on every machine, however busy."""
    calls = [0]

    def count(frame: FrameType, event: str, argument: object) -> None:
        calls[0] += event in ("call", "c_call")

    before = sys.getprofile()
    sys.setprofile(count)
    try:
        yield calls
    finally:
        sys.setprofile(before)


@pytest.mark.parametrize("pools", [ranks_alone, whole_hosts, one_large_group])
def test_432_ranks_take_less_than_two_seconds(tmp_path: Path, pools: Callable[[], Pools]) -> None:
    file = written(tmp_path, pools())
    before_s = time.process_time()  # of this process alone, however busy the machine is
    plan = planned(file)
    assert time.process_time() - before_s < 2
    roles = [process.role for process in plan.processes]
    assert (roles.count("prefill"), roles.count("decode"), roles.count("proxy")) == (144, 288, 1)


@pytest.mark.parametrize("pools", [ranks_alone, whole_hosts, one_large_group])
def test_twice_as_many_ranks_take_twice_as_much(tmp_path: Path, pools: Callable[[int], Pools]) -> None:
    counts = []
    planned(written(tmp_path, pools(16)))  # what is imported or cached once
    for scale in (32, 64):
        file = written(tmp_path, pools(scale))
        with counted_calls() as calls:
            planned(file)
        counts.append(calls[0])
    assert counts[1] < 2.2 * counts[0]


def test_as_many_problems(tmp_path: Path) -> None:
    """Every group is wrong: each is named, with its line."""
    prefill, decode = ranks_alone()
    for group in (*prefill.values(), *decode.values()):
        group["password"] = "beside a key"  # noqa: S105
    file = written(tmp_path, (prefill, decode))
    before_s = time.process_time()
    with pytest.raises(ConfigError) as caught:
        load_deployment(file)
    assert time.process_time() - before_s < 2
    assert len({problem.place for problem in caught.value.problems}) == 432

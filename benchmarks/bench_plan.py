"""How long planning and rendering take for the largest deployments: 144 P and 288 D ranks, in three shapes.

`make bench-plan` prints medians of wall-clock seconds.
"""

import argparse
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any, Final

import yaml

from omni.deployment.backends import remote_backend
from omni.deployment.load import load_plan
from omni.deployment.plan_types import LaunchPlan
from omni.deployment.render import plan_as_dict

SHAPES: Final[Mapping[str, tuple[int, int, int]]] = {  # groups of P, groups of D, ranks of each (hosts of 16 devices)
    "144 P and 288 D groups of one rank": (144, 288, 1),
    "9 P and 18 D groups of 16 ranks": (9, 18, 16),
    "9 P groups of 16 ranks, 1 D group of 288": (9, 1, 16),
}
BACKENDS: Final = ("ansible", "kubernetes")  # what Ray would reserve is known with the cluster alone


def content(num_prefill: int, num_decode: int, num_ranks: int) -> dict[str, Any]:
    """A deployment file's content: a host of its own for each group, or as many as its ranks need."""
    hosts = iter(f"10.{n >> 16 & 255}.{n >> 8 & 255}.{n & 255}" for n in range(1, 1 << 20))
    devices = ",".join(map(str, range(num_ranks)))

    def groups(count: int, hosts_each: int) -> dict[str, Any]:
        return {
            f"group{index + 1}": {
                "hosts": ",".join(next(hosts) for _ in range(hosts_each)),
                "user": "root",
                "private_key": "/keys/id_ed25519",
                "base_api_port": 9000,
                "ascend_rt_visible_devices": devices,
            }
            for index in range(count)
        }

    return {
        "deployment": {
            "prefill": groups(num_prefill, 1),
            "decode": groups(num_decode, 288 // (num_decode * num_ranks)),
            "proxy": {"host": "10.200.0.1", "user": "root", "private_key": "/keys/id_ed25519"},
        },
        "services": {
            "model_path": "/models/not-here",
            "docker_image": "omni:ascend",
            "code_path": "/opt/omni",
            "local_code_path": str(Path(__file__).parents[1]),
            "log_path": "/var/log/omni",
            "prefill": {"data_parallel_size": num_ranks, "tensor_parallel_size": 1},
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    repeats: int = parser.parse_args().repeats
    with tempfile.TemporaryDirectory() as folder:
        for shape, sizes in SHAPES.items():
            file = Path(folder, "deployment.yaml")
            file.write_text(yaml.safe_dump(content(*sizes), sort_keys=False))
            plan = load_plan(file)
            print(f"\n{shape}: {len(plan.processes)} processes on {len(plan.hosts)} hosts")
            print(f"  read and plan     {_median_s(lambda file=file: load_plan(file), repeats):.2f} s")
            print(f"  show (plan --json) {_median_s(lambda plan=plan: plan_as_dict(plan), repeats):.2f} s")
            for backend in BACKENDS:
                print(f"  render {backend:10} {_median_s(_rendering(load_plan(file, backend=backend)), repeats):.2f} s")


def _rendering(plan: LaunchPlan) -> Callable[[], object]:
    def render() -> object:
        with tempfile.TemporaryDirectory() as folder:
            return remote_backend(plan.deployment.backend).render(plan, Path(folder, "rendered"))

    return render


def _median_s(call: Callable[[], object], repeats: int) -> float:
    took_s = []
    for _ in range(repeats):
        started_s = time.perf_counter()
        call()
        took_s.append(time.perf_counter() - started_s)
    return median(took_s)


if __name__ == "__main__":
    main()

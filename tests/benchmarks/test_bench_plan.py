"""The largest deployments of `make bench-plan` are what they say."""

from pathlib import Path

import pytest
import yaml

from benchmarks.bench_plan import SHAPES, content
from omni.deployment.load import load_plan


@pytest.mark.parametrize("sizes", SHAPES.values(), ids=str)
def test_shapes(sizes: tuple[int, int, int], tmp_path: Path) -> None:
    file = tmp_path / "large.yaml"
    file.write_text(yaml.safe_dump(content(*sizes)))
    plan = load_plan(file)
    assert plan.deployment.backend == "ansible"
    assert [sum(p.role == role for p in plan.processes) for role in ("prefill", "decode", "proxy")] == [144, 288, 1]

"""The inventories and the playbook in configs/ansible are those that the code makes."""

from pathlib import Path

import pytest
import yaml

from omni.deployment.backends.ansible.rendering import backend_problems
from omni.deployment.load import load_plan
from tests.omni.deployment.backends.ansible.ready_made import NAMES, READY_MADE, make


def test_they_are_up_to_date(tmp_path: Path) -> None:
    made = {path.relative_to(tmp_path): path.read_text() for path in make(tmp_path)}
    kept = {name: (READY_MADE / name).read_text() for name in made if (READY_MADE / name).exists()}
    assert kept == made, "python -m tests.omni.deployment.backends.ansible.ready_made makes them anew"
    sources = {Path(f"{name}.yml") for name in NAMES} | {Path("README.md")}
    assert {path.relative_to(READY_MADE) for path in READY_MADE.rglob("*") if path.is_file()} == {*made, *sources}


@pytest.mark.parametrize(("name", "num_machines", "num_hosts"), [("2p1d", 4, 4), ("4p1d", 8, 9)])
def test_their_hosts(name: str, num_machines: int, num_hosts: int) -> None:
    groups = yaml.safe_load((READY_MADE / name / "inventory.yml").read_text())["all"]["children"]
    assert len(groups["machines"]["hosts"]) == num_machines
    assert sum(len(groups[letter]["hosts"]) for letter in "PDMC") == num_hosts
    assert not list(backend_problems(load_plan(READY_MADE / f"{name}.yml").deployment))


def test_the_proxy_of_4p1d_shares_the_first_host() -> None:
    groups = yaml.safe_load((READY_MADE / "4p1d/inventory.yml").read_text())["all"]["children"]
    assert groups["C"]["hosts"]["c0"]["ansible_host"] == groups["P"]["hosts"]["p1"]["ansible_host"]
    assert "c0" not in groups["machines"]["hosts"]

"""Makes configs/ansible anew: `python -m tests.omni.deployment.backends.ansible.ready_made`."""

import shutil
from collections.abc import Iterator
from pathlib import Path

from omni.deployment.backends.ansible.rendering import PLAYBOOK_FOLDER, write_inventory
from omni.deployment.load import load_plan

READY_MADE = Path(__file__).parents[5] / "configs/ansible"
NAMES = ("2p1d", "4p1d")


def make(folder: Path) -> Iterator[Path]:
    """Writes what READY_MADE has beside the deployment files."""
    for source in (path for path in PLAYBOOK_FOLDER.rglob("*") if path.is_file()):
        target = folder / source.relative_to(PLAYBOOK_FOLDER)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)
        yield target
    for name in NAMES:
        yield from write_inventory(load_plan(READY_MADE / f"{name}.yml"), folder / name)


if __name__ == "__main__":
    for path in make(READY_MADE):
        path.chmod(0o644)
        print(path)

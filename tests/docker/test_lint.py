"""What linters say of the images and scripts. The versions that the images name are those of pyproject.toml."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCKERFILES = sorted(ROOT.glob("docker/Dockerfile.*"))
SCRIPTS = [ROOT / "build/build.sh", ROOT / "docker/with-cann.sh"]


def tool(name: str) -> Path:
    path = Path(sys.executable).with_name(name)
    if not path.exists():
        pytest.skip(f"{name} is not installed")
    return path


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_hadolint_has_nothing_to_say(path: Path) -> None:
    said = subprocess.run([tool("hadolint"), path], capture_output=True, text=True)

    assert (said.returncode, said.stdout) == (0, "")


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck_has_nothing_to_say(path: Path) -> None:
    said = subprocess.run([tool("shellcheck"), path], capture_output=True, text=True)

    assert (said.returncode, said.stdout) == (0, "")


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_all_that_is_copied_is_there_and_let_through(path: Path) -> None:
    let_through = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = {source for line in re.findall(r"^COPY (.+)$", path.read_text(), re.M) for source in line.split()[:-1]}

    assert copied
    assert copied <= let_through
    assert all((ROOT / source).exists() for source in copied)


def test_ascend_has_the_versions_of_the_extra() -> None:
    text = (ROOT / "docker/Dockerfile.ascend").read_text()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pins = dict(requirement.split("==") for requirement in project["optional-dependencies"]["npu"])

    assert f"--no-binary vllm vllm=={pins['vllm']}" in text
    assert f"VLLM_VERSION_OVERRIDE={pins['vllm']}" in text
    assert f"torch-npu=={pins['torch-npu']}" in text
    assert f"torch=={pins['torch-npu']} " in text  # torch_npu goes with the torch of its own version
    assert f'("{pins["vllm"]}", "{pins["torch-npu"]}", "{pins["torch-npu"]}")' in text


def test_readme_has_the_flags_of_compose_for_npus() -> None:
    readme = (ROOT / "docker/README.md").read_text()
    compose = (ROOT / "docker/compose.ascend.yaml").read_text()
    needed = [
        *(f"/dev/davinci{number}" for number in range(8)),
        *("/dev/davinci_manager", "/dev/devmm_svm", "/dev/hisi_hdc"),
        *("/usr/local/Ascend/driver", "/usr/local/dcmi", "/usr/local/bin/npu-smi"),
        *("/etc/ascend_install.info", "/etc/hccn.conf"),
    ]

    for path in needed:
        if path.startswith("/dev/"):
            assert re.search(rf"--device {path}\b", readme), path
            assert re.search(rf"- {path}$", compose, re.M), path
        else:
            assert f"-v {path}:{path}:ro" in readme, path
            assert f"- {path}:{path}:ro" in compose, path

"""The compose files, their commands read by our own parsers, so that neither changes without the other."""

import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import yaml

from omni.deployment.load import load_plan
from omni.deployment.plan_types import LaunchPlan
from services.global_proxy.arguments import parse_arguments

ROOT = Path(__file__).parents[2]
COMPOSE, ASCEND = ROOT / "docker/compose.yaml", ROOT / "docker/compose.ascend.yaml"
VALUES = {
    "OMNI_HOST": "127.0.0.1",
    "OMNI_DEPLOYMENT_FILE": "/nowhere/deployment.yml",
    "OMNI_MODELS": "/nowhere/models",
    "OMNI_KEY_FILE": "/nowhere/key",
}


def filled_in(text: str, values: Mapping[str, str]) -> str:
    """As compose does it: ${NAME}, ${NAME:-default}, ${NAME:?what is missing}, also one inside another."""

    def value(match: re.Match[str]) -> str:
        name, kind, rest = match.groups()
        if name in values:
            return values[name]
        if kind != ":-":
            raise KeyError(name)
        return rest

    inner = re.compile(r"\$\{(\w+)(?:(:-|:\?)([^${}]*))?\}")
    while inner.search(text):
        text = inner.sub(value, text)
    return text


def services_of(path: Path, values: Mapping[str, str]) -> dict[str, Any]:
    services: dict[str, Any] = yaml.safe_load(filled_in(path.read_text(), values))["services"]
    return services


@pytest.fixture
def services() -> dict[str, Any]:
    return services_of(COMPOSE, {})


@pytest.fixture
def plan(tmp_path: Path) -> LaunchPlan:
    """Of compose's deployment file with a model that is made in a moment."""
    text = (ROOT / "docker/1p1d.yaml").read_text().replace("embedded:smollm2-135m", "embedded:tiny")
    text = text.replace("max_model_len: 2048", "max_model_len: 64")
    file = tmp_path / "deployment.yaml"
    file.write_text(text)
    return load_plan(file)


@pytest.mark.parametrize("path", [COMPOSE, ASCEND], ids=lambda path: path.name)
def test_it_is_what_the_compose_specification_allows(path: Path) -> None:
    pytest.importorskip("check_jsonschema")
    said = subprocess.run(
        [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec", path],
        capture_output=True,
        text=True,
    )

    assert said.returncode == 0, said.stdout + said.stderr


def test_the_proxy_is_the_plans_proxy_without_instances(services: dict[str, Any], plan: LaunchPlan) -> None:
    proxy = services["proxy"]
    host, port, settings = parse_arguments(proxy["command"])
    planned_host, planned_port, planned = parse_arguments(plan.proxy.arguments)

    assert proxy["entrypoint"][-2:] == ["-m", "services.global_proxy"]
    assert (host, port) == (planned_host, planned_port)
    assert settings.specs() == []
    for name in ("connector", "mode", "key_file", "control_port", "max_active_per_decode"):
        assert getattr(settings, name) == getattr(planned, name), name


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_an_engines_command_is_read(services: dict[str, Any], role: str) -> None:
    service = services[role]
    init, dashes, python, *module = service["entrypoint"]
    command = [part if part != "/etc/omni/deployment.yaml" else "/nowhere.yaml" for part in service["command"]]
    said = subprocess.run([sys.executable, *module, *command], capture_output=True, text=True, cwd=ROOT, timeout=60)

    assert (init, dashes, python, module) == ("tini", "--", "python", ["-m", f"services.{role}"])
    assert said.returncode == 2
    assert "usage:" not in said.stderr
    assert said.stderr.startswith("/nowhere.yaml: does not exist")


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_addresses_are_those_of_the_services_and_the_plan(
    services: dict[str, Any], plan: LaunchPlan, role: str
) -> None:
    service = services[role]
    options = dict(zip(service["command"][::2], service["command"][1::2], strict=True))
    (engine,) = plan.instance(role, options["--group"])  # type: ignore[arg-type]
    health = urlsplit(service["healthcheck"]["test"][-1])

    assert service["hostname"] == role == options["--listen"]
    assert (health.hostname, health.port, health.path) == (role, engine.port, "/health")
    assert options["--join"] == f"proxy:{plan.proxy.control_port}"
    assert service["depends_on"] == {"proxy": {"condition": "service_healthy"}}
    assert urlsplit(services["proxy"]["healthcheck"]["test"][-1]).path == "/live"  # /health would wait for them


def test_what_the_deployment_file_names_is_mounted(services: dict[str, Any], plan: LaunchPlan) -> None:
    assert plan.key_file is not None
    key = str(plan.key_file.parent)

    assert f"key:{key}" in services["proxy"]["volumes"]
    for role in ("prefill", "decode"):
        assert f"key:{key}:ro" in services[role]["volumes"]
        assert f"logs:{plan.engines[0].log_file.parent}" in services[role]["volumes"]
        assert "./1p1d.yaml:/etc/omni/deployment.yaml:ro" in services[role]["volumes"]


def test_the_image_has_the_folders_of_the_volumes_for_its_user(services: dict[str, Any]) -> None:
    """A new volume takes the owner of the folder that it covers; one that is not there belongs to root."""
    made = re.findall(r"install -d -o omni -g omni (?:-m 0700 )?(.+?)(?: \\)?$", DOCKERFILE.read_text(), re.M)
    folders = " ".join(made).split()
    written = {volume.split(":")[1] for volume in services["proxy"]["volumes"]} | {"/var/log/omni"}

    assert written <= set(folders)


def test_nothing_is_open_to_other_machines_unless_asked_for(services: dict[str, Any]) -> None:
    assert services["proxy"]["ports"] == ["127.0.0.1:7000:7000"]
    for service in services.values():
        assert service["cap_drop"] == ["ALL"]
        assert not service.get("privileged")
    assert all("ports" not in services[role] for role in ("prefill", "decode"))


@pytest.mark.parametrize("service", ["engines", "proxy"])
def test_the_command_for_ascend_is_read(service: str) -> None:
    command = services_of(ASCEND, VALUES)[service]["command"]
    said = subprocess.run(
        [sys.executable, "-m", "omni.cli.main", *command], capture_output=True, text=True, cwd=ROOT, timeout=60
    )

    assert command[-2:] == [service, "--quiet"]
    assert said.returncode != 0
    assert "Usage:" not in said.stderr
    assert "deployment.yml: does not exist" in said.stderr


@pytest.mark.parametrize("name", sorted(VALUES))
def test_what_ascend_cannot_guess_must_be_given(name: str) -> None:
    with pytest.raises(KeyError, match=name):
        services_of(ASCEND, {key: value for key, value in VALUES.items() if key != name})


DOCKERFILE = ROOT / "docker/Dockerfile.cpu"

"""From a file's path to a plan, and the deployment files that come with the project."""

from pathlib import Path

import pytest
import yaml

from omni.deployment import embedded_model
from omni.deployment.deployment_file import load_deployment
from omni.deployment.errors import ConfigError
from omni.deployment.load import load_plan

from .samples import FIELD_FILE, content, lines, machine, model_folder, put

CONFIGS = sorted((Path(__file__).parents[3] / "configs").glob("*.yaml"))


@pytest.fixture
def embedded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Stands in for making a model, with SmolLM2's sizes; returns the names asked for."""
    asked: list[str] = []

    def ensure(name: str) -> Path:
        asked.append(name)
        folder = model_folder(
            tmp_path / name,
            num_hidden_layers=30,
            num_attention_heads=9,
            num_key_value_heads=3,
            hidden_size=576,
            max_position_embeddings=8192,
        )
        with (folder / "model.safetensors").open("wb") as weights:
            weights.truncate(270_000_000)
        return folder

    monkeypatch.setattr(embedded_model, "ensure_embedded_model", ensure)
    return asked


def test_the_project_has_its_configs() -> None:
    assert {"demo", "1p1d", "2p1d", "4p1d", "2p2d"} <= {file.stem for file in CONFIGS}


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
@pytest.mark.parametrize("flags", [(), ("avx512_bf16",)], ids=["float32", "bfloat16"])
@pytest.mark.usefixtures("embedded")
def test_every_config_fits_a_small_machine(file: Path, flags: tuple[str, ...]) -> None:
    here = machine(cores=2, gib=24, flags=flags)
    plan = load_plan(file, here)
    assert sum(process.memory_bytes for process in plan.processes) < 0.6 * here.available_bytes
    assert plan.served_model_name == "smollm2-135m"
    if file.stem[0].isdigit():
        num_prefill, num_decode = int(file.stem[0]), int(file.stem[2])
        roles = [process.role for process in plan.processes]
        assert (roles.count("prefill"), roles.count("decode")) == (num_prefill, num_decode)


def test_demo_s_ports(embedded: list[str]) -> None:
    plan = load_plan(next(file for file in CONFIGS if file.stem == "demo"), machine())
    assert [process.port for process in plan.processes] == [9000, 9100, 7000]
    assert embedded == ["smollm2-135m"]


def test_a_model_folder_and_relative_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model_folder(tmp_path / "m")
    data = put(put(content(), "services/model_path", "m"), "services/log_path", "l")
    (tmp_path / "one.yaml").write_text(yaml.safe_dump(data))
    plan = load_plan("one.yaml", machine())
    assert plan.model_path == tmp_path / "m"
    assert plan.config_file == tmp_path / "one.yaml"
    assert plan.proxy.log_file == tmp_path / "l/proxy.log"
    assert (plan.name, plan.served_model_name) == ("one", "m")


def test_a_missing_model(tmp_path: Path) -> None:
    file = tmp_path / "one.yaml"
    file.write_text(yaml.safe_dump(put(content(), "services/model_path", "/no/such")))
    with pytest.raises(ConfigError, match=r"line 12: services\.model_path: /no/such is not a folder; write the"):
        load_plan(file, machine())


@pytest.mark.parametrize("error", [ImportError("needs gguf"), OSError("disk full")])
def test_an_embedded_model_that_cannot_be_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def ensure(name: str) -> Path:
        raise error

    monkeypatch.setattr(embedded_model, "ensure_embedded_model", ensure)
    file = tmp_path / "one.yaml"
    file.write_text(yaml.safe_dump(put(content(), "services/model_path", "embedded:tiny")))
    with pytest.raises(
        ConfigError, match=rf"line 12: services\.model_path: embedded:tiny: {error}; write a model folder's path"
    ):
        load_plan(file, machine())


def test_an_unknown_embedded_model(tmp_path: Path) -> None:
    file = tmp_path / "one.yaml"
    file.write_text(yaml.safe_dump(put(content(), "services/model_path", "embedded:huge")))
    with pytest.raises(ConfigError, match=r"unknown embedded model 'huge': choose one of smollm2-135m"):
        load_plan(file, machine())


def test_the_field_s_own_form_is_planned_without_its_model() -> None:
    plan = load_plan(FIELD_FILE, machine())
    assert plan.deployment.backend == "ansible"
    assert not plan.model_is_known
    assert len(plan.processes) == 4 + 64 + 1


def test_with_backend_local_it_is_for_other_machines(tmp_path: Path) -> None:
    file = tmp_path / "deploy.yml"
    file.write_text(f"backend: local\n{FIELD_FILE.read_text()}")
    with pytest.raises(ConfigError) as caught:
        load_plan(file, machine())
    assert len(caught.value.problems) == 6  # five groups and the proxy; no word about a model that lives there
    assert lines(caught.value)[4].startswith(
        "deployment.decode.group1.hosts: 192.0.2.5, 192.0.2.6, 192.0.2.7, 192.0.2.8: not this machine; write 127.0.0.1"
    )
    assert caught.value.problems[0].place.endswith("deploy.yml, line 7")


@pytest.mark.parametrize(
    ("on", "words"),
    [
        ("192.0.2.9", "--on: 192.0.2.9 is no host of the deployment file; write one of 192.0.2.1, 192.0.2.2,"),
        ("192.0.2.6", "--on or --listen: 192.0.2.6 is not this machine; run it there"),
    ],
)
def test_the_own_host_must_be_of_the_file_and_here(on: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_plan(FIELD_FILE, machine(), on=on)
    assert lines(caught.value)[0].startswith(words)


def test_another_backend_than_the_file_s(tmp_path: Path) -> None:
    assert load_plan(FIELD_FILE, machine(), backend="kubernetes").deployment.backend == "kubernetes"
    both = tmp_path / "both.yml"
    data = put(content(2), "deployment/prefill/group2/base_api_port", 9000)
    both.write_text(yaml.safe_dump(data | {"backend": "ray"}))
    load_deployment(both)  # groups of a cluster have addresses of their own
    with pytest.raises(ConfigError, match=r"port 9000 on 127\.0\.0\.1 overlaps"):
        load_plan(both, machine(), backend="ansible")
    with pytest.raises(ConfigError, match="--backend: 'slurm' is not known; write local, ansible, ray, kubernetes"):
        load_plan(FIELD_FILE, machine(), backend="slurm")


def test_other_machines_are_refused_before_a_model_is_made(tmp_path: Path, embedded: list[str]) -> None:
    data = put(put(content(), "services/model_path", "embedded:tiny"), "deployment/proxy/host", "10.9.9.9")
    file = tmp_path / "one.yaml"
    file.write_text(yaml.safe_dump(data))
    with pytest.raises(ConfigError, match=r"deployment\.proxy\.host: 10\.9\.9\.9: not this machine"):
        load_plan(file, machine())
    assert embedded == []

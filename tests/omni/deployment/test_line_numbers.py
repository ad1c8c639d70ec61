"""Errors name the line of the file: whatever finds them, and however the file is written."""

from collections.abc import Callable
from pathlib import Path

import pytest

from omni.deployment import strict_yaml
from omni.deployment.checks import check_machine
from omni.deployment.deployment_file import load_deployment
from omni.deployment.errors import ConfigError, MachineError, Problem, raise_any
from omni.deployment.line_numbers import naming_lines, shown_path
from omni.deployment.load import load_plan

from .samples import machine, model_folder

TEXT = """\
# Two hosts.
platform: npu
deployment:
  prefill:
    group1: &like
      hosts: "10.0.0.1,10.0.0.2"
      base_api_port: 9000
      host 10.0.0.1: {user: root}
      host  10.0.0.2 :
        base_api_port: 9100

    "p2":
      <<: *like
      hosts: "10.0.0.3"
      extra_args:
        - --max-num-seqs
        - "8"
  decode:
    group1: {base_api_port: 9000, hosts: "10.0.0.4"}
  c0:
    listen_port: 7000
services:
  model_path: /m
  prefill: {tensor_parallel_size: 2}
"""


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """deploy.yml in the working directory."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "deploy.yml"
    path.write_text(TEXT)
    return path


def place(file: Path, field: str) -> str:
    with pytest.raises(ConfigError) as caught, naming_lines(file):
        raise ConfigError([Problem(field, "is wrong", "mend it")])
    (problem,) = caught.value.problems
    assert (problem.field, problem.text, problem.mend) == (field, "is wrong", "mend it")
    start = f"{problem.place}: " if problem.place else ""
    assert str(caught.value) == f"{start}{field}: is wrong; mend it"
    return problem.place


@pytest.mark.parametrize(
    ("field", "line"),
    [
        ("platform", 2),
        ("deployment", 3),
        ("deployment.prefill.group1", 5),
        ("deployment.prefill.group1.base_api_port", 7),
        ("deployment.prefill.group1.host 10.0.0.1", 8),
        ("deployment.prefill.group1.host 10.0.0.1.user", 8),
        ("deployment.prefill.group1.host 10.0.0.2.base_api_port", 10),
        ("deployment.prefill.p2.hosts", 14),
        ("deployment.prefill.p2.base_api_port", 7),  # where it is written
        ("deployment.prefill.p2.extra_args.1", 17),
        ("deployment.decode.group1.hosts", 19),
        ("deployment.proxy.listen_port", 21),
        # What is missing is missing in its block.
        ("deployment.prefill.group1.host 10.0.0.2.user", 9),
        ("deployment.prefill.group1.host 10.0.0", 5),
        ("deployment.prefill.group1.host 10.0.0.3.base_api_port", 5),
        ("deployment.prefill.p2.extra_args.2", 15),
        ("deployment.prefill.p2.extra_args.-1", 15),
        ("deployment.prefill.group12.hosts", 4),
        ("deployment.proxy.control_port", 20),
        ("services.decode.max_model_len", 22),
        ("services.prefill.max_model_len", 24),
        ("services.model_path.x", 23),
    ],
)
def test_where_a_field_stands(file: Path, field: str, line: int) -> None:
    assert place(file, field) == f"deploy.yml, line {line}"


def test_a_block_that_is_not_in_the_file(file: Path) -> None:
    assert place(file, "name") == "deploy.yml"
    assert place(file, "backend") == "deploy.yml"


@pytest.mark.parametrize(
    "field",
    ["deploy.yml", "deploy.yml, line 3, column 4", "--on", "prefill=0", "environment variable X", "/m/deploy.yml"],
)
def test_what_is_no_field(file: Path, field: str) -> None:
    assert place(file, field) == ""


def test_a_file_with_a_field_s_name(file: Path) -> None:
    own = file.rename("deployment.yml")
    assert place(own, "deployment.yml") == ""
    assert place(own, "deployment.prefill") == "deployment.yml, line 4"


def test_the_last_of_equal_keys_counts(file: Path) -> None:
    file.write_text("deployment:\n  host 1:\n    a: 1\n  host  1:\n    b: 2\n")
    assert place(file, "deployment.host 1.b") == "deploy.yml, line 5"
    assert place(file, "deployment.host 1.a") == "deploy.yml, line 4"


def test_keys_that_begin_alike(file: Path) -> None:
    file.write_text("deployment:\n  host 10.0.0.1:\n    a: 1\n  host 10.0.0:\n    a: 1\n")
    assert place(file, "deployment.host 10.0.0.1.a") == "deploy.yml, line 3"
    assert place(file, "deployment.host 10.0.0.a") == "deploy.yml, line 5"


@pytest.mark.parametrize("text", ["a: [", "", "- a\n", "deployment: text\n", "a: \x01", "[" * 9000])
def test_the_file_changes_meanwhile(file: Path, text: str) -> None:
    file.write_text(text)
    expected = "deploy.yml, line 1" if text.startswith("deployment") else "deploy.yml"
    assert place(file, "deployment.prefill.group1.hosts") == expected


def test_the_file_goes_meanwhile(file: Path) -> None:
    file.unlink()
    assert place(file, "deployment.prefill.group1.hosts") == "deploy.yml"
    file.mkdir()
    assert place(file, "deployment.prefill.group1.hosts") == "deploy.yml"
    file.rmdir()
    file.write_bytes(b"a: \xe9")
    assert place(file, "deployment.prefill.group1.hosts") == "deploy.yml"


def test_the_file_as_it_was_read(file: Path) -> None:
    root = strict_yaml.read(TEXT).root
    file.write_text("\n" + TEXT)
    with pytest.raises(ConfigError, match=r"^deploy\.yml, line 2: platform: "), naming_lines(file, root):
        raise ConfigError([Problem("platform", "is wrong", "mend it")])


def test_a_block_that_holds_itself(file: Path) -> None:
    file.write_text("deployment: &x\n  prefill: *x\n")
    assert place(file, "deployment.prefill.prefill.prefill.decode") == "deploy.yml, line 2"


def test_a_place_is_named_once(file: Path) -> None:
    problem = Problem("platform", "is wrong", "mend it", place="other.yml, line 1")
    with pytest.raises(MachineError) as caught, naming_lines(file):
        raise_any([problem, Problem("deployment", "is wrong", "mend it")], MachineError)
    assert [problem.place for problem in caught.value.problems] == ["other.yml, line 1", "deploy.yml, line 3"]


def test_other_errors_and_causes_stay(file: Path) -> None:
    with pytest.raises(KeyError), naming_lines(file):
        raise KeyError("platform")
    cause = OSError("disk full")
    with pytest.raises(ConfigError) as caught, naming_lines(file):
        raise ConfigError([Problem("platform", "is wrong", "mend it")]) from cause
    assert caught.value.__cause__ is cause


def test_paths_as_people_write_them(file: Path, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    assert shown_path(tmp_path / "a/b.yml") == "a/b.yml"
    assert shown_path(Path("a/b.yml")) == "a/b.yml"
    assert shown_path(tmp_path.parent / "b.yml") == str(tmp_path.parent / "b.yml")


@pytest.mark.parametrize("read", [load_deployment, load_plan])
def test_the_fields_of_a_file(file: Path, read: Callable[[Path], object]) -> None:
    file.write_text(TEXT.replace("9100", "x").replace("7000", "70000"))
    with pytest.raises(ConfigError) as caught:
        read(file)
    assert str(caught.value).splitlines() == [
        "deploy.yml, line 10: deployment.prefill.group1.host 10.0.0.2.base_api_port: 'x' is not a port number; "
        "write a number from 1024 to 65535",
        "deploy.yml, line 10: deployment.prefill.p2.host 10.0.0.2.base_api_port: 'x' is not a port number; "
        "write a number from 1024 to 65535",
        "deploy.yml, line 21: deployment.proxy.listen_port: 70000 is not a port number; "
        "write a number from 1024 to 65535",
    ]


def test_the_rules_across_fields(file: Path) -> None:
    file.write_text(TEXT.replace("10.0.0.4", "10.0.0.3"))
    with pytest.raises(ConfigError) as caught:
        load_deployment(file)
    assert [(problem.place, problem.field) for problem in caught.value.problems] == [
        ("deploy.yml, line 8", "deployment.prefill.p2.host 10.0.0.1"),
        ("deploy.yml, line 9", "deployment.prefill.p2.host 10.0.0.2"),
        ("deploy.yml, line 19", "deployment.decode.group1.base_api_port"),
        ("deploy.yml, line 19", "deployment.decode.group1.master_port"),
    ]


def test_what_the_plan_finds(file: Path) -> None:
    model_folder(file.parent / "m")
    text = "deployment:\n  mixed:\n    m1:\n      base_api_port: 9000\nservices:\n  model_path: m\n"
    file.write_text(f"{text}  mixed:\n    max_model_len: 9999\n    env:\n      VLLM_DP_RANK: 3\n")
    with pytest.raises(ConfigError) as caught:
        load_plan(file, machine())
    assert [problem.place for problem in caught.value.problems] == ["deploy.yml, line 10", "deploy.yml, line 8"]


def test_what_the_machine_lacks(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = model_folder(file.parent / "m")
    text = "deployment:\n  mixed:\n    m1:\n      base_api_port: 9000\nservices:\n  model_path: m\n"
    file.write_text(text)
    plan = load_plan(file, machine())
    (folder / "config.json").unlink()
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "4")
    with pytest.raises(MachineError) as caught:
        check_machine(plan, machine(gib=0.1))
    places = {problem.field: problem.place for problem in caught.value.problems}
    assert places["services.model_path"] == "deploy.yml, line 6"
    assert places["environment variable VLLM_CPU_KVCACHE_SPACE"] == ""
    assert places[str(file)] == ""


def test_no_value_is_shown(file: Path) -> None:
    file.write_text(TEXT.replace("{user: root}", "{password: 12345}"))
    with pytest.raises(ConfigError) as caught:
        load_deployment(file)
    assert "deploy.yml, line 8: deployment.prefill.group1.host 10.0.0.1.password: is not text" in str(caught.value)
    assert "12345" not in str(caught.value)

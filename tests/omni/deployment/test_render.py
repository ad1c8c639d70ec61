"""Plans for people and for programs."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from kv_transfer.auth import load_or_make_key
from omni.deployment.render import HIDDEN, plan_as_dict, plan_table, shown_command

from .samples import content, planned, put


def test_the_table(tmp_path: Path) -> None:
    console = Console(width=100)
    with console.capture() as capture:
        console.print(plan_table(planned(tmp_path, content())))
    text = capture.get()
    for part in (
        "trial: smollm2 in bfloat16",
        "decode.group1.rank0",
        "http://127.0.0.1:9500",
        "logs/trial",
        "total",
        "127.0.0.1:7001",
    ):
        assert part in text
    assert text.count("any") == 1, "the engines have their cores"
    assert "4.71" in text, "the sum of the processes' memory"


def test_the_dictionary(tmp_path: Path) -> None:
    plan = planned(tmp_path, content(2))
    shown = json.loads(json.dumps(plan_as_dict(plan)))
    assert shown["name"] == "trial"
    assert shown["control_addresses"] == ["127.0.0.1:7001"]
    assert [process["url"] for process in shown["processes"]][-1] == "http://127.0.0.1:7000"
    first = shown["processes"][0]
    assert first["command"] == list(plan.processes[0].command)
    assert first["env"] == plan.processes[0].env
    assert (first["cpu_cores"], first["kv_bytes"]) == ([0], plan.processes[0].kv_bytes)


def test_the_deployment_key_is_in_no_plan(tmp_path: Path) -> None:
    load_or_make_key(tmp_path / "key")
    secret = (tmp_path / "key").read_text().strip()
    data = put(content(), "services/kv_transfer", {"key_file": str(tmp_path / "key"), "mode": "layerwise"})
    plan = planned(tmp_path, data)
    shown = plan_as_dict(plan)
    assert (shown["connector"], shown["key_file"]) == ("omni", str(tmp_path / "key"))
    assert [process["kv_address"] for process in shown["processes"]] == ["127.0.0.1:11000", None, None]
    assert secret not in json.dumps(shown)
    assert secret not in repr(plan)


def test_secrets_show_nowhere(tmp_path: Path) -> None:
    data = put(content(), "services/prefill/env", {"HF_TOKEN": "hunter2", "MY_PASSWORD": "hunter2", "TOKENIZERS": "ok"})
    extra = [
        "--api-key",
        "hunter2",
        "hunter2",
        "--hf-token=hunter2",
        "--max-num-batched-tokens",
        "99",
        "--tokenizer",
        "t",
    ]
    put(data, "services/prefill/extra_args", extra)
    put(data, "deployment/prefill/group1/password", "hunter2")
    plan = planned(tmp_path, data)
    shown = plan_as_dict(plan)
    console = Console(width=200)
    with console.capture() as capture:
        console.print(plan_table(plan))
    assert "hunter2" not in json.dumps(shown) + shown_command(plan.processes[0]) + capture.get()
    assert shown["processes"][0]["env"]["HF_TOKEN"] == HIDDEN
    assert shown["processes"][0]["env"]["TOKENIZERS"] == "ok"
    assert shown["processes"][0]["command"][-4:] == ["--max-num-batched-tokens", "99", "--tokenizer", "t"]
    assert "hunter2" in plan.processes[0].command, "the plan itself still has it"


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("http://u:hunter2@proxy:3128/x", "http://***@proxy:3128/x"),
        ("u:hunter2@proxy:3128", "***@proxy:3128"),
        ("http://u:hunter2/hunter2@hunter2@proxy", "http://***@proxy"),
        ("https://hunter2@proxy", "https://***@proxy"),
        ('{"a": "u:hunter2@proxy", "b": "http://:hunter2@proxy"}', '{"a": "***@proxy", "b": "http://***@proxy"}'),
        ("http://proxy:3128", "http://proxy:3128"),
        ("me@example.com", "me@example.com"),
        ("/models/a:b@c", "/models/a:b@c"),
    ],
)
def test_credentials_in_urls_show_nowhere(url: str, expected: str, tmp_path: Path) -> None:
    data = put(content(), "services/prefill/env", {"WHERE": url})
    put(data, "services/prefill/extra_args", ["--where", url, f"--where={url}"])
    plan = planned(tmp_path, data)
    (shown, *_) = plan_as_dict(plan)["processes"]
    assert shown["env"]["WHERE"] == expected
    assert shown["command"][-3:] == ["--where", expected, f"--where={expected}"]
    assert "hunter2" not in shown_command(plan.processes[0])


def test_the_table_shows_brackets(tmp_path: Path) -> None:
    plan = planned(tmp_path, content())
    plan = replace(plan, served_model_name="m[/b][q4]", model_path=Path("/models/[/red]:x:"))
    console = Console(width=200)
    with console.capture() as capture:
        console.print(plan_table(plan))
    assert "trial: m[/b][q4] in" in capture.get()
    assert "/models/[/red]:x:" in capture.get()

"""`omni_cli status`: of states alone, and of stand-in engines behind the real proxy."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner, Result

from omni.cli import status
from omni.cli.completion_proof import Completion
from omni.deployment.engines_file import write_engines
from omni.deployment.run_state import DeploymentState, ProcessState, RunFolder
from services.global_proxy.security.api_keys import new_key
from tests.omni.cli.launchers import all_ready, plan_of, running
from tests.omni.cli.standin_deployment import HOST, standing_in

REPOSITORY = Path(__file__).parents[3]
TIMEOUT_S = 60


def omni_cli(*arguments: str) -> Result:
    app = typer.Typer()
    app.command("other")(lambda: None)
    app.command("status")(status.status)
    return CliRunner().invoke(app, ["status", *arguments])


def test_without_a_completion(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, proxy_port=1)
    with running(plan, states=all_ready(plan)) as deployment:
        write_engines(RunFolder.of(plan.name), plan.processes[:-1])
        table, as_json = omni_cli("--no-completion"), omni_cli("trial", "--json", "--no-completion")
    assert (table.exit_code, as_json.exit_code) == (0, 0)
    assert "trial: http://127.0.0.1:1 serves smollm2" in table.stdout
    assert "127.0.0.1:9500" in table.stdout
    shown = json.loads(as_json.stdout)
    assert shown["deployment"]["launcher_pid"] == deployment.launcher_pid
    assert [process["name"] for process in shown["processes"]] == [process.name for process in plan.processes]
    assert {process["state"] for process in shown["processes"]} == {"ready"}
    assert (shown["instances"], shown["completion"]) == (None, None)
    assert "deployment key" in shown["proxy_problem"]


def test_a_completion_that_fails(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, proxy_port=1)
    with running(plan, states=all_ready(plan)):
        table, as_json = omni_cli(), omni_cli("--json")
    assert (table.exit_code, as_json.exit_code) == (1, 1)
    assert "completion: failed: http://127.0.0.1:1 did not answer to the end" in table.stdout
    assert "Cannot connect" in json.loads(as_json.stdout)["completion"]["problem"]


def test_brackets_in_names_are_shown(tmp_path: Path) -> None:
    plan = replace(plan_of(tmp_path, proxy_port=1), served_model_name="m[/b][q4]")
    states = {"d": ProcessState(name="decode.group1.rank0", stage="[/loading]", pid=os.getpid())}
    with running(plan, states=states):
        done = omni_cli("--no-completion")
    assert done.exit_code == 1, done.output
    assert "serves m[/b][q4]" in done.stdout
    assert "[/loading]" in done.stdout


def test_not_ready(tmp_path: Path) -> None:
    """One has not begun, one is starting, one ended with its supervisor, which could not write it."""
    plan = plan_of(tmp_path, proxy_port=1)
    with subprocess.Popen(["/bin/true"]) as ended:
        pass
    states = {
        "d": ProcessState(name="decode.group1.rank0", stage="loading weights", pid=os.getpid()),
        "x": ProcessState(name="proxy", state="ready", pid=ended.pid),
    }
    with running(plan, states=states):
        table, as_json = omni_cli("--no-completion"), omni_cli("--json", "--no-completion")
    assert (table.exit_code, as_json.exit_code) == (1, 1)
    assert "loading weights" in table.stdout
    assert "ended with its supervisor" in table.stdout
    assert [p["state"] for p in json.loads(as_json.stdout)["processes"]] == ["starting", "starting", "restarting"]


def test_engines_whose_proxy_is_elsewhere(tmp_path: Path) -> None:
    """No completion is asked for, unless wanted."""
    plan = plan_of(tmp_path, proxy_port=1)
    states = {name: state for name, state in all_ready(plan).items() if name != "proxy"}
    with running(plan, states=states) as deployment:
        RunFolder.of(plan.name).write_deployment(replace(deployment, process_names=tuple(states)))
        assert (omni_cli().exit_code, omni_cli("--completion").exit_code) == (0, 1)


def test_a_file_that_is_not_there_any_more(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, proxy_port=1)
    with running(plan, states=all_ready(plan)):
        plan.config_file.unlink()
        done = omni_cli()
    assert done.exit_code == 1
    assert "prefill.group1.rank0" in done.stdout
    assert "completion: failed: " in done.stdout


def test_of_a_remote_backend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Elsewhere:
        def process_states(self, deployment: DeploymentState) -> list[ProcessState]:
            return [ProcessState(name="decode.group2.rank3.node1", state="ready", host="10.0.0.7", pid=7)]

    monkeypatch.setattr("omni.cli.running.remote_backend", lambda name: Elsewhere())
    plan = plan_of(tmp_path, proxy_port=1)
    with running(plan) as deployment:
        RunFolder.of(plan.name).write_deployment(replace(deployment, backend="ansible"))
        (shown,) = json.loads(omni_cli("--json", "--no-completion").stdout)["processes"]
    facts = {"role": "decode", "group": "group2", "rank": 3, "node": 1, "host": "10.0.0.7", "port": None, "pid": 7}
    assert facts.items() <= shown.items()


class TestStanding:
    def test_load_and_completion(self, tmp_path: Path, free_ports: Callable[[int], int]) -> None:
        with standing_in(tmp_path, free_ports, num_decode=2) as standing:
            as_json = omni_cli("--json")
            assert as_json.exit_code == 0, as_json.output
            shown = json.loads(as_json.stdout)
            assert [one["name"] for one in shown["processes"]] == [
                "prefill.group1.rank0",
                "decode.group1.rank0",
                "decode.group2.rank0",
                "proxy",
            ]
            last = shown["processes"][2]
            facts = {"role": "decode", "group": "group2", "rank": 0, "host": HOST, "restarts": 0}
            assert facts.items() <= last.items()
            assert last["uptime_s"] > 0
            assert {one["name"] for one in shown["instances"]} == {
                f"{HOST}:{one['port']}" for one in shown["processes"] if one["role"] != "proxy"
            }
            completion = shown["completion"]
            assert (completion["problem"], completion["path"]) == (None, "disaggregated")
            assert len(completion["text"].split()) == 8
            assert 0 < completion["ttft_ms"] <= completion["total_ms"]

            standing.client.drain(f"{HOST}:{last['port']}")
            standing.client.add("decode", "http://10.0.0.7:1")
            table = omni_cli()
            assert table.exit_code == 0, table.output
            assert "the proxy: draining" in table.stdout
            assert "not started by omni_cli here" in table.stdout
            assert "disaggregated)" in table.stdout

            for lines in watched(3):
                one = json.loads(lines[-1])
            assert one["completion"]["problem"] is None
            assert [process["state"] for process in one["processes"]] == ["ready"] * 4

    def test_api_keys(self, tmp_path: Path, free_ports: Callable[[int], int], monkeypatch: pytest.MonkeyPatch) -> None:
        key, entry = new_key("ops")
        keys, key_file = tmp_path / "keys", tmp_path / "key"
        keys.write_text(entry.line() + "\n")
        key_file.write_text(key + "\n")
        with standing_in(tmp_path, free_ports, api_keys_file=str(keys)):
            done = omni_cli()
            assert done.exit_code == 1
            assert "requests need an API key: name a file with one by --api-key-file" in done.stdout
            assert omni_cli("--api-key-file", str(key_file)).exit_code == 0
            monkeypatch.setenv("OMNI_API_KEY", key)
            assert omni_cli().exit_code == 0
            monkeypatch.setenv("OMNI_API_KEY", key[:-1] + "x")
            done = omni_cli("--json")
            assert done.exit_code == 1
            assert json.loads(done.stdout)["completion"]["problem"].startswith("the proxy answered 401: ")


def watched(num_lines: int) -> list[list[str]]:
    """Lines of `status --watch --json` until there is a completion in one and there are so many; Ctrl-C ends it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    script = "import typer; from omni.cli.status import status; typer.run(status)"
    command = [sys.executable, "-c", script, "--watch", "--json", "--interval-s", "0.1"]
    lines: list[str] = []
    try:
        with subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            late = threading.Timer(TIMEOUT_S, process.kill)
            late.start()
            for line in process.stdout:
                lines.append(line)
                if len(lines) >= num_lines and json.loads(line)["completion"] is not None:
                    break
            process.send_signal(signal.SIGINT)
            assert process.wait(TIMEOUT_S) == 0
            late.cancel()
    finally:
        signal.signal(signal.SIGINT, before)
    return [lines]


class TestWatch:
    """With a clock that the test moves."""

    def test_completions_come_now_and_then(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        plan = plan_of(tmp_path, proxy_port=1)
        now_s, taken_at_s = 1000.0, []
        looks: list[float] = []

        def sleep(seconds: float) -> None:
            nonlocal now_s
            looks.append(now_s)
            now_s += seconds
            for thread in threading.enumerate():
                if thread.daemon and "_take_and_keep" in thread.name:
                    thread.join(TIMEOUT_S)
            if now_s > 1065:
                raise KeyboardInterrupt

        def complete(url: str, model: str, **options: Any) -> Completion:
            taken_at_s.append(now_s)
            return Completion(text="hi", num_tokens=1, ttft_ms=1.0, total_ms=2.0)

        class Clock:
            monotonic = staticmethod(lambda: now_s)

        Clock.sleep = staticmethod(sleep)  # type: ignore[attr-defined]
        monkeypatch.setattr(status, "time", Clock)
        monkeypatch.setattr(status, "complete", complete)
        with running(plan, states=all_ready(plan)):
            done = omni_cli("--watch")
        assert done.exit_code == 0, done.output
        assert taken_at_s == [1000.0, 1030.0, 1060.0]
        assert looks == [1000.0 + 2 * number for number in range(33)]
        assert "completion: 'hi' (1 tokens, TTFT 1 ms, 2 ms in all)" in done.stdout

    def test_a_deployment_that_ends(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        plan = plan_of(tmp_path, proxy_port=1)
        with running(plan, states=all_ready(plan)):

            def sleep(seconds: float) -> None:
                RunFolder.of(plan.name).remove()

            monkeypatch.setattr(time, "sleep", sleep)
            done = omni_cli("--watch", "--no-completion")
        assert (done.exit_code, done.stderr) == (2, "trial has ended\n")


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(None, "-"), (0.4, "0s"), (59, "59s"), (75, "1m15s"), (3600, "1h0m"), (90_061, "1d1h")],
    ids=str,
)
def test_durations(seconds: float | None, shown: str) -> None:
    assert status._duration(seconds) == shown


@pytest.mark.parametrize(("wanted", "message"), [("none", "cannot be read"), ("empty", "has no API key")])
def test_a_key_file_that_cannot_be_used(tmp_path: Path, wanted: str, message: str) -> None:
    (tmp_path / "empty").write_text("\n")
    plan = plan_of(tmp_path, proxy_port=1)
    with running(plan, states=all_ready(plan)):
        done = omni_cli("--api-key-file", str(tmp_path / wanted))
    assert (done.exit_code, done.stdout) == (2, "")
    assert message in done.stderr

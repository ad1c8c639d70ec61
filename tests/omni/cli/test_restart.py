"""`omni_cli restart` of stand-in engines under real supervisors, behind the real proxy."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from http.client import HTTPConnection
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import ProxyHandler, Request, build_opener

import pytest
import typer
from typer.testing import CliRunner, Result

from kv_transfer.auth import default_key_path, load_or_make_key
from omni.cli import restart, rolling_restart
from omni.cli.rolling_restart import Unit, units_of
from omni.deployment.backends import Say
from omni.deployment.errors import DeploymentError
from omni.deployment.run_state import DeploymentState, ProcessState, RunFolder
from tests.omni.cli.launchers import all_ready, plan_of, running
from tests.omni.cli.standin_deployment import Standing, standing_in
from tests.standins.fast_engine import SLOW_DECODE, expected_text

_opener = build_opener(ProxyHandler({}))


def omni_cli(*arguments: str) -> Result:
    app = typer.Typer()
    app.command("other")(lambda: None)
    app.command("restart")(restart.restart)
    return CliRunner().invoke(app, ["restart", *arguments])


def complete(url: str, prompt: str, num_tokens: int = 3) -> str:
    body = json.dumps({"model": "smollm2", "prompt": prompt, "max_tokens": num_tokens}).encode()
    request = Request(f"{url}/v1/completions", body, {"content-type": "application/json"})  # noqa: S310
    with _opener.open(request, timeout=60) as answer:
        text: str = json.load(answer)["choices"][0]["text"]
        return text


@contextmanager
def under_load(url: str) -> Iterator[list[str]]:
    """Requests one after another from four clients; at the end, what went wrong."""
    wrong: list[str] = []
    num_right = 0
    done = threading.Event()

    def ask(client: int) -> None:
        nonlocal num_right
        number = 0
        while not done.is_set():
            number += 1
            prompt = f"{client} {number}"
            try:
                if complete(url, prompt, 5) != expected_text(prompt, 5):
                    wrong.append(f"{prompt}: another text")
                num_right += 1
            except OSError as error:
                wrong.append(f"{prompt}: {error}")

    threads = [threading.Thread(target=ask, args=(client,)) for client in range(4)]
    for thread in threads:
        thread.start()
    try:
        yield wrong
    finally:
        done.set()
        for thread in threads:
            thread.join(60)
    assert num_right > 0


def num_retries(url: str) -> float:
    """Legs that the proxy has sent again."""
    with _opener.open(f"{url}/metrics", timeout=60) as answer:
        text = answer.read().decode()
    assert "# TYPE omni_proxy_retries_total counter" in text
    lines = [line for line in text.splitlines() if line.startswith("omni_proxy_retries_total{")]
    return sum(float(line.split()[-1]) for line in lines)


def pids(standing: Standing) -> dict[str, int | None]:
    return {name: state.pid for name, state in standing.states.items()}


def test_one_after_another_under_load(tmp_path: Path, free_ports: Callable[[int], int]) -> None:
    """No request fails. Then one by name, then the proxy."""
    with standing_in(tmp_path, free_ports, num_prefill=2, num_decode=2) as standing:
        before = pids(standing)
        with under_load(standing.proxy_url) as wrong:
            done = omni_cli()
        assert (done.exit_code, done.stderr) == (0, "")
        assert "4 restarted" in done.stdout
        assert not wrong
        after = pids(standing)
        assert {name for name in before if before[name] != after[name]} == before.keys() - {"proxy", "engine_host"}
        for state in standing.states.values():
            assert state.restarts == (state.name not in ("proxy", "engine_host")), state
        assert [one["state"] for one in standing.client.instances()] == ["active"] * 4

        before = after
        with under_load(standing.proxy_url) as wrong:
            done = omni_cli("decode.group2.rank0", "--deployment", "trial")
        assert (done.exit_code, wrong) == (0, []), done.output
        assert num_retries(standing.proxy_url) == 0  # nothing was lost and asked again elsewhere
        after = pids(standing)
        assert {name for name in before if before[name] != after[name]} == {"decode.group2.rank0"}

        before = after
        assert omni_cli("proxy").exit_code == 0
        after = pids(standing)
        assert {name for name in before if before[name] != after[name]} == {"proxy"}
        assert complete(standing.proxy_url, "again") == expected_text("again", 3)


def test_the_only_one_of_its_role(tmp_path: Path, free_ports: Callable[[int], int]) -> None:
    with standing_in(tmp_path, free_ports, num_decode=2) as standing:
        before = pids(standing)
        done = omni_cli()
        assert done.exit_code == 2
        assert "prefill.group1.rank0: nobody else of this role is up" in done.stderr
        assert "decode" not in done.stderr
        assert pids(standing) == before

        with closing(HTTPConnection(urlsplit(standing.proxy_url).netloc)) as stuck:
            body = json.dumps({"model": "smollm2", "prompt": SLOW_DECODE, "max_tokens": 1})
            stuck.request("POST", "/v1/completions", body, {"content-type": "application/json"})
            busy = wait_for_busy(standing)
            done = omni_cli(busy, "--wait-s", "0.2")
            assert done.exit_code == 2
            assert "has 1 requests" in done.stderr
            assert "it gets requests as before" in done.stderr
            assert pids(standing) == before
            instance = standing.instance(busy)
            assert instance is not None
            assert (instance["state"], instance["num_requests"]) == ("active", 1)

            done = omni_cli("prefill.group1.rank0", busy, "--yes", "--force", "--wait-s", "0.2")
            assert done.exit_code == 0, done.output
        after = pids(standing)
        assert {name for name in before if before[name] != after[name]} == {"prefill.group1.rank0", busy}
        assert complete(standing.proxy_url, "again") == expected_text("again", 3)


def wait_for_busy(standing: Standing) -> str:
    """The decode engine that has the request."""
    for _ in range(600):
        for name in ("decode.group1.rank0", "decode.group2.rank0"):
            instance = standing.instance(name)
            if instance is not None and instance["num_requests"]:
                return name
        threading.Event().wait(0.05)
    raise AssertionError("no engine was asked")


def test_what_is_refused(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, proxy_port=1)
    done = omni_cli()
    assert (done.exit_code, "no deployment is running" in done.stderr) == (2, True)
    with running(plan, states=all_ready(plan)):
        done = omni_cli("typo")
        assert done.exit_code == 2
        assert "trial has no process 'typo'; it has prefill.group1.rank0, decode.group1.rank0, proxy" in done.stderr
        done = omni_cli()  # its proxy does not answer
        assert done.exit_code == 2
        assert "nothing can be drained, so requests may fail: the deployment key" in done.stderr
        load_or_make_key(default_key_path())
        done = omni_cli()
        assert done.exit_code == 2
        assert "requests may fail: the proxy's admin API at http://127.0.0.1:1/admin/v1 does not" in done.stderr
        done = omni_cli("--yes")  # and there is no engine host
        assert done.exit_code == 2
        assert "the engine host does not run just now" in done.stderr
        assert (
            "not restarted: decode.group1.rank0. When all is well again: "
            "`omni_cli restart --deployment trial decode.group1.rank0`" in done.stderr.replace("\n", " ")
        )


def test_what_is_restarted_together(tmp_path: Path) -> None:
    prefill, decode, _ = plan_of(tmp_path).processes
    other = replace(decode, name="decode.group1.rank1", dp_rank=1, port=9501)
    names = [engine.name for engine in (prefill, decode, other)]
    assert [unit.names for unit in units_of(names, (prefill, decode, other))] == [(name,) for name in names]
    coupled = tuple(replace(rank, command=(*rank.command, "--data-parallel-size", "2")) for rank in (decode, other))
    assert units_of([names[2]], (prefill, *coupled)) == [
        Unit(role="decode", names=(names[1], names[2]), instances=("127.0.0.1:9500", "127.0.0.1:9501"))
    ]
    node = replace(decode, name="decode.group1.rank0.node1", node_rank=1, port=0, leader_url=decode.url)
    assert units_of([node.name], (decode, node, other)) == [
        Unit(role="decode", names=(names[1], node.name), instances=("127.0.0.1:9500",))
    ]
    assert units_of([node.name], (node,)) == [  # the first node is on another host
        Unit(role="decode", names=(node.name,), instances=("127.0.0.1:9500",))
    ]
    assert [unit.names for unit in units_of(names, (prefill, *coupled))] == [(names[0],), (names[1], names[2])]
    assert units_of(["prefill.group9.rank0"], ()) == [
        Unit(role="prefill", names=("prefill.group9.rank0",), instances=())
    ]


@pytest.mark.parametrize(
    ("now", "expected"),
    [
        ({"state": "ready", "pid": 8, "restarts": 4}, True),
        ({"state": "ready", "pid": 7, "restarts": 3}, False),
        ({"state": "starting", "pid": 8, "restarts": 4}, False),
        ({"state": "failed", "pid": None, "restarts": 3}, False),
        ({"state": "ready", "pid": 8, "restarts": 0}, True),
        ({"state": "failed", "pid": None, "restarts": 4, "message": "exited with code 3"}, None),
        ({"state": "restarting", "pid": None, "restarts": 5, "message": "exited with code 3"}, None),
    ],
    ids=["back", "not begun", "starting", "not begun: was given up", "host restarted too", "given up", "ended again"],
)
def test_whether_it_is_back(now: dict[str, object], expected: bool | None) -> None:
    before = ProcessState(name="x", state="ready", pid=7, restarts=3)
    state = before.changed(**now)
    if expected is None:
        with pytest.raises(DeploymentError, match="x does not start again: exited with code 3"):
            rolling_restart._is_back(before, state)
    else:
        assert rolling_restart._is_back(before, state) is expected


class Elsewhere:
    """A remote backend of which only what is asked is known."""

    def __init__(self, states: list[ProcessState]) -> None:
        self.asked: list[tuple[str, ...]] = []
        self._states = states

    def restart(self, deployment: DeploymentState, names: tuple[str, ...], say: Say) -> None:
        self.asked.append(names)

    def process_states(self, deployment: DeploymentState) -> list[ProcessState]:
        return self._states


def test_elsewhere_the_backend_restarts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_of(tmp_path, proxy_port=1)
    elsewhere = Elsewhere(list(all_ready(plan).values()))
    monkeypatch.setattr("omni.cli.rolling_restart.remote_backend", lambda name: elsewhere)
    monkeypatch.setattr("omni.cli.running.remote_backend", lambda name: elsewhere)
    with running(plan) as deployment:
        RunFolder.of(plan.name).write_deployment(replace(deployment, backend="ansible"))
        done = omni_cli("proxy", "prefill.group1.rank0", "--yes")
    assert done.exit_code == 0, done.output
    assert elsewhere.asked == [("prefill.group1.rank0",), ("proxy",)]

"""`omni_cli scale` against the real admin API and registry, and an engine host that only writes states."""

import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import typer
import uvicorn
from fastapi import FastAPI
from typer.testing import CliRunner, Result

from kv_transfer.auth import DeploymentKey, default_key_path, load_or_make_key
from omni.cli import scale
from omni.deployment.admin_client import AdminClient
from omni.deployment.engines_file import read_engines, write_engines
from omni.deployment.errors import DeploymentError
from omni.deployment.plan_types import LaunchPlan
from omni.deployment.run_state import ProcessState, RunFolder
from services.global_proxy.membership.admin import admin_token, make_admin_router
from services.global_proxy.membership.load_table import LoadTable
from services.global_proxy.membership.member import InstanceSpec, LoadReport
from services.global_proxy.membership.registry import Registry
from services.global_proxy.membership.registry_client import DirectClient
from tests.omni.cli.launchers import all_ready, plan_of, running
from tests.omni.deployment.samples import machine, model_folder

# On SIGUSR1: what engines.json says is ready, or failed; what it says no more is gone.
ENGINE_HOST = """
import json, os, pathlib, signal, sys
folder, state = pathlib.Path(sys.argv[1]), sys.argv[2]
def apply(*_):
    names = {engine["name"] for engine in json.loads((folder / "engines.json").read_text())} | {"proxy", "engine_host"}
    for file in folder.glob("*.process.json"):
        if file.name.removesuffix(".process.json") not in names:
            file.unlink()
    for name in names:
        if not (folder / f"{name}.process.json").exists():
            (folder / "new").write_text(json.dumps({"name": name, "state": state, "message": "exited with code 3"}))
            (folder / "new").rename(folder / f"{name}.process.json")
signal.signal(signal.SIGUSR1, apply)
print("up", flush=True)
while True:
    signal.pause()
"""


@dataclass
class Proxy:
    url: str
    registry: Registry
    table: LoadTable

    @property
    def names(self) -> list[str]:
        return [member.name for member in self.registry.members()]


@pytest.fixture
def proxy() -> Iterator[Proxy]:
    """The registry belongs to the server's loop; tests look at it only while no command runs."""
    table = LoadTable.create(num_slots=8)
    registry = Registry(table, {"prefill": ("p",), "decode": ("d",)}, "p", "d")
    app = FastAPI()
    key = load_or_make_key(default_key_path())
    app.include_router(make_admin_router(DirectClient(registry), table, admin_token(key)))
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_config=None, lifespan="off"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            thread.join(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        yield Proxy(f"http://127.0.0.1:{port}", registry, table)
    finally:
        server.should_exit = True
        thread.join(10)


def omni_cli(*arguments: str) -> Result:
    app = typer.Typer()
    app.command("other")(lambda: None)
    app.add_typer(scale.app, name="scale")
    return CliRunner().invoke(app, ["scale", *arguments])


def test_instances_elsewhere(proxy: Proxy, tmp_path: Path) -> None:
    at = ("--url", proxy.url)
    assert omni_cli("add", "prefill", "http://10.0.0.7:8100", "--kv-address", "10.0.0.7:9100", *at).exit_code == 0
    (member,) = proxy.registry.members()
    assert member.spec == InstanceSpec("prefill", "http://10.0.0.7:8100", "10.0.0.7:9100")
    proxy.registry.report(member.name, LoadReport(3, 4, 100, 900, at_s=time.monotonic()))
    listed = omni_cli("list", *at)
    assert all(text in listed.stdout for text in ("prefill", "10.0.0.7:8100", "active", "admin"))
    (shown,) = json.loads(omni_cli("list", "--json", *at).stdout)
    assert (shown["state"], shown["report"]["kv_used_tokens"], shown["report"]["num_waiting"]) == ("active", 100, 4)
    assert "has 0 requests" in omni_cli("drain", "10.0.0.7:8100", *at).stdout
    assert proxy.registry.members()[0].state == "draining"
    assert omni_cli("remove", "10.0.0.7:8100", *at).exit_code == 0
    assert not proxy.registry.members()


def test_what_is_refused_is_one_message(proxy: Proxy, tmp_path: Path) -> None:
    other = tmp_path / "other.key"
    other.write_text("ab" * 32)
    other.chmod(0o600)
    at = ("--url", proxy.url)
    proxy.registry.add(InstanceSpec("decode", "http://10.0.0.8:1"), "file")
    proxy.table.writer(0).add(0, 1, 10)
    for arguments, message in (
        (("add", "both", "http://10.0.0.7:1", *at), "role"),
        (("drain", "10.0.0.7:1", *at), "no instance is called '10.0.0.7:1'"),
        (("remove", "10.0.0.8:1", "--wait-s", "0", *at), "has 1 requests"),
        (("list", *at, "--key-file", str(other)), "token of this deployment's key"),
        (("list", *at, "--key-file", str(tmp_path / "none")), "cannot be read"),
        (("list", "--url", "http://127.0.0.1:1"), "does not answer"),
        (("list", "--key-file", str(other)), "--key-file: goes with --url"),
        (("list",), "no deployment is running"),
        (("prefill=x",), "'prefill=x': write each of"),
        (("prefill=1", "prefill=2"), "'prefill=2': write each of"),
        (("to", "proxy=1"), "'proxy=1': write each of"),
    ):
        done = omni_cli(*arguments)
        assert (done.exit_code, done.stdout) == (2, ""), arguments
        assert message in done.stderr, arguments
        assert "Traceback" not in done.stderr


def test_the_token_is_the_proxys() -> None:
    key = DeploymentKey(b"k" * 32)
    assert AdminClient("http://h:1", key)._token == admin_token(key)


@dataclass
class Local:
    plan: LaunchPlan
    folder: RunFolder
    host: subprocess.Popen[str]

    @property
    def engines(self) -> list[str]:
        return [engine.name for engine in read_engines(self.folder) or ()]


@pytest.fixture
def local(
    request: pytest.FixtureRequest, proxy: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Local]:
    """1P1D of which only the launcher, the engine host and the proxy's registry are there."""
    plan = plan_of(tmp_path, proxy_port=int(proxy.url.rpartition(":")[2]))
    config = plan.config_file.read_text().replace("/models/smollm2", str(model_folder(tmp_path / "model")))
    plan.config_file.write_text(config)
    monkeypatch.setattr("omni.deployment.scaling.this_machine", machine)
    monkeypatch.setattr(scale, "_POLL_S", 0.02)
    monkeypatch.setattr(scale, "_JOIN_S", 0.1)
    states = all_ready(plan)
    with running(plan, states=states):
        folder = RunFolder.of(plan.name)
        write_engines(folder, plan.processes[:-1])
        for engine in plan.processes[:-1]:
            proxy.registry.add(InstanceSpec(engine.role, engine.url), "file")  # type: ignore[arg-type]
        command = [sys.executable, "-c", ENGINE_HOST, str(folder.path), getattr(request, "param", "ready")]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as host:
            try:
                assert host.stdout is not None
                host.stdout.readline()
                folder.write(ProcessState(name="engine_host", state="ready", pid=host.pid))
                yield Local(plan, folder, host)
            finally:
                host.kill()


def test_more_and_fewer_engines_here(local: Local, proxy: Proxy) -> None:
    before = read_engines(local.folder)
    assert before == local.plan.processes[:-1]
    done = omni_cli("prefill=2", "decode=2")
    assert (done.exit_code, done.stderr) == (0, "")
    engines = read_engines(local.folder)
    assert engines is not None
    assert engines[:2] == before
    assert [engine.name for engine in engines[2:]] == ["prefill.group2.rank0", "decode.group2.rank0"]
    assert len({engine.port for engine in engines}) == 4
    assert [engine.kv_bytes for engine in engines[2:]] == [engine.kv_bytes for engine in before]
    assert {f"127.0.0.1:{engine.port}" for engine in engines} == set(proxy.names)
    deployment = local.folder.deployment()
    assert deployment is not None
    assert deployment.process_names == (*local.engines, "proxy")

    assert omni_cli("prefill=1").stdout.endswith("0 started, 1 stopped\n")
    assert local.engines == ["prefill.group1.rank0", "decode.group1.rank0", "decode.group2.rank0"]
    assert f"127.0.0.1:{engines[2].port}" not in proxy.names
    assert "prefill.group2.rank0" not in local.folder.processes()
    assert omni_cli("prefill=1", "decode=2").stdout == "0 started, 0 stopped\n"


def test_an_engine_whose_agent_joins_is_left_to_it(local: Local, proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    """Then it goes when its agent does."""
    monkeypatch.setattr(scale, "_JOIN_S", 60.0)
    instances = AdminClient.instances

    def joined_meanwhile(client: AdminClient) -> object:
        new = (read_engines(local.folder) or ())[-1]
        proxy.registry.add(InstanceSpec("decode", new.url), "joined")
        return instances(client)

    monkeypatch.setattr(AdminClient, "instances", joined_meanwhile)
    assert omni_cli("decode=2").exit_code == 0
    assert [member.source for member in proxy.registry.members()] == ["file", "file", "joined"]


def test_an_engine_that_is_still_busy_goes_on(local: Local, proxy: Proxy) -> None:
    assert omni_cli("decode=2").exit_code == 0
    name = proxy.names[-1]
    proxy.table.writer(0).add(proxy.registry.members()[-1].slot, 1, 10)
    done = omni_cli("decode=1", "--wait-s", "0")
    assert (done.exit_code, name in done.stderr) == (2, True)
    assert local.engines[-1] == "decode.group2.rank0"
    assert omni_cli("decode=1", "--wait-s", "0", "--force").exit_code == 0
    assert name not in proxy.names


@pytest.mark.parametrize("local", ["failed"], indirect=True)
def test_an_engine_that_does_not_start_is_taken_back(local: Local, proxy: Proxy) -> None:
    done = omni_cli("prefill=2")
    assert done.exit_code == 2
    assert "prefill.group2.rank0 exited with code 3: see `omni_cli logs prefill.group2.rank0`" in done.stderr
    assert local.engines == ["prefill.group1.rank0", "decode.group1.rank0"]
    assert len(proxy.names) == 2


def test_none_of_a_role(local: Local) -> None:
    done = omni_cli("prefill=0")
    assert (done.exit_code, done.stderr.strip()) == (2, "prefill=0: a deployment has one of each; write 1 or more")


def test_more_than_the_memory_holds(local: Local, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("omni.deployment.scaling.this_machine", lambda: replace(machine(), available_bytes=1 << 30))
    done = omni_cli("prefill=2")
    assert done.exit_code == 2
    assert "GiB of memory are needed, 1.0 GiB is available" in done.stderr
    assert len(local.engines) == 2


def test_the_file_of_engines_comes_back_as_it_was(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    assert read_engines(folder) is None
    engines = plan_of(tmp_path).processes[:-1]
    write_engines(folder, engines)
    assert read_engines(folder) == engines
    modes = [path.stat().st_mode & 0o777 for path in (folder.path, folder.path / "engines.json")]
    assert modes == [0o700, 0o600], "others read no token of an environment"
    (folder.path / "engines.json").write_text(json.dumps([{"name": "of another version"}]))
    assert read_engines(folder) is None


def test_counts() -> None:
    assert scale.parse_counts(["decode=2", "prefill=3"]) == {"decode": 2, "prefill": 3}
    with pytest.raises(DeploymentError):
        scale.parse_counts(["prefill=-1"])

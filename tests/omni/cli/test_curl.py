"""The printed commands, pasted into a shell against a real proxy before stand-in engines."""

import asyncio
import json
import os
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from typer.testing import CliRunner, Result

from kv_transfer.auth import load_or_make_key
from omni.cli import curl as command
from omni.cli import scale
from omni.deployment.errors import DeploymentError
from omni.deployment.proxy_access import ProxyAccess
from omni.deployment.run_state import DeploymentState, RunFolder
from omni.process import start_ticks
from tests.omni.deployment.samples import content, put
from tests.standins.engine import StandinEngine

pytestmark = pytest.mark.skipif(
    not (shutil.which("curl") and shutil.which("openssl")), reason="no curl or openssl here"
)
TIMEOUT_S = 60
REPOSITORY = Path(__file__).parents[3]


def curl(*arguments: str) -> Result:
    app = typer.Typer()
    app.command()(command.curl)
    return CliRunner().invoke(app, arguments)


@pytest.fixture(autouse=True)
def no_http_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


def registered(folder: Path, data: dict[str, Any]) -> DeploymentState:
    """A deployment that this test itself seems to have launched."""
    config = folder / "trial.yaml"
    config.write_text(yaml.safe_dump(data))
    state = DeploymentState(
        name="trial",
        config_file=str(config),
        log_folder=str(folder),
        proxy_url=f"http://127.0.0.1:{data['deployment']['proxy']['listen_port']}",
        served_model_name="it's a model",
        process_names=(),
        launcher_pid=os.getpid(),
        launcher_start_ticks=start_ticks(os.getpid()),
    )
    RunFolder.of("trial").write_deployment(state)
    return state


async def pasted(line: str, **environment: str) -> str:
    process = await asyncio.create_subprocess_exec(
        "bash", "-c", line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=os.environ | environment
    )
    output, _ = await asyncio.wait_for(process.communicate(), TIMEOUT_S)
    assert process.returncode == 0, output.decode()
    return output.decode()


@pytest.fixture
async def deployment(tmp_path: Path, free_ports: Callable[[int], int]) -> AsyncIterator[DeploymentState]:
    """A proxy with TLS and API keys over one P and one D."""
    port = free_ports(1)
    key, certificate = _certificate(tmp_path)
    _api_key(tmp_path)
    data = put(content(), "deployment/proxy/listen_port", port)
    data["deployment"]["proxy"] |= {
        "api_keys_file": str(tmp_path / "keys"),
        "tls_certificate_file": str(certificate),
        "tls_key_file": str(key),
    }
    load_or_make_key(tmp_path / "deployment.key")
    put(data, "services/kv_transfer/key_file", str(tmp_path / "deployment.key"))
    async with StandinEngine("p") as prefill, StandinEngine("d") as decode:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "services.global_proxy", "--port", str(port), "--prefill", prefill.url,
            "--decode", decode.url, "--tls-certificate", certificate, "--tls-key", key, "--api-keys", tmp_path / "keys",
            "--key-file", tmp_path / "deployment.key", stderr=subprocess.DEVNULL, cwd=REPOSITORY,
        )  # fmt: skip
        try:
            await _is_up(port, process)
            yield registered(tmp_path, data)
        finally:
            process.terminate()
            await asyncio.wait_for(process.wait(), TIMEOUT_S)


def _api_key(folder: Path) -> None:
    """Its hash in `keys`, itself in `alice`."""
    command = [sys.executable, "-m", "services.global_proxy.security.api_keys", "new", "alice"]
    made = subprocess.run(command, capture_output=True, text=True, check=True, timeout=TIMEOUT_S)
    (folder / "keys").write_text(made.stdout)
    (folder / "keys").chmod(0o600)
    (folder / "alice").write_text(made.stderr)


def _certificate(folder: Path) -> tuple[Path, Path]:
    key, certificate = folder / "tls.key", folder / "tls.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "1",
         "-subj", "/CN=proxy", "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", key, "-out", certificate],
        check=True, capture_output=True, timeout=TIMEOUT_S,
    )  # fmt: skip
    key.chmod(0o600)
    return key, certificate


async def _is_up(port: int, process: asyncio.subprocess.Process) -> None:
    async with asyncio.timeout(TIMEOUT_S):
        while True:
            try:
                _, writer = await asyncio.open_connection("127.0.0.1", port)
            except ConnectionError:
                assert process.returncode is None, "the proxy has ended"
                await asyncio.sleep(0.1)
            else:
                writer.close()
                return


async def test_every_command_pasted(deployment: DeploymentState, tmp_path: Path) -> None:
    done = curl()
    assert done.exit_code == 0, done.output
    commands = json.loads(curl("trial", "--json").stdout)
    api_key = next(word for word in (tmp_path / "alice").read_text().split() if word.startswith("omni-alice-"))
    answers = {title: await pasted(line, OMNI_API_KEY=api_key, OMNI_ADMIN_TOKEN=curl("--admin-token").stdout.strip())
               for title, line in commands.items() if title != "admin token"}  # fmt: skip
    assert "choices" in json.loads(answers["completion"])
    assert answers["chat, as it is written"].count("data: ") > 1
    assert json.loads(answers["models"])["object"] == "list"
    assert answers["health"].startswith("HTTP/1.1 ")
    assert "omni_" in answers["metrics"]
    assert {i["role"] for i in json.loads(answers["admin state"])["instances"]} == {"prefill", "decode"}
    assert (await pasted(commands["admin token"])).strip() == curl("--admin-token").stdout.strip()


async def test_the_other_commands_trust_its_certificate(deployment: DeploymentState, tmp_path: Path) -> None:
    """It is nobody's but its own. `scale` has its client of the deployment, and `status` and `restart` have."""
    for client in (ProxyAccess.of(deployment).admin_client(), scale._client(deployment.name, None, None)):
        assert {one["role"] for one in await asyncio.to_thread(client.instances)} == {"prefill", "decode"}
    (tmp_path / "tls.pem").write_text("none")
    with pytest.raises(DeploymentError, match=r"the proxy's certificate .*/tls\.pem: "):
        ProxyAccess.of(deployment).admin_client()


class TestText:
    """What is printed, without a proxy."""

    def test_a_plain_deployment(self, tmp_path: Path) -> None:
        registered(tmp_path, content())
        done = curl()
        assert done.exit_code == 0, done.output
        assert "curl -sS http://127.0.0.1:7000/v1/models\n" in done.stdout
        assert "OMNI_API_KEY" not in done.stdout
        assert "--cacert" not in done.stdout
        assert "OMNI_ADMIN_TOKEN=$(" in done.stdout
        assert done.stdout.count("\n# ") == 6, "titles, and the note on the token"

    def test_it_prints_no_secret(self, tmp_path: Path) -> None:
        data = put(content(), "services/kv_transfer/key_file", str(tmp_path / "key"))
        load_or_make_key(tmp_path / "key")
        registered(tmp_path, data)
        token = curl("--admin-token").stdout.strip()
        assert len(token) == 64
        assert token not in curl().stdout + curl("--json").stdout

    def test_notes_for_keys_and_tls(self, tmp_path: Path) -> None:
        files = {"api_keys_file": "/k", "tls_certificate_file": "/a folder/c", "tls_key_file": "/t"}
        data = content()
        data["deployment"]["proxy"] |= files
        registered(tmp_path, data)
        shown = curl().stdout
        assert "export OMNI_API_KEY=" in shown
        assert "curl -sS --cacert '/a folder/c' https://127.0.0.1:7000/health" not in shown, "-i stands between"
        assert "curl -sS --cacert '/a folder/c' -i https://127.0.0.1:7000/health" in shown
        assert "--insecure" in shown

    def test_an_http_proxy_is_gone_round(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        registered(tmp_path, content())
        monkeypatch.setenv("http_proxy", "http://192.0.2.1:3128")
        assert curl().stdout.count("--noproxy '*'") == 6
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        assert "--noproxy" not in curl().stdout

    def test_the_program_that_runs(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(sys, "argv", ["/venv/bin/omni_cli", "curl"])
        assert command.token_command("a") == "/venv/bin/omni_cli curl a --admin-token"

    def test_bad_input(self, tmp_path: Path) -> None:
        done = curl()
        assert (done.exit_code, done.stdout) == (2, "")
        assert "no deployment is running" in done.stderr
        registered(tmp_path, put(content(), "services/kv_transfer/key_file", str(tmp_path / "missing")))
        done = curl("--admin-token")
        assert done.exit_code == 2
        assert "cannot be read" in done.stderr


def test_bodies_survive_the_shell() -> None:
    access = ProxyAccess(url="http://h:1", certificate_file=None, asks_for_keys=False, key_file=None)
    line = command.curl_commands(access, "it's $HOME `x`")["completion"]
    data = subprocess.run(
        ["bash", "-c", 'curl() { printf %s "${@: -1}"; }; ' + line],
        capture_output=True, text=True, check=True, timeout=TIMEOUT_S,
    ).stdout  # fmt: skip
    assert json.loads(data)["model"] == "it's $HOME `x`"

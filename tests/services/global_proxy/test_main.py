"""Starting and stopping: `python -m services.global_proxy`."""

import asyncio
import signal
import socket
import subprocess
import sys
from pathlib import Path

import aiohttp
import pytest

from services.global_proxy.arguments import parse_arguments
from tests.services.global_proxy.conftest import Deploy
from tests.standins.engine import StandinEngine


def test_arguments() -> None:
    host, port, settings = parse_arguments(
        ["--port", "9", "--prefill", "http://a:1", "--prefill", "http://b:1/", "--decode", "http://c:1"]
    )
    assert (host, port) == ("127.0.0.1", 9)
    assert settings.prefill_urls == ("http://a:1", "http://b:1")
    assert settings.decode_urls == ("http://c:1",)
    assert settings.connector == "omni"
    assert settings.request_timeout_s == 600


def test_arguments_for_plain_engines() -> None:
    _, _, settings = parse_arguments(
        ["--mixed", "http://a:1/", "--mixed", "http://b:1", "--kv-events", "a:2", "--kv-events", "b:2"]
    )
    assert (settings.prefill_urls, settings.decode_urls) == ((), ())
    assert settings.mixed_urls == ("http://a:1", "http://b:1")
    assert [(spec.role, spec.kv_events) for spec in settings.specs()] == [("mixed", "a:2"), ("mixed", "b:2")]
    beside = ["--prefill", "http://p:1", "--decode", "http://d:1", "--mixed", "http://a:1"]
    for events in (["p:2"], ["p:2", "a:2"]):
        _, _, settings = parse_arguments([*beside, *(word for event in events for word in ("--kv-events", event))])
        assert [spec.kv_events for spec in settings.specs() if spec.role != "decode"] == [*events, None][:2]


def test_all_instances_may_join_later() -> None:
    assert parse_arguments(["--control-port", "0"])[2].specs() == []


def test_arguments_for_mooncake() -> None:
    arguments = ["--prefill", "http://a:1", "--decode", "http://c:1", "--connector", "mooncake"]
    _, _, settings = parse_arguments([*arguments, "--bootstrap", "http://a:8998/"])
    assert settings.connector == "mooncake"
    assert settings.bootstrap_urls == ("http://a:8998",)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prefill", "a:1", "--decode", "http://c:1"], "--prefill 'a:1': must be http://HOST:PORT"),
        (["--prefill", "http://a:1/v1", "--decode", "http://c:1"], "without a path"),
        (["--prefill", "http://a:1", "--decode", "http://c:99999"], "--decode 'http://c:99999'"),
        (["--prefill", "http://a:1", "--prefill", "http://a:1", "--decode", "http://c:1"], "given twice"),
        (["--prefill", "http://a:1", "--decode", "http://c:1", "--request-timeout-s", "0"], "request_timeout_s"),
        (["--prefill", "http://a:1"], "--decode"),
        ([], "no instances: give --prefill URL and --decode URL, or --mixed URL"),
        ([], "or a --control-port for instances to join"),
        (["--mixed", "http://a:1", "--decode", "http://a:2"], "--prefill: give at least one URL"),
        (["--mixed", "http://a:1/v1"], "--mixed 'http://a:1/v1': must be http://HOST:PORT"),
        (["--mixed", "http://a:1", "--mixed", "http://a:1"], "--mixed: the same URL is given twice"),
        (["--mixed", "http://a:1", "--kv-events", "a:2", "--kv-events", "a:3"], "--kv-events: give one for each"),
        (["--mixed", "http://a:1", "--mixed-policy", "pd_score_balance"], "--mixed-policy"),
        (["--prefill", "http://a:1", "--decode", "http://c:1", "--connector", "mooncake"], "one for each --prefill"),
        (
            ["--prefill", "http://a:1", "--decode", "http://c:1", "--bootstrap", "http://a:2"],
            "only --connector mooncake",
        ),
        (
            ["--prefill", "http://a:1", "--decode", "http://c:1", "--mode", "layerwise"],
            "--kv-address: --mode layerwise",
        ),
        (["--prefill", "http://a:1", "--decode", "http://c:1", "--kv-address", "a:2"], "only --mode layerwise"),
        (["--prefill", "http://a:1", "--decode", "http://c:1", "--kv-address", "a"], "must be HOST:PORT"),
        (["--prefill", "http://a:1", "--decode", "http://c:1", "--kv-address", "http://a:2"], "must be HOST:PORT"),
        (
            ["--prefill", "http://a:1", "--decode", "http://c:1", "--mode", "layerwise", "--connector", "nixl"],
            "--connector nixl cannot",
        ),
        (["--prefill", "http://a:1", "--decode", "http://c:1", "--bootstrap", "a:2"], "--bootstrap 'a:2'"),
        (["--prefill", "http://a:1", "--decode", "http://c:1", "--connector", "lmcache"], "--connector"),
    ],
)
def test_wrong_arguments(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        parse_arguments(arguments)
    assert message in capsys.readouterr().err


def test_a_key_file_that_others_may_read(tmp_path: Path) -> None:
    key_file = tmp_path / "key"
    key_file.write_text("0" * 64)
    key_file.chmod(0o644)
    arguments = ["--prefill", "http://a:1", "--decode", "http://c:1", "--key-file", str(key_file)]
    command = [sys.executable, "-m", "services.global_proxy", *arguments]
    run = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert run.returncode == 2
    assert "Traceback" not in run.stderr
    assert f"chmod 600 {key_file}" in run.stderr


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


async def test_sigterm_drains_then_stops(tmp_path: Path) -> None:
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    async with (
        StandinEngine() as prefill,
        StandinEngine() as engine,
        aiohttp.ClientSession() as client,
        asyncio.timeout(30),
    ):
        engine.gate.clear()
        engine.gate_after = 1
        arguments = ["--port", str(port), "--prefill", prefill.url, "--decode", engine.url]
        arguments += ["--key-file", str(tmp_path / "key")]
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "services.global_proxy", *arguments, stderr=asyncio.subprocess.PIPE
        )
        try:
            await _until_listening(client, url)
            body = {"prompt": "a", "stream": True}
            async with client.post(url + "/v1/completions", json=body) as response:
                await response.content.readany()
                process.send_signal(signal.SIGTERM)
                await _until_status(client, url + "/health", 503)
                await _until_status(client, url + "/live", 200)
                async with client.post(url + "/v1/completions", json=body) as refused:
                    assert refused.status == 503
                    assert refused.headers["Retry-After"] == "1"
                    assert (await refused.json())["error"]["type"] == "ServiceUnavailableError"
                engine.gate.set()
                assert (await response.content.read()).endswith(b"data: [DONE]\n\n")
            _, stderr = await process.communicate()
            assert process.returncode == 0, stderr.decode()
            assert b"Traceback" not in stderr
            assert b'"status":200' in stderr
        finally:
            if process.returncode is None:
                process.kill()
                await process.communicate()


async def _until_listening(client: aiohttp.ClientSession, url: str) -> None:
    while True:
        try:
            async with client.get(url + "/live"):
                return
        except aiohttp.ClientConnectorError:
            await asyncio.sleep(0.05)


async def _until_status(client: aiohttp.ClientSession, url: str, status: int) -> None:
    while True:
        async with client.get(url) as response:
            if response.status == status:
                return
        await asyncio.sleep(0.02)


async def test_drain_ends_what_does_not_end_by_itself(deploy: Deploy) -> None:
    pd = await deploy(drain_timeout_s=0.2)
    (engine,) = pd.decode
    engine.gate.clear()
    engine.gate_after = 1
    streaming = asyncio.create_task(pd.stream())
    await engine.wait_for(1)
    await pd.server.drain()
    status, text, _ = await streaming
    assert status == 200
    assert "The proxy stopped before the answer was complete" in text
    assert "[DONE]" not in text
    await engine.wait_for(num_aborted=1)

"""`omni_cli scale` on a proxy that it did not start."""

import asyncio
import json
import sys

from kv_transfer.auth import load_or_make_key
from tests.services.global_proxy.live.conftest import LiveProxy, Stage


async def omni_cli(proxy: LiveProxy, stage: Stage, *words: str, key: str = "deployment.key") -> tuple[int, str]:
    """Exit status and output of `omni_cli scale ...`."""
    where = ("--url", proxy.url, "--key-file", str(stage.folder / key))
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "omni.cli.main", "scale", *words, *where),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    async with asyncio.timeout(60):
        output, _ = await process.communicate()
    assert process.returncode is not None
    return process.returncode, output.decode()


async def listed(proxy: LiveProxy, stage: Stage) -> dict[str, tuple[str, str]]:
    status, output = await omni_cli(proxy, stage, "list", "--json")
    assert status == 0, output
    return {one["name"]: (one["state"], one["source"]) for one in json.loads(output)}


async def test_list_add_drain_and_remove(stage: Stage) -> None:
    prefill, decode = await stage.engines(1, 1)
    _, (new,) = await stage.engines(0, 1)
    proxy = await stage.proxy(prefill + decode)
    file = {engine.name: ("active", "file") for engine in prefill + decode}

    assert (await omni_cli(proxy, stage, "add", "decode", new.url))[0] == 0
    assert await listed(proxy, stage) == file | {new.name: ("active", "admin")}
    status, output = await omni_cli(proxy, stage, "drain", decode[0].name)
    assert (status, output.strip()) == (0, f"{decode[0].name} drains; it has 0 requests")
    body = {"prompt": "a", "max_tokens": 1}
    assert (await proxy.call("POST", "/v1/completions", body))[0] == 200
    assert await decode[0].seen() == []
    assert len(await new.seen()) == 1
    assert (await omni_cli(proxy, stage, "remove", decode[0].name))[0] == 0
    assert await listed(proxy, stage) == {prefill[0].name: file[prefill[0].name], new.name: ("active", "admin")}

    status, output = await omni_cli(proxy, stage, "remove", "10.0.0.1:1")
    assert status == 2
    assert "no instance is called '10.0.0.1:1'" in " ".join(output.split())
    load_or_make_key(stage.folder / "other.key")
    status, output = await omni_cli(proxy, stage, "list", key="other.key")
    assert status == 2
    assert "the token of this deployment's key" in " ".join(output.split())

"""API keys and the admin token, over sockets."""

import re
from pathlib import Path

import pytest

from kv_transfer.auth import load_or_make_key
from services.global_proxy.admission.rate_limit import RateLimits
from services.global_proxy.membership.admin_route import admin_token
from services.global_proxy.security.api_keys import new_key
from services.global_proxy.security.routes import ROUTES
from tests.services.global_proxy.conftest import Deploy
from tests.services.global_proxy.security.conftest import Build
from tests.services.global_proxy.security.fort import COMPLETIONS, FROM_AN_ENGINE, Fort, assert_error, bearer


@pytest.fixture
def keys(tmp_path: Path) -> tuple[Path, str, str]:
    """The file, a key without limits, and one for two requests a minute."""
    key, entry = new_key("free")
    slow_key, slow_entry = new_key("slow", RateLimits(requests_per_minute=2))
    file = tmp_path / "keys"
    file.write_text(f"{entry.line()}\n{slow_entry.line()}\n")
    file.chmod(0o600)
    return file, key, slow_key


async def test_nothing_without_a_key(forts: Build, keys: tuple[Path, str, str]) -> None:
    fort = await forts(api_keys_file=keys[0])
    token = admin_token(load_or_make_key(fort.pd.proxy.settings.key_file))
    messages = set()
    for path in (route.path for route in ROUTES if route.needs_key):
        for wrong in ("", "wrong", keys[1][:-1], keys[1] + "0", f"omni-nobody-{'0' * 64}", token):
            answer = await fort.use(path, bearer(wrong) if wrong else b"X-Api-Key: a\r\n")
            messages.add(assert_error(answer, 401, "AuthenticationError"))
            assert b"\r\nwww-authenticate: Bearer\r\n" in answer[1]
    assert len(messages) == 1  # whatever the cause
    two = await fort.ask("GET", "/v1/models", bearer(keys[1]) + bearer(keys[1]))
    assert_error(two, 400, "BadRequestError")
    assert fort.taken == []


async def test_what_needs_no_key(forts: Build, keys: tuple[Path, str, str]) -> None:
    fort = await forts(api_keys_file=keys[0])
    for path in ("/health", "/live", "/metrics", "/version", "/openapi.json", "/docs"):
        assert (await fort.ask("GET", path))[0] == 200, path


async def test_a_key_reaches_no_engine(forts: Build, keys: tuple[Path, str, str]) -> None:
    fort = await forts(api_keys_file=keys[0])
    for path in FROM_AN_ENGINE:
        assert (await fort.use(path, bearer(keys[1])))[0] == 200, path
    assert len(fort.taken) == len(FROM_AN_ENGINE) + len(COMPLETIONS)
    for taken in fort.taken:
        assert "authorization" not in taken.headers
        assert keys[1] not in repr(taken)


async def test_without_keys_the_engines_ask_for_theirs(fort: Fort) -> None:
    for path in FROM_AN_ENGINE:
        await fort.use(path, bearer("theirs"))
    assert {taken.headers["authorization"] for taken in fort.taken} == {"Bearer theirs"}


async def test_rates_are_each_keys_own(forts: Build, keys: tuple[Path, str, str]) -> None:
    fort = await forts(api_keys_file=keys[0])
    for _ in range(2):
        assert (await fort.use("/v1/completions", bearer(keys[2])))[0] == 200
    answer = await fort.use("/v1/chat/completions", bearer(keys[2]))
    assert_error(answer, 429, "RateLimitError")
    retry_after = re.search(rb"\r\nretry-after: (\d+)\r\n", answer[1])
    assert retry_after is not None
    assert 1 <= int(retry_after[1]) <= 60
    assert (await fort.use("/v1/completions", bearer(keys[1])))[0] == 200


async def test_the_admin_token_is_no_api_key(forts: Build, keys: tuple[Path, str, str]) -> None:
    fort = await forts(api_keys_file=keys[0])
    token = admin_token(load_or_make_key(fort.pd.proxy.settings.key_file))
    assert_error(await fort.use("/v1/completions", bearer(token)), 401, "AuthenticationError")
    for headers in (b"", bearer(keys[1]), bearer(token[:-1])):
        assert_error(await fort.ask("GET", "/admin/v1/state", headers), 401, "AuthenticationError")
    assert (await fort.ask("GET", "/admin/v1/state", bearer(token)))[0] == 200


async def test_a_stream_is_charged_what_it_gave(deploy: Deploy, tmp_path: Path) -> None:
    """At its start it is charged for all that it may give: 60 tokens and the prompt's few, of 100 a minute."""
    key, entry = new_key("frugal", RateLimits(tokens_per_minute=100))
    file = tmp_path / "keys"
    file.write_text(f"{entry.line()}\n")
    file.chmod(0o600)
    pd = await deploy(api_keys_file=file)
    for _ in range(4):
        body = pd.prompt | {"stream": True, "max_tokens": 60}
        headers = {"Authorization": f"Bearer {key}"}
        async with pd.client.post(pd.url + "/v1/completions", json=body, headers=headers) as response:
            assert response.status == 200
            await response.read()
        await pd.idle()

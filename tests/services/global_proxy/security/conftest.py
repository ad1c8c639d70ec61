"""Forts, for every test of this folder."""

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest

from tests.services.global_proxy.any_engine import AnyEngine
from tests.services.global_proxy.conftest import Deploy, until
from tests.services.global_proxy.security.fort import Fort

Build = Callable[..., Awaitable[Fort]]


@pytest.fixture
async def forts(deploy: Deploy) -> AsyncIterator[Build]:
    """forts(**settings): one, whose engines are up."""
    async with AnyEngine() as prefill, AnyEngine() as decode:

        async def build(**settings: Any) -> Fort:
            pd = await deploy(0, 0, (prefill.url,), (decode.url,), min_prefill_tokens=0, **settings)
            await until(lambda: all(pool.has_healthy() for pool in (pd.proxy.members.prefill, pd.proxy.members.decode)))
            return Fort(pd, prefill, decode)

        yield build


@pytest.fixture
async def fort(forts: Build) -> Fort:
    return await forts()

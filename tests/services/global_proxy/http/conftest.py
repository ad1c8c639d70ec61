"""Connections, for every test of this folder."""

import asyncio
from collections.abc import AsyncIterator

import pytest

from tests.services.global_proxy.http.serving import Server


@pytest.fixture
async def server() -> AsyncIterator[Server]:
    made = Server()
    yield made
    for port in made.ports:
        port.close()
    for connection in tuple(made.connections):
        connection.abort()
    await asyncio.sleep(0)

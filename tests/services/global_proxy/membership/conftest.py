"""A registry and its table, for every test of this folder."""

import asyncio
from collections.abc import Awaitable, Callable, Iterator

import pytest

from services.global_proxy.membership.load_table import LoadTable
from services.global_proxy.membership.member import InstanceSpec, Role
from services.global_proxy.membership.registry import Registry

POLICIES: dict[Role, tuple[str, ...]] = {
    "prefill": ("round_robin", "least_active"),
    "decode": ("round_robin", "least_active"),
    "mixed": ("round_robin", "least_active"),
}


def make_registry(table: LoadTable) -> Registry:
    return Registry(table, POLICIES, "round_robin", "round_robin", mixed_policy="round_robin")


def spec(number: int, role: Role = "decode") -> InstanceSpec:
    return InstanceSpec(role, f"http://10.0.0.{number}:8000")


async def until(condition: Callable[[], bool]) -> None:
    """Wait for another process, which announces itself to nobody."""
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.005)


async def soon(waiting: Awaitable[object]) -> None:
    async with asyncio.timeout(20):
        await waiting


@pytest.fixture
def table() -> Iterator[LoadTable]:
    table = LoadTable.create(num_workers=2, num_slots=4)
    yield table
    table.close()


@pytest.fixture
def registry(table: LoadTable) -> Registry:
    return make_registry(table)

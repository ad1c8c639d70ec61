"""Our own connector layer by layer: P and D get one ticket, and what nobody will read is given up."""

import asyncio
from typing import Any

import pytest

from kv_transfer.auth import load_key
from kv_transfer.ticket import Ticket, parse_ticket
from tests.services.global_proxy.conftest import Deploy, Deployment, until
from tests.standins.engine import StandinEngine
from tests.standins.lease_holder import LeaseHolder


@pytest.fixture
async def pd(deploy: Deploy, lease_holder: LeaseHolder) -> Deployment:
    return await deploy(mode="layerwise", kv_addresses=(f"127.0.0.1:{lease_holder.port}",))


def ticket_of(pd: Deployment, engine: StandinEngine) -> Ticket:
    ticket = parse_ticket(engine.received[-1].body["kv_transfer_params"], load_key(pd.proxy.settings.key_file))
    assert ticket is not None
    return ticket


@pytest.mark.parametrize("stream", [False, True])
async def test_both_get_the_same_ticket(pd: Deployment, lease_holder: LeaseHolder, stream: bool) -> None:
    status, _, headers = await (pd.stream(n=3) if stream else pd.complete(n=3))
    assert status == 200
    assert headers["x-omni-path"] == "disaggregated"
    (prefill,), (decode,) = pd.prefill, pd.decode
    ticket = ticket_of(pd, prefill)
    assert ticket_of(pd, decode) == ticket
    assert (ticket.prefill_host, ticket.prefill_port) == ("127.0.0.1", lease_holder.port)
    to_prefill, to_decode = (engine.received[0].body["kv_transfer_params"] for engine in (prefill, decode))
    assert to_prefill["do_remote_decode"] is True
    assert to_prefill["omni"]["num_readers"] == 3
    assert to_decode["do_remote_prefill"] is True


async def test_no_two_requests_have_the_same_ticket(pd: Deployment) -> None:
    await asyncio.gather(*(pd.complete() for _ in range(5)))
    tickets: list[dict[str, Any]] = [r.body["kv_transfer_params"]["omni"]["ticket"] for r in pd.prefill[0].received]
    assert len({ticket["transfer_id"] for ticket in tickets}) == 5


async def test_each_prefill_has_its_own_address(deploy: Deploy, lease_holder: LeaseHolder) -> None:
    pd = await deploy(2, 1, mode="layerwise", kv_addresses=("127.0.0.1:1", "[::1]:2"))
    for _ in range(2):
        await pd.complete()
    tickets = [ticket_of(pd, engine) for engine in pd.prefill]
    assert [(t.prefill_host, t.prefill_port) for t in tickets] == [("127.0.0.1", 1), ("::1", 2)]


async def test_decode_is_asked_while_prefill_computes(pd: Deployment) -> None:
    pd.prefill[0].gate.clear()
    request = asyncio.create_task(pd.complete())
    for engine in pd.engines:
        await engine.wait_for(1)
    pd.prefill[0].gate.set()
    assert (await request)[0] == 200


@pytest.mark.parametrize("ended_by", ["client", "decode"])
async def test_a_lease_that_nobody_will_read_ends(pd: Deployment, lease_holder: LeaseHolder, ended_by: str) -> None:
    pd.decode[0].gate.clear()
    request = asyncio.create_task(pd.complete())
    for engine in pd.engines:
        await engine.wait_for(1)
    lease_holder.leases.open_early(ticket_of(pd, pd.prefill[0]).transfer_id, 1)
    if ended_by == "client":
        request.cancel()
    pd.decode[0].error = (400, "{}")
    pd.decode[0].gate.set()
    await asyncio.gather(request, return_exceptions=True)
    await until(lambda: len(lease_holder.leases) == 0)


async def test_a_lease_that_is_read_is_left_to_decode(pd: Deployment, lease_holder: LeaseHolder) -> None:
    pd.decode[0].gate.clear()
    request = asyncio.create_task(pd.complete())
    for engine in pd.engines:
        await engine.wait_for(1)
    lease_holder.leases.open_early(ticket_of(pd, pd.prefill[0]).transfer_id, 1)
    pd.decode[0].gate.set()
    assert (await request)[0] == 200
    await pd.idle()
    assert len(lease_holder.leases) == 1

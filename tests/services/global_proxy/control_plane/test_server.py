"""The port: the health service, limits, and what strangers send that is no gRPC at all."""

import asyncio
import contextlib
import os

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from services.global_proxy.control_plane.handshake import SERVICE
from services.global_proxy.control_plane.server import MAX_MESSAGE_BYTES, ControlPlane
from tests.services.global_proxy.control_plane.planes import (
    KEY,
    EndedError,
    Plane,
    instance,
    new_registry,
    plane,
    stream,
    until,
)

SERVING = health_pb2.HealthCheckResponse.SERVING


async def test_the_health_service() -> None:
    async with plane() as proxy, grpc.aio.insecure_channel(proxy.address) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        for service in ("", SERVICE):
            assert (await health.Check(health_pb2.HealthCheckRequest(service=service))).status == SERVING
        with pytest.raises(grpc.aio.AioRpcError, match="NOT_FOUND"):
            await health.Watch(health_pb2.HealthCheckRequest(service="another")).read()
        watch = health.Watch(health_pb2.HealthCheckRequest(service=SERVICE))
        assert (await watch.read()).status == SERVING
        await proxy.server.stop()
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING


async def test_watchers_are_counted() -> None:
    async with plane() as proxy, contextlib.AsyncExitStack() as stack:
        codes = []
        for _ in range(17):
            options = (("grpc.use_local_subchannel_pool", 1),)
            channel = await stack.enter_async_context(grpc.aio.insecure_channel(proxy.address, options=options))
            try:
                watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
                codes.append((await watch.read()).status)
            except grpc.aio.AioRpcError as error:
                codes.append(error.code())
        assert codes == [SERVING] * 16 + [grpc.StatusCode.RESOURCE_EXHAUSTED]


async def test_a_port_that_is_taken() -> None:
    """Also by another proxy: they would share it."""
    _, registry = new_registry()
    second = ControlPlane(registry, KEY)
    async with plane() as proxy:
        with pytest.raises(OSError, match=r"--control-port: 127\.0\.0\.1:\d+ cannot be listened on"):
            await second.start("127.0.0.1", proxy.port)
    await second.stop()


async def test_a_message_that_is_too_large() -> None:
    async with plane() as proxy, stream(proxy.address) as agent:
        with pytest.raises(EndedError) as ended:
            await agent.join(instance(url="http://" + MAX_MESSAGE_BYTES * "a"))
        assert ended.value.code is grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_bytes_that_are_no_message() -> None:
    async with plane() as proxy, stream(proxy.address) as agent:
        await agent.call.write(b"\xff" * 100)
        with pytest.raises(EndedError, match="UNAUTHENTICATED"):
            await agent.hear()
        assert proxy.refused == {"not_genuine": 1}


async def test_a_flood_of_garbage_hurts_nobody() -> None:
    """Members go on reporting, new ones join, and the descriptors come back."""
    async with plane() as proxy, stream(proxy.address) as member:
        await member.join(instance())
        num_descriptors = len(os.listdir("/proc/self/fd"))
        garbage = [
            os.urandom(3000),
            b"GET / HTTP/1.1\r\n\r\n",
            b"",
            b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + os.urandom(500),
        ]
        await asyncio.gather(*(_send(proxy, garbage[number % 4]) for number in range(200)))
        await member.report(num_running=7)
        await until(lambda: (report := proxy.table.report(0)) is not None and report.num_running == 7)
        async with stream(proxy.address) as late:
            await late.join(instance(url="http://10.0.0.2:9000"))
        await until(lambda: len(os.listdir("/proc/self/fd")) <= num_descriptors + 10)


async def _send(proxy: Plane, garbage: bytes) -> None:
    _, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
    with contextlib.suppress(OSError):
        writer.write(garbage)
        await writer.drain()
    writer.close()
    with contextlib.suppress(OSError):
        await writer.wait_closed()

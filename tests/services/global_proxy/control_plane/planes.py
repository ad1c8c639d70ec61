"""A control plane on a real socket, its registry, and instances by hand: streams whose words a test chooses."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc

from kv_transfer.auth import DeploymentKey
from services.global_proxy.control_plane import control_plane_pb2 as pb
from services.global_proxy.control_plane.handshake import SERVICE, Handshake, Session, new_nonce
from services.global_proxy.control_plane.server import ControlPlane
from services.global_proxy.membership.load_table import LoadTable
from services.global_proxy.membership.registry import Member, Registry

KEY = DeploymentKey(b"k" * 32)
OTHER_KEY = DeploymentKey(b"o" * 32)
URL = "http://10.0.0.1:9000"
NAME = "10.0.0.1:9000"


async def until(condition: Callable[[], object]) -> None:
    """Wait for what announces itself to nobody."""
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


@dataclass
class Plane:
    table: LoadTable
    registry: Registry
    server: ControlPlane
    port: int
    refused: Counter[str] = field(default_factory=Counter)

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def member(self, name: str = NAME) -> Member | None:
        return self.registry.state.member(name)

    def is_there(self, name: str = NAME) -> bool:
        return self.member(name) is not None


def new_registry() -> tuple[LoadTable, Registry]:
    table = LoadTable.create(num_slots=4)
    policies = {"prefill": ("p",), "decode": ("d",), "mixed": ("m",)}
    return table, Registry(table, policies, "p", "d", mixed_policy="m")


@asynccontextmanager
async def plane(port: int = 0, key: DeploymentKey = KEY, **times: Any) -> AsyncIterator[Plane]:
    table, registry = new_registry()
    refused: Counter[str] = Counter()
    server = ControlPlane(
        registry,
        key,
        on_refused=lambda why: refused.update([why]),
        **{"report_interval_s": 0.1, "silent_s": 30, "rejoin_s": 30, **times},
    )
    try:
        yield Plane(table, registry, server, await server.start("127.0.0.1", port), refused)
    finally:
        await server.stop()


def instance(**changes: Any) -> pb.Instance:
    fields = {"protocol": 1, "role": "prefill", "url": URL, "start_id": b"first", "facts": {"model": "m"}}
    return pb.Instance(**{**fields, **changes})


@dataclass
class Stream:
    """The instance's end."""

    call: Any
    session: Session | None = None

    async def say(self, **kind: Any) -> None:
        with _ending():
            await self.call.write(pb.FromInstance(**kind).SerializeToString())

    async def hear(self) -> pb.ToInstance:
        """Raises EndedError with the status when the proxy has ended the stream."""
        with _ending():
            async with asyncio.timeout(10):
                raw = await self.call.read()
        if raw is grpc.aio.EOF:
            raise EndedError(grpc.StatusCode.OK, "")
        return pb.ToInstance.FromString(raw)

    async def until_ended(self) -> "EndedError":
        """How, whatever is heard before."""
        try:
            while True:
                await self.hear()
        except EndedError as ended:
            return ended

    async def greet(self) -> tuple[bytes, bytes]:
        """The nonces."""
        nonce = new_nonce()
        await self.say(hello=pb.Hello(nonce=nonce))
        return nonce, (await self.hear()).challenge.nonce

    async def join(self, what: pb.Instance, key: DeploymentKey = KEY) -> Handshake:
        handshake = Handshake(key, *await self.greet(), what.SerializeToString())
        await self.say(joining=pb.Joining(instance=handshake.instance, mac=handshake.join_mac()))
        welcome = (await self.hear()).welcome
        handshake.check_welcome(welcome.mac, welcome.report_interval_s)
        self.session = handshake.session("instance")
        return handshake

    async def report(self, **numbers: int) -> None:
        await self.seal(pb.InstanceMessage(load=pb.LoadReport(**numbers)))

    async def seal(self, message: pb.InstanceMessage) -> None:
        assert self.session is not None
        await self.say(sealed=self.session.seal(message.SerializeToString()))

    async def command(self) -> pb.ProxyMessage:
        assert self.session is not None
        return pb.ProxyMessage.FromString(self.session.open((await self.hear()).sealed))


class EndedError(Exception):
    """The stream's status."""

    @property
    def code(self) -> grpc.StatusCode:
        return self.args[0]

    @property
    def details(self) -> str:
        return self.args[1]


@contextmanager
def _ending() -> Iterator[None]:
    try:
        yield
    except grpc.aio.AioRpcError as error:
        raise EndedError(error.code(), error.details()) from None


@asynccontextmanager
async def stream(address: str) -> AsyncIterator[Stream]:
    options = (("grpc.use_local_subchannel_pool", 1),)
    async with grpc.aio.insecure_channel(address, options=options) as channel:
        call = channel.stream_stream(f"/{SERVICE}/Join")()
        try:
            yield Stream(call)
        finally:
            call.cancel()

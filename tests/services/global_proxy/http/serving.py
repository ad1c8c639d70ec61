"""Connections that are served without a proxy."""

import asyncio

from services.global_proxy.errors import InvalidRequestError
from services.global_proxy.http.body_budget import BodyBudget
from services.global_proxy.http.client_connection import ClientConnection, ConnectionLimits
from services.global_proxy.http.client_request import ClientRequest
from services.global_proxy.http.reply import Reply
from services.global_proxy.http.request_parser import Refusal
from tests.services.global_proxy.http.fake_transport import FakeTransport


class Server:
    """Connections whose requests wait for `gate`, and are answered with `body`; 404 for those that are turned away."""

    def __init__(self) -> None:
        self.gate = asyncio.Event()
        self.gate.set()
        self.body = b"ok"
        self.served: list[ClientRequest] = []
        self.served_bodies: list[bytes] = []
        self.bodies = BodyBudget(10**6)
        self.num_gone = self.num_lost = 0
        self.refusals: list[Refusal] = []
        self.connections: set[ClientConnection] = set()
        self.ports: list[asyncio.Server] = []

    async def listen(self, **limits: float) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        server = await asyncio.get_running_loop().create_server(lambda: self.make(**limits), "127.0.0.1", 0)
        self.ports.append(server)
        return await asyncio.open_connection(*server.sockets[0].getsockname())

    def make(self, **limits: float) -> ClientConnection:
        of = ConnectionLimits(**limits)  # type: ignore[arg-type]
        made = ClientConnection(self._serve, of, self.connections, self._refused, _look, self.bodies)
        made.on_lost = self._lost
        return made

    async def _serve(self, request: ClientRequest, reply: Reply) -> None:
        self.served.append(request)
        self.served_bodies.append(bytes(request.body))
        reply.on_client_gone = self._gone
        await self.gate.wait()
        reply.whole(200 if request.turned_away is None else 404, b"text/plain", self.body)

    def _gone(self) -> None:
        self.num_gone += 1
        self.gate.set()

    def _lost(self) -> None:
        self.num_lost += 1

    def _refused(self, refusal: Refusal) -> None:
        self.refusals.append(refusal)


def _look(request: ClientRequest) -> None:
    if request.path == "/wrong":
        request.turned_away = InvalidRequestError("wrong")


async def trickle(writer: asyncio.StreamWriter, data: bytes, every_s: float) -> None:
    for byte in data:
        if writer.is_closing():
            return
        writer.write(bytes([byte]))
        await asyncio.sleep(every_s)


def attached(server: Server, **limits: float) -> tuple[ClientConnection, FakeTransport]:
    connection = server.make(**limits)
    return connection, FakeTransport(connection)


async def several_turns() -> None:
    for _ in range(10):
        await asyncio.sleep(0)

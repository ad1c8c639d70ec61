"""vLLM's MooncakeConnector: D asks P for the KV by a transfer id that the proxy has given both of them.

D finds P's workers through the bootstrap server of P, under P's engine id. One transfer serves one sequence of D. If D
does not take a request whose prompt P has computed, nobody can tell P: there is no HTTP call for it, and P keeps the
blocks for VLLM_MOONCAKE_ABORT_REQUEST_TIMEOUT (480 s unless its environment says otherwise).
"""

import asyncio
import time
import uuid

import msgspec

from services.global_proxy.call import Call
from services.global_proxy.errors import DiedError, NonsenseError, UnreachableError, UpstreamError
from services.global_proxy.http.engine_connection import BrokenOffError
from services.global_proxy.http.engine_endpoint import EngineEndpoint, NoConnectionError
from services.global_proxy.instances.instance import Instance
from services.global_proxy.leases import LeaseLedger
from services.global_proxy.legs import Legs
from services.global_proxy.ways.both_legs import BothLegs, Introduction

_QUERY_TIMEOUT_S = 5.0
_REMEMBER_S = 2.0  # less than an engine takes to start again, which gives it another id


class _Entry(msgspec.Struct):
    engine_id: str


_decoder = msgspec.json.Decoder(dict[str, _Entry])  # by data-parallel rank


class BootstrapServer:
    """A P's bootstrap server; asked for the engine id by one request at a time, and remembered for a moment."""

    def __init__(self, prefill: Instance) -> None:
        assert prefill.member.spec.bootstrap_url is not None, "members have been checked"
        self.url = prefill.member.spec.bootstrap_url
        self._prefill = prefill
        self._endpoint = EngineEndpoint(self.url, _QUERY_TIMEOUT_S)
        self._asking = asyncio.Lock()
        self._engine_id = ""
        self._asked_s = -_REMEMBER_S  # on the monotonic clock
        self._failed_s = -1.0
        self._failure: type[UpstreamError] = UnreachableError

    async def engine_id(self) -> str:
        """Raises UpstreamError."""
        came_s = time.monotonic()
        async with self._asking:
            if self._failed_s >= came_s:  # another has just waited in vain
                raise self._failure(self._prefill)
            if time.monotonic() - self._asked_s >= _REMEMBER_S:
                asked_s = time.monotonic()
                try:
                    self._engine_id = await self._query()
                except UpstreamError as error:
                    self._failed_s, self._failure = time.monotonic(), type(error)
                    raise
                self._asked_s = asked_s
            return self._engine_id

    async def _query(self) -> str:
        connection = None
        try:
            async with asyncio.timeout(_QUERY_TIMEOUT_S):
                connection = await self._endpoint.connect()
                answer = await connection.send(self._endpoint.request(b"GET", b"/query", b"connection: close\r\n"))
        except (NoConnectionError, TimeoutError) as error:
            self._prefill.failed(UnreachableError.reason, f"its bootstrap server: {error}")
            raise UnreachableError(self._prefill) from error
        except BrokenOffError as error:
            self._prefill.failed(DiedError.reason, f"its bootstrap server: {error}")
            raise DiedError(self._prefill) from error
        finally:
            if connection is not None:
                connection.abort()
        try:
            entries = _decoder.decode(answer.body) if answer.head.status == 200 else {}
        except msgspec.DecodeError:
            entries = {}
        if len(entries) != 1:
            self._prefill.failed(NonsenseError.reason, "its bootstrap server does not name one engine")
            raise NonsenseError(self._prefill)
        return next(iter(entries.values())).engine_id


class Mooncake(BothLegs):
    carries_choices = False

    def __init__(self, legs: Legs, ledger: LeaseLedger) -> None:
        super().__init__(legs, ledger)
        self._bootstrap_servers: dict[Instance, BootstrapServer] = {}

    async def introduce(self, call: Call, prefill: Instance) -> Introduction:
        bootstrap = self._bootstrap_of(prefill)
        engine_id = await bootstrap.engine_id()
        transfer_id = uuid.uuid4().hex
        return Introduction(
            {"do_remote_decode": True, "do_remote_prefill": False, "transfer_id": transfer_id},
            {
                "do_remote_decode": False,
                "do_remote_prefill": True,
                "transfer_id": transfer_id,
                "remote_engine_id": engine_id,
                "remote_bootstrap_addr": bootstrap.url,
            },
            release=lambda: None,
        )

    def _bootstrap_of(self, prefill: Instance) -> BootstrapServer:
        """Forgets those of instances that have left."""
        servers = self._bootstrap_servers
        if prefill not in servers:
            members = self.legs.prefill_pool.instances
            self._bootstrap_servers = servers = {i: server for i, server in servers.items() if i in members}
            servers[prefill] = BootstrapServer(prefill)
        return servers[prefill]

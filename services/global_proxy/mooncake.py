"""vLLM's MooncakeConnector: D asks P for the KV by a transfer id that the proxy has given both of them.

D finds P's workers through the bootstrap server of P, under P's engine id. One transfer serves one sequence of D. If D
does not take a request whose prompt P has computed, nobody can tell P: there is no HTTP call for it, and P keeps the
blocks for VLLM_MOONCAKE_ABORT_REQUEST_TIMEOUT (480 s unless its environment says otherwise).
"""

import asyncio
import time
import uuid
from collections.abc import Mapping

import msgspec
from yarl import URL

from services.global_proxy.both_legs import BothLegs, Introduction
from services.global_proxy.errors import DiedError, UnreachableError
from services.global_proxy.legs import Call, Legs
from services.global_proxy.upstream import EngineClient, Instance

_QUERY_TIMEOUT_S = 5.0
_REMEMBER_S = 2.0  # less than an engine takes to start again, which gives it another id


class _Entry(msgspec.Struct):
    engine_id: str


_decoder = msgspec.json.Decoder(dict[str, _Entry])  # by data-parallel rank


class BootstrapServer:
    """P's bootstrap server; asked for the engine id by one request at a time, and remembered for a moment."""

    def __init__(self, url: str) -> None:
        self.url = url
        self._asking = asyncio.Lock()
        self._engine_id = ""
        self._asked_s = -_REMEMBER_S  # on the monotonic clock

    async def engine_id(self, client: EngineClient) -> str:
        """Raises UnreachableError, DiedError."""
        async with self._asking:
            if time.monotonic() - self._asked_s >= _REMEMBER_S:
                asked_s = time.monotonic()
                self._engine_id = await self._query(client)
                self._asked_s = asked_s
            return self._engine_id

    async def _query(self, client: EngineClient) -> str:
        answer = await client.get(URL(self.url) / "query", _QUERY_TIMEOUT_S)
        if answer is None:
            raise UnreachableError("No answer from the prefill instance's bootstrap server")
        status, _, body = answer
        try:
            entries = _decoder.decode(body) if status == 200 else {}
        except msgspec.DecodeError:
            entries = {}
        if len(entries) != 1:
            raise DiedError("The prefill instance's bootstrap server does not name one engine")
        return next(iter(entries.values())).engine_id


class Mooncake(BothLegs):
    """Args: bootstrap_servers: one for each P, by the instance's name."""

    carries_choices = False

    def __init__(self, legs: Legs, client: EngineClient, bootstrap_servers: Mapping[str, BootstrapServer]) -> None:
        super().__init__(legs)
        self._client = client
        self._bootstrap_servers = bootstrap_servers

    async def introduce(self, call: Call, prefill: Instance) -> Introduction:
        bootstrap = self._bootstrap_servers[prefill.name]
        try:
            engine_id = await bootstrap.engine_id(self._client)
        except (UnreachableError, DiedError) as error:
            raise self.legs.prefill_failed(prefill, error) from error
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
            not_taken=lambda: None,
        )

"""All that one worker process of the proxy is made of."""

import asyncio
import logging
import sys
from contextlib import AsyncExitStack
from typing import Self

from fastapi import FastAPI

from kv_transfer.auth import DeploymentKey
from services.global_proxy.admission.gate import Gate
from services.global_proxy.admission.queue import QueueSettings
from services.global_proxy.app import make_app
from services.global_proxy.door import Door, turn_away
from services.global_proxy.engine_failure import as_our_own
from services.global_proxy.errors import EngineStatusError, ProxyError
from services.global_proxy.http.asgi import serve_asgi
from services.global_proxy.http.client_request import ClientRequest
from services.global_proxy.http.reply import Reply
from services.global_proxy.leases import LeaseLedger
from services.global_proxy.legs import Legs
from services.global_proxy.members import Members
from services.global_proxy.membership.admin import make_admin_router
from services.global_proxy.membership.admin_route import admin_token
from services.global_proxy.membership.load_table import LoadTable
from services.global_proxy.membership.registry_client import RegistryClient
from services.global_proxy.mixed import MixedEngines
from services.global_proxy.observing.cells import Cells
from services.global_proxy.observing.metrics import Metrics
from services.global_proxy.observing.refusals import reason_of
from services.global_proxy.observing.request_log import RequestLog, RequestRecord
from services.global_proxy.observing.tracing import Tracing, TracingSettings
from services.global_proxy.one_engine import OneEngine
from services.global_proxy.policies.base import Prompt
from services.global_proxy.prompt_of import PromptReader
from services.global_proxy.replay.continuer import Continuer
from services.global_proxy.request_scope import InFlight
from services.global_proxy.retries import RetryBudget
from services.global_proxy.security.api_keys import ApiKeys
from services.global_proxy.serving import Parts, Serving, client_id_of, new_id
from services.global_proxy.settings import Settings
from services.global_proxy.settling import CLIENT_GONE_STATUS
from services.global_proxy.short_prompts import ShortPrompts
from services.global_proxy.ways.choice import make_way

logger = logging.getLogger(__name__)

_BYTES_PER_TOKEN = 4  # a guess, for what goes to one engine alone


class Proxy:
    """`async with Proxy(...) as proxy:` inside an event loop; then `look` at requests' heads, and `serve` requests.

    Args:
        key: the deployment key: signs our own hand-offs and makes the admin API's token.
        registry: gives its state, at once and after each change, and takes the admin API's commands.
        cells, worker: where the metrics of all workers are, and which of them this is.

    Raises:
        ValueError: a file that the settings name is unusable.
    """

    def __init__(
        self,
        settings: Settings,
        key: DeploymentKey,
        table: LoadTable,
        registry: RegistryClient,
        cells: Cells | None = None,
        worker: int = 0,
    ) -> None:
        self.settings = settings
        self.table = table
        self.metrics = Metrics(cells, worker, table.num_slots)
        self._door = Door(None if settings.api_keys_file is None else ApiKeys(settings.api_keys_file))
        self.look = self._door.look
        self._tracing = TracingSettings(endpoint=settings.otlp_endpoint, sample_ratio=settings.trace_sample_ratio)
        self._key = key
        self._registry = registry
        self._worker = worker
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Self:
        settings, metrics = self.settings, self.metrics
        self.in_flight = InFlight(settings.request_timeout_s)
        writer = self.table.writer(self._worker)
        self.members = Members(settings, self._key, self.table, writer, metrics)
        self._stack.push_async_callback(self.members.close)
        self._registry.subscribe(self.members.apply)
        prefill, decode, mixed = self.members.pools
        queueing = QueueSettings(max_waiting=settings.max_queued, max_wait_s=settings.max_queue_s)
        self._gate = Gate((decode, mixed), self.table, writer, queueing, settings.max_active_per_decode)
        self.members.changed = self._gate.look
        retries = RetryBudget(settings.max_retries, metrics)
        prompts = PromptReader()
        short = ShortPrompts(prefill, decode, settings.min_prefill_tokens)
        legs = Legs(prefill, decode, mixed, prompts, short, retries, metrics)
        self.ledger = LeaseLedger(metrics.open_leases)
        way = make_way(settings, self._key, legs, self.ledger)
        self._stack.push_async_callback(way.close)
        self._request_log = RequestLog(sys.stderr.fileno(), metrics.log_lines_dropped)
        self._stack.callback(self._request_log.close)
        tracing = Tracing(self._tracing, metrics.traces)
        self._stack.push_async_callback(tracing.close)
        continuer = Continuer(decode, mixed, metrics.itl_seconds, settings.continue_streams)
        self._serving = Serving(
            Parts(
                settings=settings,
                gate=self._gate,
                way=way,
                legs=legs,
                mixed=MixedEngines(legs, short, metrics),
                continuer=continuer,
                retries=retries,
                short=short,
                prompts=prompts,
                in_flight=self.in_flight,
                metrics=metrics,
                request_log=self._request_log,
                tracing=tracing,
            )
        )
        self._one_engine = OneEngine(self.members, settings.max_n)
        self.app: FastAPI = make_app(self.members, self.in_flight, metrics, settings.api_keys_file is not None)
        self.app.include_router(make_admin_router(self._registry, self.table, admin_token(self._key)))
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()

    async def serve(self, request: ClientRequest, reply: Reply) -> None:
        """Answer one request."""
        if request.entry is None and request.turned_away is None:
            self._door.look(request)
        entry = request.entry
        if entry is not None and entry[0].kind == "completion":
            await self._serving.serve(request, reply, entry[1])  # which answers, counts and logs whatever happens
        else:
            await self._serve_other(request, reply)

    async def _serve_other(self, request: ClientRequest, reply: Reply) -> None:
        """What is no completion, and what the door turned away. What monitors ask for is not logged."""
        record = RequestRecord(id=new_id(), path=request.path)
        record.client_id = client_id_of(request)
        reply.headers.append((b"x-request-id", request.headers.get(b"x-request-id") or record.id.encode()))
        is_logged = False
        try:
            if request.turned_away is not None:
                self._refuse(request.turned_away, reply, record)
            elif request.entry is not None and request.entry[0].kind == "decode":
                is_logged = True
                key = request.entry[1]
                record.key = None if key is None else key.name
                self._gate.charge(key, Prompt(len(request.body) // _BYTES_PER_TOKEN, 0, None, b""))
                await self._one_engine.serve(request, reply, record.id)
            else:
                await serve_asgi(self.app, request, reply)
        except ProxyError as refusal:
            self._refuse(refusal, reply, record)
        except asyncio.CancelledError as gone:
            record.error = type(gone).__name__
        except Exception as mistake:
            record.error = type(mistake).__name__
            logger.exception("a mistake of ours")
            if reply.status is None:
                turn_away(ProxyError("Internal error"), reply)
        record.status, record.bytes = reply.status or CLIENT_GONE_STATUS, reply.num_bytes
        self.metrics.requests.labels(record.path, record.status).inc()
        if is_logged or record.error is not None:
            self._request_log.add(record)

    def _refuse(self, refusal: ProxyError, reply: Reply, record: RequestRecord) -> None:
        record.error = type(refusal).__name__
        if (reason := reason_of(refusal)) is not None:
            self.metrics.refused.labels(reason).inc()
        turn_away(as_our_own(refusal, record.id) if isinstance(refusal, EngineStatusError) else refusal, reply)

"""The proxy's FastAPI application: its routes, and what lives as long as it does."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import prometheus_client
from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from kv_transfer.auth import load_or_make_key
from services.global_proxy import openai_error
from services.global_proxy.completions import Completions
from services.global_proxy.errors import UnreachableError
from services.global_proxy.handoff import Handoff
from services.global_proxy.health import HealthCheck
from services.global_proxy.legs import Legs
from services.global_proxy.metrics import Metrics
from services.global_proxy.policy import RoundRobin
from services.global_proxy.request_scope import InFlight
from services.global_proxy.settings import Settings
from services.global_proxy.upstream import EngineClient, Instance, Pool, Role
from services.global_proxy.ways import make_way

COMPLETION_PATHS = ("/v1/completions", "/v1/chat/completions")
_RELAY_TIMEOUT_S = 5.0
_JSON = "application/json"
_KINDS = {404: "NotFoundError", 405: "MethodNotAllowedError"}


@dataclass(frozen=True)
class Runtime:
    """What needs the event loop: made at startup, gone after shutdown."""

    client: EngineClient
    pools: tuple[Pool, Pool]  # prefill, decode
    health: HealthCheck
    completions: Completions


class Proxy:
    """The endpoints, over one runtime.

    Raises:
        ValueError: the key file is unusable.

    Attributes:
        app: the ASGI application to serve.
        in_flight: the requests being served; whoever stops the server drains it first.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._key = load_or_make_key(settings.key_file) if settings.connector == "omni" else None
        self.metrics = Metrics()
        self.in_flight = InFlight()
        self._runtime: Runtime | None = None
        self.app = FastAPI(
            openapi_url=None,
            redirect_slashes=False,
            lifespan=self._lifespan,
            exception_handlers={HTTPException: _http_error, Exception: _internal_error},
        )
        self.app.router.routes.extend(
            [
                *(Route(path, _Asgi(self._completions), methods=["POST"]) for path in COMPLETION_PATHS),
                Route("/v1/models", self._relay_get, methods=["GET"]),
                Route("/version", self._relay_get, methods=["GET"]),
                Route("/health", self._health, methods=["GET"]),
                Route("/live", self._live, methods=["GET"]),
                Route("/metrics", self._metrics_text, methods=["GET"]),
            ]
        )

    @property
    def runtime(self) -> Runtime:
        assert self._runtime is not None, "the application has not started"
        return self._runtime

    @asynccontextmanager
    async def _lifespan(self, app: FastAPI) -> AsyncIterator[None]:
        settings = self.settings
        pools = (self._pool("prefill", settings.prefill_urls), self._pool("decode", settings.decode_urls))
        client = EngineClient(settings.connect_timeout_s, self.metrics)
        way = make_way(settings, self._key, pools[0], Legs(*pools, client, self.metrics), client)
        completions = Completions(settings, Handoff(way), self.in_flight, self.metrics)
        self._runtime = Runtime(client, pools, HealthCheck(pools, client), completions)
        try:
            yield
        finally:
            self._runtime = None
            await way.close()
            await client.close()

    def _pool(self, role: Role, urls: tuple[str, ...]) -> Pool:
        return Pool(role, [Instance(role, url, self.metrics) for url in urls], RoundRobin())

    async def _completions(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self.runtime.completions(scope, receive, send)

    async def _relay_get(self, request: Request) -> Response:
        """An engine's own answer; D's if there is one, for it is D that answers completions."""
        authorization = request.headers.get("Authorization")
        headers = None if authorization is None else {"Authorization": authorization}
        prefill, decode = self.runtime.pools
        for instance in (*decode.instances, *prefill.instances):
            url = instance.url.with_path(request.url.path)
            answer = await self.runtime.client.get(url, _RELAY_TIMEOUT_S, headers)
            if answer is not None:
                status, content_type, body = answer
                return Response(body, status, {"content-type": content_type})
        error = UnreachableError("No instance answers")
        return Response(openai_error.to_json(error), error.status, {"retry-after": "1"}, _JSON)

    async def _health(self, request: Request) -> Response:
        if self.in_flight.draining:
            return JSONResponse({"status": "draining"}, 503)
        missing = await self.runtime.health.missing_roles()
        if missing:
            return JSONResponse({"status": "unavailable", "missing": missing}, 503)
        return JSONResponse({"status": "ok"})

    async def _live(self, request: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def _metrics_text(self, request: Request) -> Response:
        text = prometheus_client.generate_latest(self.metrics.registry)
        return Response(text, headers={"content-type": prometheus_client.CONTENT_TYPE_LATEST})


class _Asgi:
    """Starlette calls a function with a request and expects a response; an object it calls as ASGI."""

    def __init__(self, call: ASGIApp) -> None:
        self._call = call

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._call(scope, receive, send)


async def _http_error(request: Request, error: Exception) -> Response:
    """No such path, or not with this method."""
    assert isinstance(error, HTTPException)
    message = f"{error.detail}: {request.method} {request.url.path}"
    body = openai_error.error_json(message, _KINDS.get(error.status_code, "HTTPError"), error.status_code)
    return Response(body, error.status_code, error.headers, _JSON)


async def _internal_error(request: Request, error: Exception) -> Response:
    """A mistake of ours; Starlette raises it again, so that the server logs it."""
    return Response(openai_error.error_json("Internal error", "InternalServerError", 500), 500, None, _JSON)

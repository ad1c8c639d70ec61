"""What the proxy answers itself, as a FastAPI application: health, metrics, admin, and the OpenAPI of everything."""

import re
from typing import Any, Literal

from fastapi import FastAPI
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response

from services.global_proxy import api_docs, api_schema, openai_error
from services.global_proxy.members import Members
from services.global_proxy.membership.member import Role
from services.global_proxy.observing.metrics import Metrics
from services.global_proxy.request_scope import InFlight

_JSON = "application/json"
_ODD_VERSION = re.compile(r"version=(?![0-9]{1,4}(\.[0-9]{1,4}){2} *([;,]|$))")  # prometheus_client fails on these
_KINDS = {404: "NotFoundError", 405: "MethodNotAllowedError"}


class Live(BaseModel):
    status: Literal["ok"]


class Health(BaseModel):
    status: Literal["ok", "draining", "unavailable"]
    missing: list[Role] | None = None


_Responses = dict[int | str, dict[str, Any]]
_HEALTH: _Responses = {
    200: {"model": Health, "description": "Ready."},
    503: {"model": Health, "description": "Not ready."},
}
_LIVE: _Responses = {200: {"model": Live, "description": "Alive."}}
_METRICS: _Responses = {
    200: {
        "description": "Counters, gauges and histograms.",
        "content": {"text/plain": {}, "application/openmetrics-text": {}},
    }
}
_DOCS: _Responses = {200: {"description": "HTML.", "content": {"text/html": {}}}}


class _Application(FastAPI):
    """FastAPI whose schema has the routes that never reach it, too. Made when it is first asked for."""

    needs_keys = False

    def openapi(self) -> dict[str, Any]:
        if self.openapi_schema is None:
            self.openapi_schema = api_schema.complete(super().openapi(), self.needs_keys)
        return self.openapi_schema


def make_app(members: Members, in_flight: InFlight, metrics: Metrics, needs_keys: bool = False) -> FastAPI:
    """The application; its routers for others (admin) are for the caller to add, before it serves.

    Args:
        needs_keys: the proxy has API keys.
    """
    app = _Application(
        title="omni global proxy",
        description=api_schema.SUMMARY,
        redirect_slashes=False,
        docs_url=None,  # FastAPI's page loads its scripts from another server
        redoc_url=None,
        exception_handlers={HTTPException: _http_error, Exception: _internal_error},
    )
    app.needs_keys = needs_keys

    async def health() -> Response:
        """At least one healthy prefill and one decode instance, or a mixed one."""
        if in_flight.draining:
            return JSONResponse({"status": "draining"}, 503)
        missing = await members.missing_roles()
        if missing:
            return JSONResponse({"status": "unavailable", "missing": missing}, 503)
        return JSONResponse({"status": "ok"})

    async def live() -> Response:
        """The process answers."""
        return JSONResponse({"status": "ok"})

    async def metrics_text(request: Request) -> Response:
        """Prometheus metrics of all workers."""
        accept = request.headers.get("accept", "")
        text, content_type = metrics.render("" if _ODD_VERSION.search(accept) else accept)
        return Response(text, headers={"content-type": content_type})

    async def docs() -> Response:
        """This description, for readers."""
        return HTMLResponse(
            api_docs.page(app.openapi()), headers={"content-security-policy": api_docs.CONTENT_SECURITY_POLICY}
        )

    for path, answer, name, responses in (
        ("/health", health, "Ready?", _HEALTH),
        ("/live", live, "Alive?", _LIVE),
        ("/metrics", metrics_text, "Metrics", _METRICS),
        ("/docs", docs, "Documentation", _DOCS),
    ):
        app.add_api_route(
            path, answer, methods=["GET"], summary=name, tags=["proxy"], response_class=Response, responses=responses
        )
    return app


async def _http_error(request: Request, error: Exception) -> Response:
    """No such path, or not with this method."""
    assert isinstance(error, HTTPException)
    message = f"{error.detail}: {request.method} {request.scope['path']}"
    body = openai_error.error_json(message, _KINDS.get(error.status_code, "HTTPError"), error.status_code)
    return Response(body, error.status_code, error.headers, _JSON)


async def _internal_error(request: Request, error: Exception) -> Response:
    """A mistake of ours; Starlette raises it again, so that it is logged."""
    return Response(openai_error.error_json("Internal error", "InternalServerError", 500), 500, None, _JSON)

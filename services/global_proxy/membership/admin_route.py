"""What every route of the admin API does first and last: the token, a bounded body, errors in OpenAI's shape."""

import asyncio
import hmac
import logging
from collections.abc import Callable, Coroutine, Mapping
from typing import Any, Final

from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Message

from kv_transfer.auth import DeploymentKey
from services.global_proxy.membership.errors import ChannelClosedError, StillBusyError, UnknownInstanceError
from services.global_proxy.openai_error import error_json

logger = logging.getLogger(__name__)

_PURPOSE: Final = "omni proxy admin API, bearer token, 1"  # keeps this code from being any other of the key's
_MAX_BODY_BYTES: Final = 64 * 1024
_BODY_TIMEOUT_S: Final = 10.0

Handler = Callable[[Request], Coroutine[Any, Any, Response]]


def admin_token(key: DeploymentKey) -> str:
    """The admin API's bearer token: whoever holds the deployment key can make it, and nobody the key from it."""
    return key.mac(_PURPOSE).hex()


def route_class(token: str) -> type[APIRoute]:
    """A class of routes for those who have this token."""
    expected = token.encode()

    class AdminRoute(APIRoute):
        def get_route_handler(self) -> Handler:
            handler = super().get_route_handler()

            async def handle(request: Request) -> Response:
                scheme, _, given = request.headers.get("authorization", "").partition(" ")
                is_theirs = hmac.compare_digest(given.strip().encode("latin-1"), expected)
                if scheme.lower() != "bearer" or not is_theirs:  # before anything of the request is read
                    return _error(
                        401,
                        "The admin API needs `Authorization: Bearer TOKEN` with the token of this deployment's key",
                        {"www-authenticate": "Bearer"},
                    )
                return await _answer(handler, request)

            return handle

    return AdminRoute


async def _answer(handler: Handler, request: Request) -> Response:
    try:
        return await handler(await _with_body(request))
    except RequestValidationError as error:
        return _error(400, _first_of(error))
    except HTTPException as error:
        return _error(error.status_code, str(error.detail), error.headers)
    except UnknownInstanceError as error:
        return _error(404, str(error))
    except StillBusyError as error:
        return _error(409, str(error))
    except ValueError as error:
        return _error(400, str(error))
    except ChannelClosedError as error:
        logger.error("admin API: %s", error)
        return _error(503, "The registry does not answer: try again", {"retry-after": "1"})


async def _with_body(request: Request) -> Request:
    """The request with its body read. Raises HTTPException: it is too large or too slow."""
    body = b""
    try:
        async with asyncio.timeout(_BODY_TIMEOUT_S):
            async for chunk in request.stream():
                body += chunk
                if len(body) > _MAX_BODY_BYTES:
                    raise HTTPException(413, f"The body must have {_MAX_BODY_BYTES} bytes at most")
    except TimeoutError:
        raise HTTPException(408, f"The body did not come within {_BODY_TIMEOUT_S:g} s") from None
    except ClientDisconnect:
        raise HTTPException(400, "The body ended early") from None

    async def replay() -> Message:
        return {"type": "http.request", "body": body, "more_body": False}

    return Request(request.scope, replay)


def _first_of(error: RequestValidationError) -> str:
    first = error.errors()[0]
    place = ".".join(str(part) for part in first["loc"])
    return f"{place}: {first['msg']}"


_KINDS: Final = {
    400: "BadRequestError",
    401: "AuthenticationError",
    404: "NotFoundError",
    405: "MethodNotAllowedError",
    408: "RequestTimeoutError",
    409: "ConflictError",
    413: "RequestTooLargeError",
    503: "ServiceUnavailableError",
}


def _error(status: int, message: str, headers: Mapping[str, str] | None = None) -> Response:
    return Response(error_json(message, _KINDS.get(status, "HTTPError"), status), status, headers, "application/json")

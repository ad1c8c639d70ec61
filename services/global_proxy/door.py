"""Who may ask for what: the proxy's route table and API keys, before anything else is looked at."""

import logging

from services.global_proxy import openai_error
from services.global_proxy.errors import BodyTooLargeError, InvalidRequestError, ProxyError
from services.global_proxy.http.client_request import ClientRequest
from services.global_proxy.http.reply import Reply
from services.global_proxy.security.api_keys import ApiKey, ApiKeys
from services.global_proxy.security.errors import UnauthorizedError, WrongMethodError
from services.global_proxy.security.routes import Route, RouteTable

logger = logging.getLogger(__name__)


class Door:
    """Args: keys: None lets everybody in."""

    def __init__(self, keys: ApiKeys | None) -> None:
        self._keys = keys
        self._routes = RouteTable()

    def look(self, request: ClientRequest) -> None:
        """`enter`, at the end of a request's head. What comes of it is noted on the request."""
        try:
            request.entry = self.enter(request)
        except ProxyError as refusal:
            request.turned_away = refusal.with_traceback(None)  # whose frames hold the request
        except Exception:
            logger.exception("a mistake of ours")
            request.turned_away = ProxyError("Internal error")

    def enter(self, request: ClientRequest) -> tuple[Route, ApiKey | None]:
        """The request's route, and whose it is, by its head alone. Raises ProxyError.

        A key of ours goes no further than here: whatever is given to an engine has none.
        """
        route = self._routes.find(request.method, request.path)
        if route.max_body_bytes is not None:
            num_bytes = int(request.headers.get(b"content-length", b"0"))  # of chunks, the parser sees to it
            if num_bytes > route.max_body_bytes:
                raise BodyTooLargeError(f"The request body is larger than {route.max_body_bytes} bytes")
        key: ApiKey | None = None
        if self._keys is not None and route.kind != "admin":
            authorization = request.headers.pop(b"authorization", None)
            if route.needs_key:
                key = self._keys.check(authorization)
        if route.kind in ("completion", "decode") and request.method == "POST":
            _require_json(request.headers.get(b"content-type", b""))
        return route, key


def turn_away(error: ProxyError, reply: Reply) -> None:
    """Answer with an error, before anything else has been."""
    headers = [] if error.retry_after_s is None else [(b"retry-after", b"%d" % error.retry_after_s)]
    if isinstance(error, WrongMethodError):
        headers.append((b"allow", error.allow.encode()))
    if isinstance(error, UnauthorizedError):
        headers.append((b"www-authenticate", b"Bearer"))
    reply.whole(error.status, b"application/json", openai_error.to_json(error), headers)


def _require_json(content_type: bytes) -> None:
    """As vLLM does, so that no web page can post here without the browser asking first."""
    if content_type.partition(b";")[0].strip().lower() != b"application/json":
        raise InvalidRequestError("Unsupported Media Type: Only 'application/json' is allowed")

"""What may be asked of the proxy. Anything that is not in this table is refused before its body is read.

A path is compared as it was sent: nothing is decoded, folded or normalised, so no spelling of a path gets past it.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final, Literal

from services.global_proxy.security.errors import NoSuchRouteError, WrongMethodError

Kind = Literal["completion", "decode", "local", "admin"]

_POST: Final = frozenset({"POST"})
_GET: Final = frozenset({"GET"})
_ADMIN_PREFIX: Final = "/admin/v1/"
_SMALL_BODY_BYTES: Final = 64 << 10


@dataclass(frozen=True, slots=True)
class Route:
    """One path.

    Attributes:
        kind: completion: disaggregated; decode: relayed to a decode instance; local: the proxy's own answer;
            admin: the admin API's, which has a key of its own, and whose paths have methods of their own.
        needs_key: whether an API key is asked for, where there are any. As in vLLM's own server, what a load balancer
            or a monitor asks for needs none.
        max_body_bytes: None: the proxy's general limit.
    """

    path: str
    methods: frozenset[str]
    kind: Kind
    needs_key: bool = True
    max_body_bytes: int | None = None


ROUTES: Final = (
    Route("/v1/completions", _POST, "completion"),
    Route("/v1/chat/completions", _POST, "completion"),
    Route("/v1/responses", _POST, "completion"),
    Route("/v1/embeddings", _POST, "decode"),
    Route("/tokenize", _POST, "decode"),
    Route("/detokenize", _POST, "decode"),
    Route("/v1/models", _GET, "decode", max_body_bytes=0),
    Route("/version", _GET, "decode", needs_key=False, max_body_bytes=0),
    Route("/health", _GET, "local", needs_key=False, max_body_bytes=0),
    Route("/live", _GET, "local", needs_key=False, max_body_bytes=0),
    Route("/metrics", _GET, "local", needs_key=False, max_body_bytes=0),
    Route("/openapi.json", _GET, "local", needs_key=False, max_body_bytes=0),
    Route("/docs", _GET, "local", needs_key=False, max_body_bytes=0),
)
_ADMIN: Final = Route(_ADMIN_PREFIX, frozenset(), "admin", needs_key=False, max_body_bytes=_SMALL_BODY_BYTES)


class RouteTable:
    """Finds a request's route."""

    def __init__(self, routes: Iterable[Route] = ROUTES, has_admin: bool = True) -> None:
        self._routes = {route.path: route for route in routes}
        self._has_admin = has_admin

    def find(self, method: str, path: str) -> Route:
        """The route of a path, without its query.

        Raises:
            NoSuchRouteError: there is none.
            WrongMethodError: not with this method.
        """
        route = self._routes.get(path)
        if route is None:
            if self._has_admin and path.startswith(_ADMIN_PREFIX):
                return _ADMIN
            raise NoSuchRouteError(f"Not Found: {method} {path}")
        if method not in route.methods:
            allow = ", ".join(sorted(route.methods))
            raise WrongMethodError(f"Method Not Allowed: {method} {path}; must be one of {allow}", allow)
        return route

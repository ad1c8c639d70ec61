"""The table of routes: what is not in it is refused."""

import pytest

from services.global_proxy.security.errors import NoSuchRouteError, WrongMethodError
from services.global_proxy.security.routes import ROUTES, RouteTable

TABLE = RouteTable()


def test_every_route_is_found_with_its_methods_alone() -> None:
    for route in ROUTES:
        for method in ("GET", "POST", "PUT", "DELETE", "HEAD", "OPTIONS", "TRACE", "CONNECT", "get"):
            if method in route.methods:
                assert TABLE.find(method, route.path) is route
            else:
                with pytest.raises(WrongMethodError) as caught:
                    TABLE.find(method, route.path)
                assert caught.value.allow == ", ".join(sorted(route.methods))


@pytest.mark.parametrize(
    "path",
    [
        "",
        "*",
        "/",
        "/v1/completions/",
        "//v1/completions",
        "/v1//completions",
        "/V1/completions",
        "/v1/%63ompletions",
        "/v1/./completions",
        "/v1/x/../completions",
        "http://host/v1/completions",
        "/inference/v1/generate",
        "/invocations",
        "/v1/messages",
        "/collective_rpc",
        "/reset_prefix_cache",
        "/v1/load_lora_adapter",
        "/admin",
        "/admin/v1",
        "/admin/v2/state",
    ],
)
def test_everything_else_is_refused(path: str) -> None:
    with pytest.raises(NoSuchRouteError):
        TABLE.find("POST", path)


def test_admin_is_there_only_if_wanted() -> None:
    assert TABLE.find("DELETE", "/admin/v1/instances/a:1").kind == "admin"
    with pytest.raises(NoSuchRouteError):
        RouteTable(has_admin=False).find("GET", "/admin/v1/state")


def test_what_needs_no_key() -> None:
    assert {route.path for route in ROUTES if not route.needs_key} == {
        "/version",
        "/health",
        "/live",
        "/metrics",
        "/openapi.json",
        "/docs",
    }

"""The door: who is let in, and what a request has left of what it brought."""

from pathlib import Path

import pytest

from services.global_proxy.admission.rate_limit import RateLimits
from services.global_proxy.door import Door
from services.global_proxy.errors import BodyTooLargeError, InvalidRequestError, ProxyError
from services.global_proxy.http.client_request import ClientRequest
from services.global_proxy.security.api_keys import ApiKeys, new_key
from services.global_proxy.security.errors import NoSuchRouteError, UnauthorizedError, WrongMethodError


@pytest.fixture
def key_and_door(tmp_path: Path) -> tuple[bytes, Door]:
    key, entry = new_key("me", RateLimits(requests_per_minute=3), priority=-1)
    file = tmp_path / "keys"
    file.write_text(entry.line() + "\n")
    return key.encode(), Door(ApiKeys(file))


def post(path: str, **headers: bytes) -> ClientRequest:
    sent = {b"content-type": b"application/json"} | {name.encode(): value for name, value in headers.items()}
    return ClientRequest("POST", path.encode(), sent, bytearray(b"{}"))


def get(path: str, **headers: bytes) -> ClientRequest:
    return ClientRequest("GET", path.encode(), {name.encode(): value for name, value in headers.items()})


def test_a_key_is_known_and_goes_no_further(key_and_door: tuple[bytes, Door]) -> None:
    key, door = key_and_door
    request = post("/v1/completions", authorization=b"Bearer " + key)
    route, whose = door.enter(request)
    assert (route.path, route.kind) == ("/v1/completions", "completion")
    assert whose is not None
    assert (whose.name, whose.priority, whose.limits) == ("me", -1, RateLimits(requests_per_minute=3))
    assert request.headers == {b"content-type": b"application/json"}


def test_a_key_where_none_is_needed_goes_no_further_either(key_and_door: tuple[bytes, Door]) -> None:
    key, door = key_and_door
    for path in ("/version", "/metrics"):
        request = get(path, authorization=b"Bearer " + key)
        assert door.enter(request)[1] is None
        assert request.headers == {}


def test_the_admin_api_gets_its_token(key_and_door: tuple[bytes, Door]) -> None:
    request = get("/admin/v1/state", authorization=b"Bearer token")
    route, whose = key_and_door[1].enter(request)
    assert (route.kind, whose) == ("admin", None)
    assert request.headers == {b"authorization": b"Bearer token"}


def test_without_keys_engines_get_what_the_client_says() -> None:
    request = post("/v1/completions", authorization=b"Bearer theirs")
    assert Door(None).enter(request)[1] is None
    assert request.headers[b"authorization"] == b"Bearer theirs"


@pytest.mark.parametrize(
    ("request_", "error"),
    [
        (post("/v1/completions/"), NoSuchRouteError),
        (post("/v1/models"), WrongMethodError),
        (post("/v1/completions"), UnauthorizedError),
        (post("/v1/completions", authorization=b"Bearer wrong"), UnauthorizedError),
        (get("/v1/models"), UnauthorizedError),
        (get("/live", **{"content-length": b"1"}), BodyTooLargeError),
        (ClientRequest("POST", b"/admin/v1/instances", {b"content-length": b"65537"}), BodyTooLargeError),
    ],
)
def test_who_is_turned_away(key_and_door: tuple[bytes, Door], request_: ClientRequest, error: type[Exception]) -> None:
    with pytest.raises(error):
        key_and_door[1].enter(request_)


@pytest.mark.parametrize("content_type", [b"", b"text/plain", b"application/jsonx", b"text/json; application/json"])
@pytest.mark.parametrize("path", ["/v1/completions", "/tokenize"])
def test_only_json(path: str, content_type: bytes) -> None:
    request = post(path)
    request.headers[b"content-type"] = content_type
    with pytest.raises(InvalidRequestError, match="application/json"):
        Door(None).enter(request)
    request.headers[b"content-type"] = b" Application/JSON; charset=utf-8"
    Door(None).enter(request)


def test_a_look_is_noted_on_the_request(
    key_and_door: tuple[bytes, Door], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Whatever happens: it is the parser that asks."""
    key, door = key_and_door
    welcome, stranger = post("/v1/completions", authorization=b"Bearer " + key), post("/v1/completions")
    for request in (welcome, stranger):
        door.look(request)
    assert welcome.turned_away is None
    assert welcome.entry is not None
    assert (welcome.entry[0].path, welcome.entry[1] and welcome.entry[1].name) == ("/v1/completions", "me")
    assert stranger.entry is None
    assert isinstance(stranger.turned_away, UnauthorizedError)

    def fail(*_: object) -> None:
        raise KeyError("secret")

    monkeypatch.setattr(ApiKeys, "check", fail)
    another = post("/v1/completions")
    door.look(another)
    assert another.entry is None
    assert type(another.turned_away) is ProxyError
    assert another.turned_away.message == "Internal error"
    assert "a mistake of ours" in caplog.text

"""What an instance may be called, and what it may not be."""

import pytest

from services.global_proxy.membership.member import InstanceSpec, LoadReport


@pytest.mark.parametrize(
    ("url", "name"),
    [
        ("http://Host-1.example:8000", "host-1.example:8000"),
        ("http://10.0.0.1", "10.0.0.1:80"),
        ("https://h", "h:443"),
        ("http://[::1]:8000", "[::1]:8000"),
    ],
)
def test_name(url: str, name: str) -> None:
    assert InstanceSpec("prefill", url).name == name


@pytest.mark.parametrize(
    "url",
    [
        "",
        "10.0.0.1:8000",
        "ftp://h:1",
        "http://h:1/v1",
        "http://h:1/",
        "http://h:1?a",
        "http://h:99999",
        "http://h:0",
        "http://h:",
        "http://h:x",
        "http://:8000",
        "http://user:pw@h:1",
        "http://h:1\n",
        "http://h\x00:1",
        "http://h h:1",
        "http://[::1:8000",
        "http://" + "h" * 400 + ":1",
    ],
)
def test_what_is_no_url_is_named(url: str) -> None:
    with pytest.raises(ValueError, match=r"^url: must be http://HOST:PORT .* got '"):
        InstanceSpec("prefill", url)


@pytest.mark.parametrize(
    ("role", "fields", "message"),
    [
        ("prefll", {}, "role: must be one of prefill, decode, mixed, got 'prefll'"),
        ("prefill", {"kv_address": "10.0.0.1"}, "kv_address: must be HOST:PORT, got '10.0.0.1'"),
        ("prefill", {"kv_address": "http://h:1"}, "kv_address: must be HOST:PORT, got 'http://h:1'"),
        ("prefill", {"bootstrap_url": "h:1"}, "bootstrap_url: must be http://HOST:PORT"),
        ("decode", {"kv_address": "h:1"}, "kv_address: only a prefill instance has one"),
        ("mixed", {"bootstrap_url": "http://h:1"}, "bootstrap_url: only a prefill instance has one"),
        ("decode", {"kv_events": "h:1"}, "kv_events: only a prefill or mixed instance has one"),
    ],
)
def test_other_fields_that_are_wrong(role: str, fields: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        InstanceSpec(role, "http://h:1", **fields)  # type: ignore[arg-type]


def test_a_report_has_no_negative_numbers() -> None:
    with pytest.raises(ValueError, match="kv_used_tokens: must be 0 or more, below 2\\*\\*63, got -1"):
        LoadReport(1, 0, -1, 100, 0.0)

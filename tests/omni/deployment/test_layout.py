"""Ranks on hosts and devices."""

import pytest

from omni.deployment.layout import LayoutError, Rank, lay_out

TWO = ("a", "b")


def shape(ranks: tuple[Rank, ...]) -> list[list[tuple[str, tuple[int, ...], int]]]:
    return [[(node.host, node.devices, node.index_on_host) for node in nodes] for nodes in ranks]


def test_ranks_of_one_device_follow_the_devices() -> None:
    ranks = lay_out(TWO, {"a": (4, 5), "b": (0, 1)}, num_ranks=4, num_workers=1)
    assert shape(ranks) == [[("a", (4,), 0)], [("a", (5,), 1)], [("b", (0,), 0)], [("b", (1,), 1)]]


def test_fewer_ranks_than_devices_are_shared_out_evenly() -> None:
    ranks = lay_out(TWO, {"a": (0, 1, 2), "b": (0, 1, 2)}, num_ranks=3, num_workers=1)
    assert [nodes[0].host for nodes in ranks] == ["a", "a", "b"]


def test_hosts_with_fewer_devices_get_fewer_ranks() -> None:
    ranks = lay_out(TWO, {"a": (0,), "b": (0, 1, 2)}, num_ranks=4, num_workers=1)
    assert [nodes[0].host for nodes in ranks] == ["a", "b", "b", "b"]


def test_a_rank_has_its_devices_on_one_host() -> None:
    ranks = lay_out(TWO, {"a": (0, 1, 2), "b": (0, 1, 2)}, num_ranks=2, num_workers=2)
    assert shape(ranks) == [[("a", (0, 1), 0)], [("b", (0, 1), 0)]]


def test_a_large_rank_spans_whole_hosts() -> None:
    hosts = ("a", "b", "c", "d")
    ranks = lay_out(hosts, dict.fromkeys(hosts, (0, 1)), num_ranks=2, num_workers=4)
    assert shape(ranks) == [[("a", (0, 1), 0), ("b", (0, 1), 0)], [("c", (0, 1), 0), ("d", (0, 1), 0)]]


@pytest.mark.parametrize(("num_ranks", "hosts"), [(1, ["ab"]), (2, ["a", "b"]), (3, ["a", "a", "b"])])
def test_without_devices(num_ranks: int, hosts: list[str]) -> None:
    ranks = lay_out(TWO, {}, num_ranks=num_ranks, num_workers=2)
    assert ["".join(node.host for node in nodes) for nodes in ranks] == hosts


@pytest.mark.parametrize(
    ("devices", "num_ranks", "num_workers", "words"),
    [
        (
            {"a": (0, 1), "b": (0,)},
            4,
            1,
            "4 DP ranks with 1 devices each need 4, .* lists 3 on 2",
        ),
        ({"a": (0, 1), "b": (0, 1, 2)}, 1, 4, "must list equally many devices that divide it; they list 2, 3"),
        ({"a": (0, 1, 2), "b": (0, 1, 2)}, 1, 5, "must list equally many devices that divide it; they list 3, 3"),
        ({"a": (0, 1, 2), "b": (0, 1, 2)}, 3, 2, "do not fit: .* the hosts have room for 2"),
        ({}, 1, 1, r"1 DP rank\(s\) with 1 worker\(s\) each do not spread evenly over 2 hosts"),
    ],
)
def test_what_does_not_fit(devices: dict[str, tuple[int, ...]], num_ranks: int, num_workers: int, words: str) -> None:
    with pytest.raises(LayoutError, match=words):
        lay_out(TWO, devices, num_ranks=num_ranks, num_workers=num_workers)

"""Which host computes which DP rank of a group, and on which of its devices."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Node:
    """One host's part in a DP rank. A rank has one, unless its workers are more than a host's devices."""

    host: str
    devices: tuple[int, ...]  # empty where devices are not counted
    index_on_host: int  # among the group's ranks there: what its ports are counted by


Rank = tuple[Node, ...]  # the first node has the api server


class LayoutError(ValueError):
    """The ranks cannot be placed on these hosts. The text says why."""


def lay_out(
    hosts: Sequence[str], devices: Mapping[str, tuple[int, ...]], *, num_ranks: int, num_workers: int
) -> tuple[Rank, ...]:
    """Place DP ranks of `num_workers` workers each, in order, the master first.

    Args:
        devices: of each host; with none at all, hosts are taken to be alike and large enough.

    Raises:
        LayoutError: there are too few devices, or a rank would have unequal parts.
    """
    if not any(devices.values()):
        return tuple(_without_devices(hosts, num_ranks, num_workers))
    needed, listed = num_ranks * num_workers, sum(map(len, devices.values()))
    if needed > listed:
        text = f"{num_ranks} DP ranks with {num_workers} devices each need {needed}, ascend_rt_visible_devices lists "
        raise LayoutError(f"{text}{listed} on {len(hosts)} host(s)")
    if all(len(devices[host]) < num_workers for host in hosts):
        return tuple(_over_hosts(hosts, devices, num_ranks, num_workers))
    return tuple(_on_hosts(hosts, devices, num_ranks, num_workers))


def _without_devices(hosts: Sequence[str], num_ranks: int, num_workers: int) -> Iterator[Rank]:
    if num_ranks >= len(hosts):
        share, more = divmod(num_ranks, len(hosts))
        for index, host in enumerate(hosts):
            yield from ((Node(host, (), rank),) for rank in range(share + (index < more)))
        return
    if len(hosts) % num_ranks or num_workers % (len(hosts) // num_ranks):
        text = f"{num_ranks} DP rank(s) with {num_workers} worker(s) each do not spread evenly over {len(hosts)} hosts"
        raise LayoutError(text)
    num_nodes = len(hosts) // num_ranks
    for first in range(0, len(hosts), num_nodes):
        yield tuple(Node(host, (), 0) for host in hosts[first : first + num_nodes])


def _over_hosts(
    hosts: Sequence[str], devices: Mapping[str, tuple[int, ...]], num_ranks: int, num_workers: int
) -> Iterator[Rank]:
    """Each rank on several whole hosts: vLLM wants as many workers on each."""
    counts = {len(devices[host]) for host in hosts}
    if len(counts) > 1 or num_workers % min(counts):
        text = f"a DP rank with {num_workers} workers spans hosts, which must list equally many devices that divide it"
        raise LayoutError(f"{text}; they list {', '.join(str(len(devices[host])) for host in hosts)}")
    num_nodes = num_workers // min(counts)
    for first in range(0, num_ranks * num_nodes, num_nodes):
        yield tuple(Node(host, devices[host], 0) for host in hosts[first : first + num_nodes])


def _on_hosts(
    hosts: Sequence[str], devices: Mapping[str, tuple[int, ...]], num_ranks: int, num_workers: int
) -> Iterator[Rank]:
    """Each rank on one host; in equal shares where the devices allow it, else the first hosts filled first."""
    room = [len(devices[host]) // num_workers for host in hosts]
    if sum(room) < num_ranks:
        text = f"{num_ranks} DP ranks with {num_workers} devices each do not fit: a rank's devices must be on one host"
        raise LayoutError(f"{text}, and the hosts have room for {sum(room)}")
    share, more = divmod(num_ranks, len(hosts))
    shares = [share + (index < more) for index in range(len(hosts))]
    if any(own > most for own, most in zip(shares, room, strict=True)):
        shares = [min(most, max(0, num_ranks - sum(room[:index]))) for index, most in enumerate(room)]
    for host, own in zip(hosts, shares, strict=True):
        for rank in range(own):
            yield (Node(host, devices[host][rank * num_workers : (rank + 1) * num_workers], rank),)

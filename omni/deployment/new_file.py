"""The text of a new deployment file: hosts given to groups, ports that do not meet, what each platform needs."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

import yaml

from omni.deployment.errors import DeploymentError
from omni.deployment.groups import Pool
from omni.deployment.model import MASTER_PORT_OFFSET, Backend, Platform

LOOPBACK = "127.0.0.1"
_FIRST_PORT = 9000
_PORT_STEP = 10  # at least, between groups on one host
_LISTEN_PORT = 7000
_TITLES: dict[Pool, str] = {
    "prefill": "engines that read prompts",
    "decode": "engines that write answers",
    "mixed": "engines that do both",
}


@dataclass(frozen=True, kw_only=True)
class NewFile:
    """What the file is to say. Texts are as a user wrote them; the file's own rules check them."""

    name: str
    backend: Backend
    platform: Platform
    num_groups: dict[Pool, int]
    model_path: str
    hosts: tuple[str, ...] = ()  # none: those of a cluster, one for each group
    devices: tuple[int, ...] = ()  # of each host
    docker_image: str = ""
    code_path: str = ""  # on every host
    local_code_path: str = ""
    login: dict[str, str] = field(default_factory=dict)  # user, private_key

    @property
    def summary(self) -> str:
        """4P1D on 8 hosts"""
        letters = {"prefill": "P", "decode": "D", "mixed": " mixed"}
        groups = "".join(f"{number}{letters[pool]}" for pool, number in self.num_groups.items() if number)
        where = f"{len(self.hosts)} hosts" if len(self.hosts) > 1 else "one host" if self.hosts else self.backend
        return f"{groups} on {where}"

    def text(self) -> str:
        """YAML. Raises DeploymentError: the hosts or devices do not suffice."""
        return "\n".join((*self._head(), *self._pools(), *self._services(), ""))

    def _head(self) -> Iterator[str]:
        yield f"# {self.summary}, begun with `omni_cli init`. configs/1p1d.yaml in the source shows every key."
        if self.backend == "ansible" and not self.login.get("private_key"):
            yield "# To log in with a password, write `password:` beside each `user:`, and chmod 600 this file."
        if not self.hosts:
            yield "# The cluster chooses the nodes: names of hosts tell them apart, and each is one node of its group."
        yield ""
        yield f"name: {_scalar(self.name)}"
        yield f"backend: {self.backend}"
        yield f"platform: {self.platform}"

    def _pools(self) -> Iterator[str]:
        yield from ("", "deployment:")
        placed = iter(_place(self))
        for pool, number in self.num_groups.items():
            if number:
                yield f"  {pool + ':':<30}# {_TITLES[pool]}"
            for index in range(number):
                yield f"    group{index + 1}:"
                yield from (f"      {line}" for line in self._group(pool, next(placed)))
        yield f"  {'proxy:':<30}# where clients send their requests"
        if self.hosts:
            yield f"    host: {_scalar(self.hosts[0])}"
        yield from (f"    {line}" for line in self._login())
        yield f"    listen_port: {_LISTEN_PORT}"

    def _group(self, pool: Pool, place: "_Place") -> Iterator[str]:
        yield f"hosts: {_scalar(','.join(place.hosts))}"
        yield from self._login()
        yield f"base_api_port: {place.base_api_port}"
        yield from (f"{key}: {port}" for key, port in place.other_ports.items())
        num_devices = len(place.devices) * len(place.hosts)
        if self.platform == "npu":
            yield f'ascend_rt_visible_devices: "{",".join(map(str, place.devices))}"'
        elif self.platform == "cuda":
            size = "data_parallel_size" if pool == "decode" else "tensor_parallel_size"
            yield f"{size}: {num_devices}"
        elif len(place.hosts) > 1:
            yield f"data_parallel_size: {len(place.hosts)}"

    def _login(self) -> Iterator[str]:
        yield from (f"{key}: {_scalar(value)}" for key, value in self.login.items() if value)

    def _services(self) -> Iterator[str]:
        yield from ("", "services:", f"  model_path: {_scalar(self.model_path)}")
        written = (
            ("docker_image", self.docker_image, ""),
            ("code_path", self.code_path, "this package's code on every host"),
            ("local_code_path", self.local_code_path, "copied there"),
        )
        for key, value, note in written:
            if value:
                line = f"  {key}: {_scalar(value)}"
                yield f"{line:<40}  # {note}" if note else line


@dataclass(frozen=True)
class _Place:
    """Where one group runs."""

    hosts: tuple[str, ...]
    devices: tuple[int, ...]  # of each of its hosts
    base_api_port: int
    other_ports: dict[str, int]  # written: those that would follow from it meet others


def _place(new: NewFile) -> list[_Place]:
    """Of every group, in the file's order."""
    num_groups = sum(new.num_groups.values())
    hosts_of = share_hosts(new.hosts or [f"node{i + 1}" for i in range(num_groups)], new.num_groups)
    num_on = Counter(host for hosts in hosts_of for host in hosts)
    if new.devices and new.backend != "local" and max(num_on.values()) > 1:
        text = f"{len(new.hosts)} for {num_groups} groups, and with devices each has hosts of its own"
        raise DeploymentError(f"--hosts: {text}; name at least {num_groups}, or write fewer groups")
    num_before: Counter[str] = Counter()
    places = []
    for hosts in hosts_of:
        index = max(num_before[host] for host in hosts)
        devices = _device_share(new, index, num_on[hosts[0]])
        places.append(_Place(hosts, devices, *_ports(new, index, num_on[hosts[0]])))
        num_before.update(hosts)
    return places


def _ports(new: NewFile, index: int, num_sharing: int) -> tuple[int, dict[str, int]]:
    """base_api_port, and what else has to be written, of the `index`-th of `num_sharing` groups on a host."""
    step = max(_PORT_STEP, len(new.devices))
    if step * num_sharing <= MASTER_PORT_OFFSET:
        return _FIRST_PORT + step * index, {}
    # So many that the ports which follow from one group's are another's: each group has a block of ports for itself.
    num_ranks = -(-len(new.devices) // num_sharing) or 1
    first = _FIRST_PORT + (4 * num_ranks + 1) * index
    sizes = {"base_kv_port": num_ranks, "base_event_port": 2 * num_ranks, "master_port": 1}
    starts = accumulate(sizes.values(), initial=first + num_ranks)
    return first, dict(zip(sizes, starts, strict=False))


def share_hosts(hosts: Sequence[str], num_groups: dict[Pool, int]) -> list[tuple[str, ...]]:
    """Each group's hosts: as many for each as there are, the rest for the last decode group.

    With fewer hosts than groups, groups share them in turn.
    """
    total = sum(num_groups.values())
    if len(hosts) < total:
        return [(hosts[index % len(hosts)],) for index in range(total)]
    counts = [len(hosts) // total] * total
    num_before_mixed = total - num_groups.get("mixed", 0)
    counts[(num_before_mixed if num_groups.get("decode") else total) - 1] += len(hosts) % total
    rest = iter(hosts)
    return [tuple(next(rest) for _ in range(count)) for count in counts]


def _device_share(new: NewFile, index: int, num_sharing: int) -> tuple[int, ...]:
    """Of the `index`-th of `num_sharing` groups on a host."""
    if not new.devices:
        return ()
    if len(new.devices) < num_sharing:
        text = f"--devices: {len(new.devices)} for {num_sharing} groups on one host"
        raise DeploymentError(f"{text}; name more devices, or fewer groups")
    first, last = (len(new.devices) * i // num_sharing for i in (index, index + 1))
    return new.devices[first:last]


def _scalar(text: str) -> str:
    """As YAML has it on one line. Raises DeploymentError."""
    if not text.isprintable():
        raise DeploymentError(f"{text!r} holds characters that do not print; write it without them")
    return yaml.safe_dump(text, width=10**6, allow_unicode=True).splitlines()[0]

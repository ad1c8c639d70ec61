"""What the command line tells an actor. It is all that an actor knows: Ray gives it to each of its lives again."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class EngineSetup:
    """One node of one group."""

    namespace: str
    actor_name: str
    role: str
    group: str
    node: int
    num_ranks: int  # api servers on this node
    num_cores: int  # that its workers compute on; 0: they compute on devices
    process_names: tuple[str, ...]
    master: str | None  # the actor of the instance's first node; None: this one is it, or it is the only one
    is_spread: bool  # over several nodes, by vLLM's own means
    first_api_port: int  # it takes this one, or the next ones that are free
    join: tuple[str, ...]  # HOST:PORT of each proxy's control plane
    config: Mapping[str, Any] = field(repr=False)  # of `node_files.group_config`
    key: str = field(repr=False)  # the deployment key, as its file has it


@dataclass(frozen=True, kw_only=True)
class ProxySetup:
    """The proxy.

    `arguments` hold {0}, {1}... where the paths of `secret_files` go, once these are on the node.
    """

    namespace: str
    actor_name: str
    arguments: tuple[str, ...]
    env: Mapping[str, str]
    port: int
    is_tls: bool
    secret_files: tuple[str, ...] = field(repr=False)  # their text
    key: str = field(repr=False)


@dataclass(frozen=True, kw_only=True)
class Meeting:
    """Where the nodes of one instance find each other, and the ports that all of them count from."""

    address: str
    base_api_port: int

"""Which transport reads from which peer: the fastest that both sides offer, or the one that the configuration names."""

import logging
from collections.abc import Callable, Sequence

from kv_transfer.connector.settings import ConnectorSettings
from kv_transfer.errors import PeerRefusedError
from kv_transfer.memory.regions import Memory
from kv_transfer.memory.shared_pool import SharedPool
from kv_transfer.protocol import Offer, RankInfo
from kv_transfer.rank_server import RankClient, RankServer
from kv_transfer.transports.base import Transport
from kv_transfer.transports.process_vm import ProcessVmTransport
from kv_transfer.transports.shared_memory import SharedMemoryTransport
from kv_transfer.transports.tcp import TcpTransport

logger = logging.getLogger(__name__)

# Best first; see docs/performance.md. Mooncake opens ports without authentication: only where it is asked for.
ON_HOST = ("shared_memory", "process_vm", "tcp")
ON_DEVICE = ("hccl",)


class Transports:
    """One worker's transports, of every kind that this machine and the configuration allow."""

    def __init__(
        self,
        settings: ConnectorSettings,
        memory: Memory,
        pool: SharedPool | None,
        server: RankServer | None,
        client: RankClient,
    ) -> None:
        makers: dict[str, Callable[[], Transport]] = {
            "shared_memory": lambda: SharedMemoryTransport(memory, pool),
            "process_vm": lambda: ProcessVmTransport(memory),
            "hccl": lambda: _hccl(settings, memory, server, client),
            "mooncake": lambda: _mooncake(settings, memory),
            "tcp": lambda: TcpTransport(
                memory, server, client, num_connections=settings.num_connections, checksum=settings.checksum
            ),
        }
        names = (ON_HOST if memory.is_on_host else ON_DEVICE) if settings.transport == "auto" else (settings.transport,)
        self._transports = {name: makers[name]() for name in names}

    def offers(self) -> tuple[Offer, ...]:
        """P: what peers are told."""
        offers = [transport.offer() for transport in self._transports.values()]
        return tuple(offer for offer in offers if offer is not None)

    def choose(self, rank: RankInfo) -> tuple[Transport, Offer]:
        """D: how to read from this rank. Raises PeerRefusedError: there is no way that both have."""
        for transport in self._transports.values():
            for offer in rank.offers:
                if offer.__struct_config__.tag == transport.name and transport.can_read(rank.endpoint, offer):
                    logger.info("KV from %s:%d: %s", rank.endpoint.host, rank.endpoint.port, transport.name)
                    return transport, offer
        raise PeerRefusedError(
            f"{rank.endpoint.host}:{rank.endpoint.port} offers {_names(rank.offers)}; this side can use "
            f"{', '.join(self._transports)}, and none of them between these two: set services.kv_transfer.transport to "
            "auto, or to what both sides can use"
        )

    def close(self) -> None:
        for transport in self._transports.values():
            transport.close()


def _names(offers: Sequence[Offer]) -> str:
    return ", ".join(str(offer.__struct_config__.tag) for offer in offers) or "nothing"


def _hccl(settings: ConnectorSettings, memory: Memory, server: RankServer | None, client: RankClient) -> Transport:
    from kv_transfer.transports.hccl import HcclTransport

    return HcclTransport(memory, server, client, checksum=settings.checksum)


def _mooncake(settings: ConnectorSettings, memory: Memory) -> Transport:
    from kv_transfer.transports.mooncake import MooncakeTransport

    return MooncakeTransport(memory, settings.listen_host, required=True)

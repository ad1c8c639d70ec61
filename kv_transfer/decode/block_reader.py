"""D's worker reads a prompt's KV from the ranks of P that hold it."""

import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

import zmq

from kv_transfer.auth import DeploymentKey
from kv_transfer.control import ControlClient, ControlClients
from kv_transfer.decode.followed import Followed
from kv_transfer.decode.peer_backoff import PeerBackoff
from kv_transfer.errors import (
    CancelledError,
    DeadlineError,
    LeaseEndedError,
    PeerRefusedError,
    PeerUnreachableError,
    ProtocolError,
)
from kv_transfer.memory.blocks import BlockTables
from kv_transfer.memory.copy_plan import CopyPlan, plan_copies
from kv_transfer.protocol import (
    EndRead,
    Fingerprint,
    FollowPrefill,
    Offer,
    PrefillProgress,
    RankInfo,
    RankLayout,
    Welcome,
)
from kv_transfer.rank_connection import RankConnection
from kv_transfer.rank_server import RankClient
from kv_transfer.transports.base import Transport
from kv_transfer.transports.choice import Transports

_GREETING_TIMEOUT_S = 10.0  # P's control thread answers at once: a longer silence means another key, or nobody
_SILENCE_S = 10.0  # P tells its followers once a second that it is alive


@dataclass(frozen=True, kw_only=True)
class Load:
    """Read the KV of tokens [first_token, end_token) of one request."""

    request_id: str
    host: str  # of P's control port
    port: int
    run_id: str | None  # of P; None where the hand-off came before P had begun
    lease_id: str
    prompt_digest: str
    remote_block_ids: BlockTables | None  # None: P is still computing the prompt
    local_block_ids: BlockTables
    first_token: int
    end_token: int
    num_blocks: int  # of ours, that are written

    @property
    def peer(self) -> tuple[str, int]:
        return self.host, self.port

    @property
    def is_followed(self) -> bool:
        """Whether P is still computing the prompt."""
        return self.remote_block_ids is None


@dataclass
class LoadState:
    """A load under way: until when, what was moved, and whether anybody still wants it."""

    deadline: float  # on time.monotonic
    read_limit_s: float  # how long moving one part of it may take
    num_bytes: dict[str, int] = field(default_factory=dict)  # by transport
    is_cancelled: bool = False


@dataclass(frozen=True)
class Source:
    """One rank of P that holds some of what this rank needs."""

    rank: RankInfo
    transport: Transport
    offer: Offer
    plan: CopyPlan


@dataclass(frozen=True)
class PeerEngine:
    """One run of a P engine, as this worker reads from it."""

    run_id: str
    sources: tuple[Source, ...]


class BlockReader:
    """Args:
    layout, transports: of this worker.
    client: its connections to rank servers.
    rank, num_ranks: this worker's place among its engine's.
    replica_offset: a number of this engine's own, so that engines of few ranks do not all read the same replica.
    """

    def __init__(
        self,
        key: DeploymentKey,
        fingerprint: Fingerprint,
        layout: RankLayout,
        transports: Transports,
        client: RankClient,
        *,
        rank: int,
        num_ranks: int,
        replica_offset: int = 0,
    ) -> None:
        self._fingerprint = fingerprint
        self._layout = layout
        self._transports = transports
        self._client = client
        self._rank = rank
        self._replica_offset = replica_offset
        self._num_ranks = num_ranks
        self._zmq: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._controls = ControlClients(self._zmq, key)
        self._lock = threading.Lock()
        self._engines: dict[tuple[str, int], PeerEngine] = {}
        self._backoff = PeerBackoff()

    def read(self, load: Load, state: LoadState) -> None:
        """Read, and make sure that what was read is good.

        Raises:
            KVTransferError: one of its kinds; our blocks then hold anything.
        """
        if time.monotonic() >= state.deadline:
            raise DeadlineError("the load threads for this peer were busy until the deadline")
        self._backoff.check(load.peer)
        try:
            self._read(load, state)
        except (DeadlineError, PeerUnreachableError):
            self._backoff.failed(load.peer)
            raise
        except (LeaseEndedError, PeerRefusedError):
            self._backoff.answered(load.peer)
            raise
        self._backoff.answered(load.peer)

    @property
    def num_peers_left_alone(self) -> int:
        """Peers that did not answer and are not asked for a while."""
        return len(self._backoff)

    def _read(self, load: Load, state: LoadState) -> None:
        end = EndRead(load.lease_id, load.request_id, self._rank, self._num_ranks)
        with self._controls.client(load.host, load.port) as control:
            engine = self._engine(load, control, state.deadline)
            try:
                if load.remote_block_ids is None:
                    self._follow(engine, load, state)
                else:
                    self._pull(engine, load, load.remote_block_ids, state)
            except CancelledError:
                control.end_read(end, self._soon(state))  # P need not keep the blocks for us
                raise
            if not control.end_read(end, self._soon(state)):
                raise LeaseEndedError("the lease ended before the read did; the blocks may hold another prompt's KV")

    def forget(self, peer: tuple[str, int]) -> None:
        """Give up what is held for a P whose load failed; the next load from it greets it anew."""
        with self._lock:
            engine = self._engines.pop(peer, None)
        self._controls.forget(*peer)
        if engine is not None:
            for source in engine.sources:
                source.transport.forget(source.rank.endpoint)

    def close(self) -> None:
        self._transports.close()
        self._controls.close()
        self._zmq.term()  # ends the waits of loads under way

    def _pull(self, engine: PeerEngine, load: Load, remote_block_ids: BlockTables, state: LoadState) -> None:
        for source in engine.sources:
            _check_is_wanted(state)
            self._read_tokens(source, load, remote_block_ids, state, load.first_token, load.end_token)

    def _read_tokens(
        self,
        source: Source,
        load: Load,
        remote_block_ids: BlockTables,
        state: LoadState,
        first_token: int,
        end_token: int,
        layers: range | None = None,
    ) -> None:
        spans = source.plan.spans(remote_block_ids, load.local_block_ids, first_token, end_token, layers=layers)
        deadline = min(state.deadline, time.monotonic() + state.read_limit_s)
        source.transport.read(source.rank.endpoint, source.offer, spans, deadline)
        moved = state.num_bytes
        moved[source.transport.name] = moved.get(source.transport.name, 0) + spans.num_bytes

    # --- layer by layer

    def _follow(self, engine: PeerEngine, load: Load, state: LoadState) -> None:
        """Read what each source reports as computed, until all is there. The sources go on in step."""
        with ExitStack() as stack:
            follows: list[tuple[Source, RankConnection, Followed]] = []
            for source in engine.sources:
                connection = stack.enter_context(self._client.connection(source.rank.endpoint, self._soon(state)))
                connection.send(FollowPrefill(load.lease_id, load.prompt_digest), self._soon(state))
                num_layers = len(source.rank.layout.layers)
                follows.append((source, connection, Followed(load.first_token, load.end_token, num_layers)))
            while follows:
                follows = [follow for follow in follows if self._follow_one(*follow, load, state)]

    def _follow_one(
        self, source: Source, connection: RankConnection, followed: Followed, load: Load, state: LoadState
    ) -> bool:
        """Take one report and read what is new; returns whether more is to come."""
        _check_is_wanted(state)
        progress = connection.receive_reply(self._soon(state))
        if not isinstance(progress, PrefillProgress):
            raise ProtocolError(f"{type(progress).__name__} in answer to a follower")
        for due in followed.next_reads(progress):
            self._read_tokens(
                source, load, progress.block_ids, state, due.first_token, due.end_token, layers=due.layers
            )
        if progress.is_last and not followed.is_complete:
            raise ProtocolError("the prefill engine ended its reports before all that it was asked for")
        return not progress.is_last

    @staticmethod
    def _soon(state: LoadState) -> float:
        return min(state.deadline, time.monotonic() + _SILENCE_S)

    # --- peers

    def _engine(self, load: Load, control: ControlClient, deadline: float) -> PeerEngine:
        """Greets P, unless the hand-off says that it is the one that we know."""
        engine = self._engines.get(load.peer)
        if engine is not None and load.run_id == engine.run_id:
            return engine
        welcome = control.greet(self._fingerprint, min(deadline, time.monotonic() + _GREETING_TIMEOUT_S))
        if load.run_id not in (None, welcome.run_id):
            raise LeaseEndedError("the prefill engine has restarted since the hand-off")
        if engine is not None and engine.run_id == welcome.run_id:
            return engine
        self.forget(load.peer)  # it has restarted
        engine = PeerEngine(welcome.run_id, self._sources(welcome))
        with self._lock:
            self._engines[load.peer] = engine
        return engine

    def _sources(self, welcome: Welcome) -> tuple[Source, ...]:
        layouts: Sequence[RankLayout] = [rank.layout for rank in welcome.ranks]
        plans = plan_copies(self._layout, layouts, self._rank + self._replica_offset)
        return tuple(
            Source(welcome.ranks[plan.source], *self._transports.choose(welcome.ranks[plan.source]), plan)
            for plan in plans
        )


def _check_is_wanted(state: LoadState) -> None:
    if state.is_cancelled:
        raise CancelledError("nobody waits for this load any more")

"""KV bytes through Mooncake's transfer engine: D reads P's memory by address, P's processor has no part in it.

For trusted networks only. The engine listens on every interface of the host, whatever address it is given, knows no
authentication, and lets whoever reaches it read, and write, what is registered. So only P registers its KV memory; D
registers a staging buffer for each peer, from which it scatters.

The staging buffer is there for the deadline, too. A call returns when one of its transfers has failed or its own time
is up, while others may still write, and there is no way to take them back: into KV memory they could come when another
request has got its blocks. A staging buffer in that state is put aside, and not used again.
"""

import os
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from kv_transfer.errors import DeadlineError, PeerRefusedError, PeerUnreachableError
from kv_transfer.memory import gather
from kv_transfer.memory.regions import Memory, Region, Spans
from kv_transfer.protocol import MooncakeOffer, Offer, RankEndpoint
from kv_transfer.transports.base import Transport
from kv_transfer.transports.batches import batches

_MAX_REGISTERED = 256  # what Ascend devices take
_PIECE_BYTES = 4 << 20
_MAX_SPANS = 512  # in one call: the engine fails beyond 1024 waiting transfers to one peer
_MAX_PUT_ASIDE = 64
_ENVIRONMENT = {  # read by the engine as it starts; what the user has set holds
    "MC_LOG_LEVEL": "ERROR",
    "MC_TRANSFER_TIMEOUT": "10",  # seconds for one call, and its busy waiting; 30 otherwise
}


class MooncakeTransport(Transport):
    """Args:
    memory: what is served and read into; all of it on one device.
    host: the address that peers are told.
    protocol: of the engine; by default "tcp" for memory on the host and "ascend" for that of an NPU.
    required: raise ValueError where the library is missing, rather than offer nothing.
    """

    name = "mooncake"

    def __init__(self, memory: Memory, host: str, *, protocol: str | None = None, required: bool = False) -> None:
        super().__init__(memory)
        self._host = host
        self._protocol = protocol or ("tcp" if memory.is_on_host else "ascend")
        self._required = required
        self._lock = threading.Lock()
        self._closed = False
        self._engine: Any = None
        self._registered: list[int] = []  # P's
        self._pairs: dict[RankEndpoint, _Pair] = {}
        self._put_aside: list[torch.Tensor] = []  # the engine may write into these until it ends

    def _started(self) -> Any:
        """The engine, or None. Raises ValueError: it does not start, or it is required and missing."""
        with self._lock:
            if self._engine is None and not self._closed:
                engine = _new_engine(self._required)
                if engine is None:
                    return None
                if engine.initialize(self._host, "P2PHANDSHAKE", self._protocol, "") != 0:
                    raise ValueError(f"Mooncake's engine does not start with {self._protocol!r} on {self._host}")
                self._engine = engine
            return self._engine

    # --- P

    def offer(self) -> Offer | None:
        """Raises ValueError: the engine cannot serve this memory."""
        merged = _merged(self.memory.regions)
        if len(merged) > _MAX_REGISTERED:
            raise ValueError(
                f"Mooncake takes {_MAX_REGISTERED} regions of memory; this KV cache has {len(merged)} that do not "
                "touch: choose another services.kv_transfer.transport"
            )
        engine = self._started()
        if engine is None:
            return None
        for region in merged:
            if engine.register_memory(region.address, region.num_bytes) != 0:
                raise ValueError(f"Mooncake's engine does not register {region.num_bytes} bytes of KV memory")
            self._registered.append(region.address)
        return MooncakeOffer(
            session=f"{self._host}:{engine.get_rpc_port()}",
            protocol=self._protocol,
            addresses=tuple(region.address for region in self.memory.regions),
            sizes=tuple(region.num_bytes for region in self.memory.regions),
        )

    # --- D

    def can_read(self, peer: RankEndpoint, offer: Offer) -> bool:
        return (
            isinstance(offer, MooncakeOffer)
            and offer.protocol == self._protocol
            and 0 < len(offer.addresses) == len(offer.sizes)
            and self._started() is not None
        )

    def read(self, peer: RankEndpoint, offer: Offer, spans: Spans, deadline: float) -> None:
        assert isinstance(offer, MooncakeOffer)
        self.memory.check(spans.local, spans.sizes)
        remote = Memory([Region(*region) for region in zip(offer.addresses, offer.sizes, strict=True)])
        try:
            remote.check(spans.remote, spans.sizes)
        except IndexError as error:
            raise PeerRefusedError(f"{offer.session}: {error}") from None
        pair = self._pair(peer)
        if not pair.lock.acquire(timeout=max(0.0, deadline - time.monotonic())):
            raise DeadlineError(f"{offer.session}: other reads took until the deadline")
        try:
            for piece in batches(spans, max_bytes=_PIECE_BYTES, max_spans=_MAX_SPANS):
                self._read_piece(pair, offer.session, remote, piece, deadline)
        finally:
            with self._lock:
                is_forgotten = self._pairs.get(peer) is not pair
            if is_forgotten:
                self._release(pair)
            pair.lock.release()

    def _read_piece(self, pair: "_Pair", session: str, remote: Memory, spans: Spans, deadline: float) -> None:
        engine = self._started()
        if engine is None:
            raise PeerUnreachableError("this engine is shutting down")
        staging = pair.staging = self._new_staging(engine) if pair.staging is None else pair.staging
        if time.monotonic() >= deadline:
            raise DeadlineError(f"{session}: the deadline passed between two pieces")
        sources, sizes = remote.addresses(spans.remote).tolist(), spans.sizes.tolist()
        targets = (staging.data_ptr() + spans.sizes.cumsum() - spans.sizes).tolist()
        status = _within(deadline, lambda: engine.batch_transfer_sync_read(session, targets, sources, sizes))
        if status != 0:
            pair.staging = None
            with self._lock:
                self._put_aside.append(staging)
            if status is None:
                raise DeadlineError(f"{session}: the deadline passed while Mooncake moved bytes")
            raise PeerUnreachableError(f"{session}: Mooncake's transfer failed")
        data = staging[: spans.num_bytes]
        if self.memory.is_on_host:
            gather.scatter(self.memory, spans.local, spans.sizes, data.numpy())
        else:
            gather.scatter_tensor(self.memory, spans.local, spans.sizes, data)
            torch.get_device_module(data.device).current_stream(data.device).synchronize()

    def _new_staging(self, engine: Any) -> torch.Tensor:
        if len(self._put_aside) >= _MAX_PUT_ASIDE:
            raise PeerUnreachableError(
                f"{_MAX_PUT_ASIDE} of Mooncake's transfers failed, and may go on writing: restart this engine"
            )
        device = self.memory.tensors[0].device if self.memory.tensors else torch.device("cpu")
        staging = torch.empty(_PIECE_BYTES, dtype=torch.uint8, device=device)
        if engine.register_memory(staging.data_ptr(), _PIECE_BYTES) != 0:
            raise PeerUnreachableError("Mooncake's engine does not register memory")
        return staging

    def _pair(self, peer: RankEndpoint) -> "_Pair":
        with self._lock:
            if self._closed:
                raise PeerUnreachableError("this engine is shutting down")
            return self._pairs.setdefault(peer, _Pair())

    def _release(self, pair: "_Pair") -> None:
        """Needs the pair's lock."""
        staging, pair.staging = pair.staging, None
        if staging is not None and self._engine is not None:
            self._engine.unregister_memory(staging.data_ptr())

    def forget(self, peer: RankEndpoint) -> None:
        with self._lock:
            pair = self._pairs.pop(peer, None)
        if pair is not None and pair.lock.acquire(blocking=False):  # else its reader releases it
            self._release(pair)
            pair.lock.release()

    def close(self) -> None:
        """The engine ends with the last call that is under way."""
        with self._lock:
            self._closed = True
            peers = list(self._pairs)
        for peer in peers:
            self.forget(peer)
        with self._lock:
            engine, self._engine = self._engine, None
        if engine is not None:
            for address in self._registered:
                engine.unregister_memory(address)


class _Pair:
    """D's side of one peer: reads take turns with its staging buffer."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.staging: torch.Tensor | None = None


def _new_engine(required: bool) -> Any:
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    try:
        from mooncake.engine import TransferEngine  # type: ignore[import-not-found,import-untyped,unused-ignore]
    except ImportError as error:
        if not required:
            return None
        raise ValueError(
            f"services.kv_transfer.transport is mooncake, whose library does not load ({error}): install omni_infer's "
            "extra 'mooncake', and Debian's package libibverbs1"
        ) from None
    return TransferEngine()


def _merged(regions: Sequence[Region]) -> list[Region]:
    """The same bytes in as few regions as can be."""
    merged: list[Region] = []
    for region in sorted(regions, key=lambda region: region.address):
        if merged and merged[-1].address + merged[-1].num_bytes == region.address:
            merged[-1] = Region(merged[-1].address, merged[-1].num_bytes + region.num_bytes)
        else:
            merged.append(region)
    return merged


def _within(deadline: float, call: Callable[[], int]) -> int | None:
    """What the call returns, or None: it has not returned by the deadline, and goes on by itself."""
    # The engine's calls know no deadline but their own. A thread of its own costs 0.1 ms, for up to 4 MiB.
    results: list[int] = []
    thread = threading.Thread(target=lambda: results.append(call()), name="kv-mooncake", daemon=True)
    thread.start()
    thread.join(timeout=max(0.0, deadline - time.monotonic()))
    return results[0] if results else None

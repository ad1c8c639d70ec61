"""Runs in an instance's process: joins it to each of a list of proxies, reports its load, and takes it away again.

It knows the control plane and nothing of the engine, which tells its load through a callable. Each proxy has a task of
its own: one that is down or refuses does not keep the instance from the others.
"""

import asyncio
import contextlib
import logging
import random
import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Protocol, Self
from urllib.parse import urlsplit

import grpc
from google.protobuf.message import DecodeError

from kv_transfer.auth import DeploymentKey
from services.global_proxy.control_plane import control_plane_pb2 as pb
from services.global_proxy.control_plane.errors import NotGenuineError
from services.global_proxy.control_plane.handshake import PROTOCOL, SERVICE, Handshake, Session, new_nonce

logger = logging.getLogger(__name__)

_ANSWER_S: Final = 5.0  # for each step of joining
_LEAVE_S: Final = 2.0  # for all proxies at once
_READY_INTERVAL_S: Final = 0.2
_SAY_UNREADY_AFTER_S: Final = 30.0
_FIRST_BACKOFF_S: Final = 0.2
_LAST_BACKOFF_S: Final = 10.0
_BUSY_REPORTS: Final = 4  # looks at the load of a busy engine within the proxy's report interval
_INTERVAL_BOUNDS_S: Final = (0.05, 60.0)

_OPTIONS: Final = (
    ("grpc.use_local_subchannel_pool", 1),  # gRPC's own backoff, which others share, is left out: ours counts
    ("grpc.enable_http_proxy", 0),
    ("grpc.enable_retries", 0),
    ("grpc.max_receive_message_length", 16 * 1024),
    ("grpc.keepalive_time_ms", 20_000),  # a proxy whose host is gone closes nothing
    ("grpc.keepalive_timeout_ms", 10_000),
)


class Load(Protocol):
    """What the engine says of itself; tokens of KV, 0 where it is not known."""

    @property
    def num_running(self) -> int: ...
    @property
    def num_waiting(self) -> int: ...
    @property
    def kv_used_tokens(self) -> int: ...
    @property
    def kv_total_tokens(self) -> int: ...


@dataclass(frozen=True, kw_only=True)
class AgentSettings:
    """What the instance is, and whom it joins.

    Attributes:
        proxies: HOST:PORT of each proxy's control plane. A name is looked up again each time.
        url: http://HOST:PORT of the instance, as the proxies reach it.
        kv_address: HOST:PORT of a P in layer-wise mode.
        bootstrap_url: of a P with Mooncake's connector.
        role: prefill, decode or mixed.
        kv_events: HOST:PORT where it publishes what its prefix cache holds; not of a D.
        facts: what all instances must agree in: model, engine version, dtype, connector...
    """

    proxies: tuple[str, ...]
    role: str
    url: str
    kv_address: str | None = None
    bootstrap_url: str | None = None
    kv_events: str | None = None
    facts: Mapping[str, str] = field(default_factory=dict)


class _StreamEndedError(Exception):
    """The proxy has ended the stream without a complaint."""


class InstanceAgent:
    """`async with InstanceAgent(...)`: joins once the instance listens; leaves on the way out, within 2 s.

    Nothing of gRPC starts before the instance listens, for an engine may fork until then.

    Args:
        load: called some times a second in the event loop; must be quick.
        on_drain: called when a proxy (named) gives the instance nothing new any more.
    """

    def __init__(
        self,
        settings: AgentSettings,
        key: DeploymentKey,
        load: Callable[[], Load],
        *,
        on_drain: Callable[[str], None] = lambda _: None,
        first_backoff_s: float = _FIRST_BACKOFF_S,
    ) -> None:
        self._settings = settings
        self._key = key
        self._load = load
        self._on_drain = on_drain
        self._first_backoff_s = first_backoff_s
        self._instance = pb.Instance(
            protocol=PROTOCOL,
            role=settings.role,
            url=settings.url,
            kv_address=settings.kv_address or "",
            bootstrap_url=settings.bootstrap_url or "",
            kv_events=settings.kv_events or "",
            start_id=secrets.token_bytes(16),
            facts=settings.facts,
        ).SerializeToString()
        self._leaving = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Self:
        self._tasks = [asyncio.create_task(self._stay(proxy)) for proxy in self._settings.proxies]
        return self

    async def __aexit__(self, *_exception: object) -> None:
        self._leaving.set()
        if self._tasks:
            _, late = await asyncio.wait(self._tasks, timeout=_LEAVE_S)
            for task in late:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _stay(self, proxy: str) -> None:
        """Be a member there until the instance leaves or is dismissed."""
        try:
            if not await self._until_ready():
                return
            backoff_s, said = self._first_backoff_s, ""
            while not self._leaving.is_set():
                began_s = time.monotonic()
                problem = await self._belong(proxy)
                if problem is None:
                    return
                if problem != said:
                    logger.warning("proxy %s: %s; trying again", proxy, problem)
                if time.monotonic() - began_s > _LAST_BACKOFF_S:  # that was a membership
                    backoff_s, problem = self._first_backoff_s, ""
                said = problem
                await self._wait(backoff_s * random.uniform(0.5, 1.0))  # noqa: S311 (so that not all come at once)
                backoff_s = min(2 * backoff_s, _LAST_BACKOFF_S)
        except Exception:
            logger.exception("proxy %s: the instance's agent has failed", proxy)

    async def _until_ready(self) -> bool:
        """Whether the instance listens now; False when it leaves first. Says once that it has waited for long."""
        url = self._settings.url
        address = urlsplit(url)
        give_word_s = time.monotonic() + _SAY_UNREADY_AFTER_S
        while not self._leaving.is_set():
            try:
                async with asyncio.timeout(_ANSWER_S):
                    _, writer = await asyncio.open_connection(address.hostname, address.port)
                writer.close()
                return True
            except (OSError, TimeoutError) as error:
                if time.monotonic() >= give_word_s:
                    give_word_s = float("inf")
                    why = str(error) or "no answer"
                    logger.warning("%s does not listen yet (%s), so proxies are not joined; waiting", url, why)
                await self._wait(_READY_INTERVAL_S)
        return False

    async def _belong(self, proxy: str) -> str | None:
        """One stream. Returns why it ended; None when the instance is not to come back."""
        try:
            async with grpc.aio.insecure_channel(proxy, options=_OPTIONS) as channel:
                call: Any = channel.stream_stream(f"/{SERVICE}/Join")()
                try:
                    session, interval_s = await self._join(call)
                    logger.info("proxy %s: joined", proxy)
                    return await self._attend(proxy, call, session, interval_s)
                finally:
                    call.cancel()
        except grpc.aio.AioRpcError as error:
            return f"{error.code().name}: {error.details()}"
        except (_StreamEndedError, asyncio.InvalidStateError, grpc.aio.UsageError):  # the last two: while we wrote
            return "the stream has ended"
        except NotGenuineError as error:
            return f"not our proxy: {error}"
        except DecodeError:
            return "not our proxy: no message of this protocol"
        except TimeoutError:
            return f"no answer in {_ANSWER_S:g} s"

    async def _join(self, call: Any) -> tuple[Session, float]:
        """The handshake; returns the session and how often to report, seconds."""
        nonce = new_nonce()
        async with asyncio.timeout(_ANSWER_S):
            await call.write(pb.FromInstance(hello=pb.Hello(nonce=nonce)).SerializeToString())
            challenge = (await _read(call)).challenge
            handshake = Handshake(self._key, nonce, challenge.nonce, self._instance)
            joining = pb.Joining(instance=self._instance, mac=handshake.join_mac())
            await call.write(pb.FromInstance(joining=joining).SerializeToString())
            welcome = (await _read(call)).welcome
        handshake.check_welcome(welcome.mac, welcome.report_interval_s)
        least_s, most_s = _INTERVAL_BOUNDS_S
        return handshake.session("instance"), min(max(welcome.report_interval_s, least_s), most_s)

    async def _attend(self, proxy: str, call: Any, session: Session, interval_s: float) -> str | None:
        obeying = asyncio.ensure_future(self._obey(proxy, call, session))
        reporting = asyncio.ensure_future(self._report(call, session, interval_s))
        try:
            await asyncio.wait((obeying, reporting), return_when=asyncio.FIRST_COMPLETED)
            if reporting.done() and not obeying.done():  # it has said that it leaves, or could not say any more
                reporting.result()
                await asyncio.wait((obeying,), timeout=_LEAVE_S)
                return None
            return obeying.result()
        finally:
            for task in (obeying, reporting):
                task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.gather(obeying, reporting, return_exceptions=True)

    async def _obey(self, proxy: str, call: Any, session: Session) -> str | None:
        while True:
            said = pb.ProxyMessage.FromString(session.open((await _read(call)).sealed))
            kind = said.WhichOneof("kind")
            if kind == "drain":
                logger.info("proxy %s: drains this instance", proxy)
                self._on_drain(proxy)
            elif kind == "dismiss":
                logger.warning("proxy %s: dismissed (%s); joins again at its next start", proxy, said.dismiss.reason)
                return None

    async def _report(self, call: Any, session: Session, interval_s: float) -> None:
        """Says the load every `interval_s` or, of a busy engine, sooner, when it has changed. Leaves at the end."""
        last, said_s = None, 0.0
        while not self._leaving.is_set():
            load = self._load()
            report = pb.LoadReport(
                num_running=load.num_running,
                num_waiting=load.num_waiting,
                kv_used_tokens=load.kv_used_tokens,
                kv_total_tokens=load.kv_total_tokens,
            )
            now_s = time.monotonic()
            if report != last or now_s - said_s >= 0.9 * interval_s:
                await _say(call, session, pb.InstanceMessage(load=report))
                last, said_s = report, now_s
            is_busy = report.num_running or report.num_waiting
            await self._wait(interval_s / _BUSY_REPORTS if is_busy else interval_s)
        await _say(call, session, pb.InstanceMessage(leave=pb.Leave()))
        await call.done_writing()

    async def _wait(self, timeout_s: float) -> None:
        """Sleep, unless the instance leaves."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._leaving.wait()


async def _read(call: Any) -> pb.ToInstance:
    """Raises AioRpcError or _StreamEndedError; DecodeError."""
    raw = await call.read()
    if raw is grpc.aio.EOF:
        raise _StreamEndedError
    message: pb.ToInstance = pb.ToInstance.FromString(raw)
    return message


async def _say(call: Any, session: Session, message: pb.InstanceMessage) -> None:
    await call.write(pb.FromInstance(sealed=session.seal(message.SerializeToString())).SerializeToString())

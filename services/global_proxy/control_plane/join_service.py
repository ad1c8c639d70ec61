"""The Join call: one stream from its first word to its last."""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterable, Callable
from typing import Final, Literal, NoReturn, Protocol

import grpc
from google.protobuf.message import DecodeError

from kv_transfer.auth import DeploymentKey
from services.global_proxy.control_plane import control_plane_pb2 as pb
from services.global_proxy.control_plane.attendance import Attendance, Joined
from services.global_proxy.control_plane.errors import NotGenuineError, RefusedError
from services.global_proxy.control_plane.handshake import Handshake, Session, new_nonce

logger = logging.getLogger(__name__)

Refusal = Literal["not_genuine", "refused", "too_many"]  # label of the counter

MAX_STRANGERS: Final = 64  # streams that have not proven the key yet
HANDSHAKE_S: Final = 5.0
_UNPROVEN: Final = "the deployment key was not proven"


class Context(Protocol):
    """What is used of grpc.aio.ServicerContext, which has no types."""

    async def read(self) -> object: ...
    async def write(self, message: bytes) -> None: ...
    async def abort(self, code: grpc.StatusCode, details: str) -> NoReturn: ...


class JoinService:
    """Args:
    report_interval_s: how often an instance is to be heard, at least.
    silent_s: without a word for so long, it is lost.
    on_refused: told of each stream that is refused, to count them.
    """

    def __init__(
        self,
        key: DeploymentKey,
        attendance: Attendance,
        *,
        report_interval_s: float,
        silent_s: float,
        on_refused: Callable[[Refusal], None],
    ) -> None:
        self._key = key
        self._attendance = attendance
        self._report_interval_s = report_interval_s
        self._silent_s = silent_s
        self._on_refused = on_refused
        self._num_strangers = 0
        self._num_dropped = 0

    async def join(self, _requests: AsyncIterable[bytes], context: Context) -> None:
        """The handler, as grpc.aio calls it: messages as bytes, so that what cannot be read is ours to count."""
        if self._num_strangers >= MAX_STRANGERS:
            await self._refuse(context, "too_many", grpc.StatusCode.RESOURCE_EXHAUSTED, "too many at once; come again")
        try:
            joined, session = await self._admit(context)
        except (NotGenuineError, DecodeError, TimeoutError) as error:
            self._log_dropped(error)
            await self._refuse(context, "not_genuine", grpc.StatusCode.UNAUTHENTICATED, _UNPROVEN)
        except RefusedError as error:
            logger.warning("refused an instance: %s", error)
            await self._refuse(context, "refused", grpc.StatusCode.FAILED_PRECONDITION, str(error))
        await self._attend(joined, session, context)

    async def _admit(self, context: Context) -> tuple[Joined, Session]:
        """The handshake. Nothing that the instance says counts before its proof is checked.

        Raises:
            NotGenuineError, TimeoutError: it has not proven the key.
            RefusedError: it has, but cannot be a member.
        """
        self._num_strangers += 1
        try:
            async with asyncio.timeout(HANDSHAKE_S):
                hello = await _read(context) or pb.FromInstance()
                proxy_nonce = new_nonce()
                await _write(context, pb.ToInstance(challenge=pb.Challenge(nonce=proxy_nonce)))
                joining = (await _read(context) or pb.FromInstance()).joining
        finally:
            self._num_strangers -= 1
        handshake = Handshake(self._key, hello.hello.nonce, proxy_nonce, joining.instance)
        handshake.check_join(joining.mac)
        joined = self._attendance.join(joining.instance)
        try:
            interval_s = self._report_interval_s
            mac = handshake.welcome_mac(interval_s)
            async with asyncio.timeout(HANDSHAKE_S):
                await _write(context, pb.ToInstance(welcome=pb.Welcome(mac=mac, report_interval_s=interval_s)))
        except BaseException:
            self._attendance.ended(joined, was_silent=False)
            raise
        return joined, handshake.session("proxy")

    async def _attend(self, joined: Joined, session: Session, context: Context) -> None:
        """Until the instance leaves, is dismissed, or is not heard any more."""
        listening = asyncio.ensure_future(self._listen(joined, session, context))
        sending = asyncio.ensure_future(_send_all(joined, session, context))
        was_silent = False
        try:
            await asyncio.wait((listening, sending), return_when=asyncio.FIRST_COMPLETED)
            if listening.done():
                listening.result()
        except TimeoutError:
            was_silent = True
            await context.abort(grpc.StatusCode.DEADLINE_EXCEEDED, f"nothing heard for {self._silent_s:g} s")
        except (NotGenuineError, DecodeError) as error:
            self._log_dropped(error)
            await self._refuse(context, "not_genuine", grpc.StatusCode.UNAUTHENTICATED, _UNPROVEN)
        except RefusedError as error:
            await self._refuse(context, "refused", grpc.StatusCode.INVALID_ARGUMENT, str(error))
        finally:
            self._attendance.ended(joined, was_silent=was_silent)
            for task in (listening, sending):
                task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.gather(listening, sending, return_exceptions=True)

    async def _listen(self, joined: Joined, session: Session, context: Context) -> None:
        """Raises NotGenuineError, RefusedError, or TimeoutError after a silence. Returns at the stream's end."""
        while True:
            async with asyncio.timeout(self._silent_s):
                message = await _read(context)
            if message is None:
                return
            said = pb.InstanceMessage.FromString(session.open(message.sealed))
            kind = said.WhichOneof("kind")
            if kind == "load":
                self._attendance.report(joined, said.load)
            elif kind == "leave":
                self._attendance.leave(joined)
                return

    def _log_dropped(self, error: Exception) -> None:
        """The 1st, 2nd, 4th, 8th...: strangers shall not fill the log."""
        self._num_dropped += 1
        if self._num_dropped.bit_count() == 1:
            logger.warning("dropped a stream on the control plane, %d so far: %r", self._num_dropped, error)

    async def _refuse(self, context: Context, why: Refusal, code: grpc.StatusCode, message: str) -> NoReturn:
        self._on_refused(why)
        await context.abort(code, message)


async def _read(context: Context) -> pb.FromInstance | None:
    """None at the stream's end (grpc.aio.EOF). Raises DecodeError."""
    raw = await context.read()
    return pb.FromInstance.FromString(raw) if isinstance(raw, bytes) else None


async def _write(context: Context, message: pb.ToInstance) -> None:
    await context.write(message.SerializeToString())


async def _send_all(joined: Joined, session: Session, context: Context) -> None:
    while (message := await joined.outbox.get()) is not None:
        await _write(context, pb.ToInstance(sealed=session.seal(message.SerializeToString())))

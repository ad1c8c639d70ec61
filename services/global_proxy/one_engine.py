"""Requests that one engine answers alone: what it is, and what needs no KV."""

import asyncio
from functools import partial

from services.global_proxy.errors import DeadlineError, NoInstanceError, UpstreamError
from services.global_proxy.http.client_request import ClientRequest
from services.global_proxy.http.engine_connection import EngineAnswer
from services.global_proxy.http.reply import Reply
from services.global_proxy.instances.instance import Instance
from services.global_proxy.instances.leg import Leg
from services.global_proxy.members import Members
from services.global_proxy.request_body import parse_body

_TIMEOUT_S = 30.0  # an engine that hangs fails its health checks before, which breaks its requests off


class OneEngine:
    """Asks D, for it is D that answers completions; plain engines, then P, if there is no D."""

    def __init__(self, members: Members, max_n: int) -> None:
        self._members = members
        self._max_n = max_n

    async def serve(self, request: ClientRequest, reply: Reply, request_id: str) -> None:
        """Give the client an engine's own answer; the next one's if one fails.

        Args:
            request_id: ours, for the engines: two clients' own may be the same.

        Raises:
            InvalidRequestError: what it asks for.
            UpstreamError, NoInstanceError: the last engine's failure; there is none.
            DeadlineError: none has answered in time.
        """
        task = asyncio.current_task()
        assert task is not None, "a request has a task"
        reply.on_client_gone = partial(_cancel, task)
        body = parse_body(request.body, self._max_n).plain_json if request.method == "POST" else b""
        try:
            async with asyncio.timeout(_TIMEOUT_S):
                answer = await self._ask_one_after_the_other(request, _lines(request, request_id), body)
        except TimeoutError:
            raise DeadlineError(f"No instance answered in {_TIMEOUT_S:g} s") from None
        reply.whole(answer.head.status, answer.head.content_type, answer.body)

    async def _ask_one_after_the_other(self, request: ClientRequest, lines: bytes, body: bytes) -> EngineAnswer:
        """Raises UpstreamError: the last one's; NoInstanceError: there is none."""
        failure: UpstreamError | None = None
        try:
            for pool in (self._members.decode, self._members.mixed, self._members.prefill):
                for instance in sorted(pool.up(), key=_load):
                    try:
                        return await _ask(instance, request, lines, body)
                    except UpstreamError as error:
                        failure = error
            raise failure or NoInstanceError("No instance is up")
        finally:
            failure = None  # its traceback has this frame: together they would keep the body until garbage is collected


def _cancel(task: asyncio.Task[None]) -> None:
    task.cancel()


def _load(instance: Instance) -> int:
    return instance.num_requests


async def _ask(instance: Instance, request: ClientRequest, lines: bytes, body: bytes) -> EngineAnswer:
    leg = Leg(instance, 0)
    path = request.target.partition(b"?")[0]
    try:
        answer = await leg.send(instance.endpoint.request(request.method.encode(), path, lines, body))
    finally:
        leg.close()
    instance.succeeded()
    return answer


def _lines(request: ClientRequest, request_id: str) -> bytes:
    """The door has taken keys of ours away."""
    lines = b"x-request-id: %b\r\n" % request_id.encode()
    if request.body:
        lines += b"content-type: application/json\r\n"
    authorization = request.headers.get(b"authorization")
    return lines if authorization is None else lines + b"authorization: %b\r\n" % authorization

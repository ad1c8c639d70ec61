"""Keeps clients' own hand-off parameters out of an engine: what is not a router's is answered with 400.

vLLM gives `kv_transfer_params` to the connector as they come, from any client, on every route that generates. A request
that nobody should have sent ends here, before vLLM has seen it; the connector's own checks stay, as the last line.

Where they may stand in a body: at its top (completions, chat, batch chat, responses, Anthropic's messages, Cohere's
chat, /inference/v1/generate, SageMaker's /invocations); in `sampling_params.extra_args` (/inference/v1/generate), where
routers put them too; in `vllm_xargs`, which vLLM copies over the same dictionary and where they never belong.

Forms (audio) pass: there `vllm_xargs` holds numbers and texts alone, which the connector drops.
"""

import logging
from argparse import Namespace
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import msgspec
from prometheus_client import Counter

from kv_transfer.auth import DeploymentKey
from kv_transfer.connector.settings import load_deployment_key
from kv_transfer.errors import HandOffError
from kv_transfer.hand_off import check_params

logger = logging.getLogger(__name__)

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]
T = TypeVar("T")

MAX_BODY_BYTES = 64 << 20  # four times what our proxy takes from a client
MAX_PARAMS_BYTES = 8 << 20  # a hand-off of a million tokens, and their ids

# A body without any of these holds no hand-off parameters: their names, an escape that may stand for a letter of one,
# and a byte that UTF-8 JSON never has (vLLM reads UTF-16 and UTF-32 too).
_SIGNS = (b"kv_transfer", b"\\u00", b"\0")
_FORMS = (b"multipart/form-data", b"application/x-www-form-urlencoded")
_MEND = "; leave kv_transfer_params out: the proxy alone sets them, and unchanged from what a prefill engine returned"

_num_refused = Counter("omni_hand_offs_refused", "Requests answered with 400 for hand-off parameters of a client's own")


_NULL = msgspec.Raw(b"null")


class RefusedError(Exception):
    """The request goes no further."""

    def __init__(self, message: str, param: str | None = None, status: int = 400) -> None:
        super().__init__(message)
        self.param = param
        self.status = status


class _ExtraArgs(msgspec.Struct):
    kv_transfer_params: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET


class _SamplingParams(msgspec.Struct):
    extra_args: msgspec.Raw = _NULL


class _Body(msgspec.Struct):
    kv_transfer_params: msgspec.Raw = _NULL
    vllm_xargs: msgspec.Raw = _NULL
    sampling_params: msgspec.Raw = _NULL


@dataclass(frozen=True, kw_only=True)
class Rules:
    """What one engine takes."""

    key: DeploymentKey
    is_producer: bool
    is_consumer: bool

    def check(self, raw: bytes) -> None:
        """Raises RefusedError."""
        if not any(sign in raw for sign in _SIGNS):
            return
        try:
            body = _object(raw, _Body)
            in_xargs = _object(body.vllm_xargs, _ExtraArgs).kv_transfer_params
            extra_args = _object(body.sampling_params, _SamplingParams).extra_args
            in_extra_args = _object(extra_args, _ExtraArgs).kv_transfer_params
        except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
            raise RefusedError(f"The request body is not valid JSON: {error}") from None
        if in_xargs is not msgspec.UNSET:
            raise RefusedError(f"vllm_xargs holds kv_transfer_params, which do not belong there{_MEND}", "vllm_xargs")
        self._check_params(body.kv_transfer_params, "kv_transfer_params")
        if in_extra_args is not msgspec.UNSET:
            self._check_params(in_extra_args, "sampling_params.extra_args")

    def _check_params(self, raw: msgspec.Raw, param: str) -> None:
        size = len(memoryview(raw))
        if size > MAX_PARAMS_BYTES:
            raise RefusedError(f"kv_transfer_params have {size} bytes, more than {MAX_PARAMS_BYTES}{_MEND}", param)
        try:
            params = msgspec.json.decode(raw)
            check_params(params, self.key, is_producer=self.is_producer, is_consumer=self.is_consumer)
        except (HandOffError, msgspec.DecodeError, UnicodeError, RecursionError) as error:
            prefix = "" if isinstance(error, HandOffError) else "kv_transfer_params: "
            raise RefusedError(f"{prefix}{error}{_MEND}", param) from None


class HandOffGuard:
    """ASGI middleware: reads a POST's body, checks it, and hands it on as it came, in one piece."""

    def __init__(self, app: App, rules: Rules) -> None:
        self._app = app
        self._rules = rules

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST" or _is_form(scope["headers"]):
            await self._app(scope, receive, send)
            return
        try:
            body = await _read_body(receive)
            if body is None:  # the client has gone
                return
            self._rules.check(body)
        except RefusedError as error:
            _num_refused.inc()
            logger.warning("refused a request: %s", error)
            await _answer(error, send)
            return
        await self._app(scope, _replay(body, receive), send)


class InstalledGuard(HandOffGuard):
    """What vLLM makes of a `--middleware`: it gives it the app alone."""

    rules: ClassVar[Rules]

    def __init__(self, app: App) -> None:
        super().__init__(app, self.rules)


def install(args: Namespace) -> None:
    """Put a guard before the engine that these arguments of vLLM's api server ask for, if it has our connector.

    Raises:
        ValueError: the deployment key cannot be had; the message says why.
    """
    transfer = args.kv_transfer_config
    if transfer is None or transfer.kv_connector != "OmniConnector":
        return
    InstalledGuard.rules = Rules(
        key=load_deployment_key(transfer.kv_connector_extra_config),
        is_producer=transfer.is_kv_producer,
        is_consumer=transfer.is_kv_consumer,
    )
    args.middleware = [*args.middleware, f"{__name__}.{InstalledGuard.__name__}"]  # the last is the first to be asked


def _object(raw: bytes | msgspec.Raw, kind: type[T]) -> T:
    """A JSON object's fields; nothing for what is no object, which is vLLM's to refuse."""
    try:
        return msgspec.json.decode(raw, type=kind)
    except msgspec.ValidationError:
        return kind()


def _is_form(headers: Iterable[tuple[bytes, bytes]]) -> bool:
    content_type = next((value for name, value in headers if name == b"content-type"), b"")
    return content_type.partition(b";")[0].strip().lower() in _FORMS


async def _read_body(receive: Receive) -> bytes | None:
    """The whole body; None if the client went before its end. vLLM would buffer it too, without a limit."""
    chunks = []
    num_bytes = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        chunk = message.get("body", b"")
        num_bytes += len(chunk)
        if num_bytes > MAX_BODY_BYTES:
            raise RefusedError(f"The request body has more than {MAX_BODY_BYTES} bytes; send less", status=413)
        chunks.append(chunk)
        if not message.get("more_body", False):
            return chunks[0] if len(chunks) == 1 else b"".join(chunks)


def _replay(body: bytes, receive: Receive) -> Receive:
    """`receive` for the app: the body first, then what comes (a disconnect)."""
    pending: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return pending.pop() if pending else await receive()

    return replay


async def _answer(error: RefusedError, send: Send) -> None:
    """In OpenAI's shape, field for field as vLLM writes its own."""
    kind = "BadRequestError" if error.status == 400 else "RequestEntityTooLarge"
    body = msgspec.json.encode(
        {"error": {"message": str(error), "type": kind, "param": error.param, "code": error.status}}
    )
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    if error.status == 413:  # the rest of the body may still be on its way
        headers.append((b"connection", b"close"))
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})

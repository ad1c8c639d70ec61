"""The control plane's gRPC server: limits, the health service, start and stop.

grpc.aio rather than grpc's own threads: with 16 instances a sync server polls in 56 threads, this one in a few whatever
their number, and the registry's event loop is the one that handles the streams. Nothing runs while nothing is said.
"""

import logging
from collections.abc import Callable, Mapping
from typing import Final

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import aio as health

from kv_transfer.auth import DeploymentKey
from services.global_proxy.control_plane.attendance import Attendance
from services.global_proxy.control_plane.handshake import SERVICE
from services.global_proxy.control_plane.join_service import MAX_STRANGERS, JoinService, Refusal
from services.global_proxy.membership.registry import Registry

logger = logging.getLogger(__name__)

MAX_MESSAGE_BYTES: Final = 16 * 1024
MAX_CONNECTIONS: Final = 1024 + MAX_STRANGERS
_MAX_WATCHERS: Final = 16  # of the health service
_GRACE_S: Final = 0.5  # between the last word and the end of the streams

_OPTIONS: Final = (
    ("grpc.so_reuseport", 0),  # a second proxy on the port is to fail, not to share it
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_metadata_size", 8 * 1024),
    ("grpc.absolute_max_metadata_size", 16 * 1024),
    ("grpc.max_concurrent_streams", 8),  # of one connection
    ("grpc.max_allowed_incoming_connections", MAX_CONNECTIONS),
    ("grpc.server_handshake_timeout_ms", 5_000),
    ("grpc.max_connection_idle_ms", 30_000),  # without a stream
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 5_000),  # who pings more often is disconnected
)

Context = grpc.aio.ServicerContext[health_pb2.HealthCheckRequest, health_pb2.HealthCheckResponse]


class ControlPlane:
    """Instances join the registry through it.

    Make it in the registry's event loop, in a process that forks no more: grpc does not survive a fork.

    Args:
        facts: what every instance must agree in, as far as the proxy knows it (model, connector...).
        on_refused: told why a stream is refused, to count them.
        report_interval_s: how often an instance is to be heard, at least.
        silent_s: one that is not heard for so long is lost.
        rejoin_s: one whose stream broke is lost unless it is back by then.

    Raises:
        ValueError: a time is not above 0, or an instance could be lost between two of its reports.
    """

    def __init__(
        self,
        registry: Registry,
        key: DeploymentKey,
        *,
        facts: Mapping[str, str] | None = None,
        on_refused: Callable[[Refusal], None] = lambda _: None,
        report_interval_s: float = 1.0,
        silent_s: float = 5.0,
        rejoin_s: float = 2.0,
    ) -> None:
        for name, value in (("report_interval_s", report_interval_s), ("rejoin_s", rejoin_s)):
            if value <= 0:
                raise ValueError(f"{name}: must be more than 0 seconds, got {value}")
        if silent_s < 2 * report_interval_s:
            raise ValueError(f"silent_s: must be at least twice report_interval_s, {report_interval_s}, got {silent_s}")
        self._attendance = Attendance(registry, facts or {}, rejoin_s)
        self._join = JoinService(
            key, self._attendance, report_interval_s=report_interval_s, silent_s=silent_s, on_refused=on_refused
        )
        self._health = _Health()
        self._server: grpc.aio.Server | None = None

    @property
    def num_joined(self) -> int:
        """Instances whose agents are here, or were within the last `rejoin_s`."""
        return len(self._attendance)

    async def start(self, host: str, port: int = 0) -> int:
        """Listen; returns the port. Raises OSError: the address cannot be listened on."""
        server = grpc.aio.server(options=_OPTIONS, maximum_concurrent_rpcs=MAX_CONNECTIONS)
        handler: grpc.RpcMethodHandler[bytes, bytes] = grpc.stream_stream_rpc_method_handler(self._join.join)
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, {"Join": handler}),))
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        try:
            bound = server.add_insecure_port(f"[{host}]:{port}" if ":" in host else f"{host}:{port}")
        except RuntimeError as error:
            raise OSError(f"--control-port: {host}:{port} cannot be listened on ({error}): choose another") from None
        await server.start()
        await self._health.set(SERVICE, health_pb2.HealthCheckResponse.SERVING)
        self._server = server
        logger.info("instances join at %s:%d", host, bound)
        return int(bound)

    async def stop(self) -> None:
        """End all streams and remove nobody: the agents try until this proxy, or the next one there, is back."""
        self._attendance.close()
        if self._server is not None:
            await self._health.enter_graceful_shutdown()
            await self._server.stop(_GRACE_S)
            self._server = None


class _Health(health.HealthServicer):
    """The standard service. As it ships, each Watch of a name that does not exist would be remembered for ever."""

    def __init__(self) -> None:
        super().__init__()
        self._num_watchers = 0

    async def Watch(self, request: health_pb2.HealthCheckRequest, context: Context) -> None:  # noqa: N802
        if self._num_watchers >= _MAX_WATCHERS:
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "too many watchers")
        if request.service not in ("", SERVICE):
            await context.abort(grpc.StatusCode.NOT_FOUND, "no such service")
        self._num_watchers += 1
        try:
            await super().Watch(request, context)
        finally:
            self._num_watchers -= 1

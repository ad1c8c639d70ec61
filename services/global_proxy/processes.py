"""The proxy's processes: one that does everything, or a parent with the registry and N workers."""

import asyncio
import signal
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

from kv_transfer.auth import DeploymentKey, load_or_make_key
from services.global_proxy.control_plane.server import ControlPlane
from services.global_proxy.membership.load_table import LoadTable
from services.global_proxy.membership.member import ROLES, InstanceSpec
from services.global_proxy.membership.registry import Registry
from services.global_proxy.membership.registry_client import ChannelClient, DirectClient, RegistryClient
from services.global_proxy.membership.worker_seat import WorkerSeat
from services.global_proxy.membership.workers import Workers
from services.global_proxy.observing.cells import Cells
from services.global_proxy.observing.metrics import Metrics
from services.global_proxy.policies.registry import policy_names
from services.global_proxy.proxy import Proxy
from services.global_proxy.security.tls import server_context
from services.global_proxy.server import ProxyServer
from services.global_proxy.settings import Settings

_STOP_S = 5.0  # for workers to end, beyond the drain


async def run_alone(settings: Settings, host: str, sock: socket.socket) -> None:
    """Everything in this process, until SIGTERM or SIGINT; then drain.

    Raises:
        ValueError: a file that the settings name is unusable.
        OSError: the control port cannot be listened on.
    """
    stopping = _stop_signal()
    key = deployment_key(settings)
    table, cells = LoadTable.create(), Cells(2)
    registry = make_registry(settings, table)
    async with AsyncExitStack() as stack:
        metrics = Metrics(cells, settings.num_workers, table.num_slots)  # the row after the workers'
        await _open_control_plane(settings, host, key, registry, metrics, stack)
        await stack.enter_async_context(_serving(settings, key, table, DirectClient(registry), sock, cells))
        await stopping.wait()


async def run_parent(settings: Settings, host: str, sock: socket.socket, command: list[str]) -> None:
    """The registry, and workers, each a process of `command`, until SIGTERM or SIGINT; then drain.

    Raises:
        ValueError, OSError: as `run_alone`.
        WorkerStartError: a worker could not begin to serve.
    """
    stopping = _stop_signal()
    key = deployment_key(settings)
    table, cells = LoadTable.create(settings.num_workers), Cells(settings.num_workers + 1)
    registry = make_registry(settings, table)
    async with AsyncExitStack() as stack:
        metrics = Metrics(cells, settings.num_workers, table.num_slots)  # the row after the workers'
        await _open_control_plane(settings, host, key, registry, metrics, stack)
        workers = Workers(command, sock, table, registry, shared_fds=(cells.fd,))
        await workers.run(stopping, settings.drain_timeout_s + _STOP_S)


async def run_worker(settings: Settings, seat: WorkerSeat) -> None:
    """One of the workers, until its parent tells it to stop, or is gone; then drain."""
    stopping = _stop_signal()
    cells = Cells(seat.table.num_workers + 1, seat.shared_fds[0])
    client = await ChannelClient.open(seat.channel_end)
    try:
        key = deployment_key(settings)
        async with _serving(settings, key, seat.table, client, seat.listener, cells, seat.index):
            await client.ready()
            ends = [asyncio.create_task(stopping.wait()), asyncio.create_task(client.wait_closed())]
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            for end in ends:
                end.cancel()
    finally:
        await client.close()


def deployment_key(settings: Settings) -> DeploymentKey:
    """With any connector there is one: the admin API and the control plane need it.

    Raises:
        ValueError: the file is unusable, or cannot be made.
    """
    return load_or_make_key(settings.key_file)


def make_registry(settings: Settings, table: LoadTable) -> Registry:
    """With the instances that the settings name."""
    names = {role: policy_names(role) for role in ROLES}

    def check(spec: InstanceSpec) -> None:
        """Raises ValueError: this way of handing off cannot use it."""
        if spec.role == "prefill" and settings.mode == "layerwise" and spec.kv_address is None:
            raise ValueError(
                f"kv_address: {spec.name} has none; layer by layer, D must know where to ask: give HOST:PORT"
            )
        if spec.role == "prefill" and settings.connector == "mooncake" and spec.bootstrap_url is None:
            raise ValueError(f"bootstrap_url: {spec.name} has none; Mooncake needs it: give http://HOST:PORT")

    registry = Registry(
        table, names, settings.prefill_policy, settings.decode_policy, check, mixed_policy=settings.mixed_policy
    )
    for spec in settings.specs():
        registry.add(spec, "file")
    return registry


@asynccontextmanager
async def _serving(
    settings: Settings,
    key: DeploymentKey,
    table: LoadTable,
    client: RegistryClient,
    sock: socket.socket,
    cells: Cells,
    worker: int = 0,
) -> AsyncIterator[None]:
    """A proxy that listens."""
    tls = None
    if settings.tls_certificate_file is not None and settings.tls_key_file is not None:
        tls = server_context(settings.tls_certificate_file, settings.tls_key_file)
    count = table.writer(worker).add_connections
    async with (
        Proxy(settings, key, table, client, cells, worker) as proxy,
        ProxyServer(proxy, sock, tls, lambda: table.is_ahead(worker), count),
    ):
        yield


async def _open_control_plane(
    settings: Settings, host: str, key: DeploymentKey, registry: Registry, metrics: Metrics, stack: AsyncExitStack
) -> None:
    if settings.control_port is None:
        return
    control = ControlPlane(
        registry,
        key,
        facts={"connector": settings.connector, "mode": settings.mode},
        on_refused=lambda why: metrics.joins_refused.labels(why).inc(),
    )
    await control.start(host, settings.control_port)
    stack.push_async_callback(control.stop)


def _stop_signal() -> asyncio.Event:
    """Set by SIGTERM and SIGINT."""
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopping.set)
    return stopping


def worker_command(arguments: list[str]) -> list[str]:
    return [sys.executable, "-m", "services.global_proxy", *arguments]

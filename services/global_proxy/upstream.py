"""The engines: which there are, which answer, and one HTTP leg to one of them."""

import asyncio
import io
import logging
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Literal

import aiohttp
from yarl import URL

from services.global_proxy.errors import DiedError, UnreachableError, UpstreamError
from services.global_proxy.metrics import Metrics
from services.global_proxy.policy import Policy

logger = logging.getLogger(__name__)

Role = Literal["prefill", "decode"]

_AVOID_S = 2.0  # how long an instance is passed over after a failed connection
_KEEPALIVE_S = 3.0  # vLLM closes idle connections after 5 s: let go first, or a request meets a closing socket
_LARGE_BODY_BYTES = 1024 * 1024  # aiohttp writes larger bodies in pieces, from a file object


class Instance:
    """One engine's api server."""

    def __init__(self, role: Role, url: str, metrics: Metrics) -> None:
        self.role = role
        self.url = URL(url)
        self.name = f"{self.url.host}:{self.url.port}"
        self.active = metrics.active_requests.labels(role, self.name)
        self.avoid_until_s = 0.0  # on the pool's clock


class Pool:
    """The instances of one role."""

    def __init__(
        self,
        role: Role,
        instances: Sequence[Instance],
        policy: Policy,
        now_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self.role = role
        self.instances = tuple(instances)
        self._policy = policy
        self._now_s = now_s

    def choose(self, tried: Instance | None = None) -> Instance | None:
        """The next instance other than `tried`: one that answers if there is one. None: no other instance."""
        others = [i for i in self.instances if i is not tried]
        up = [i for i in others if i.avoid_until_s <= self._now_s()]
        candidates = up or others
        return self._policy.choose(candidates) if candidates else None

    def avoid(self, instance: Instance) -> None:
        """Pass over an instance for a while."""
        instance.avoid_until_s = self._now_s() + _AVOID_S


class EngineClient:
    """HTTP to the engines, over pooled connections. Make it inside the event loop; close it."""

    def __init__(self, connect_timeout_s: float, metrics: Metrics) -> None:
        self._metrics = metrics
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=_KEEPALIVE_S),
            timeout=aiohttp.ClientTimeout(total=None, connect=connect_timeout_s),
            cookie_jar=aiohttp.DummyCookieJar(),
            skip_auto_headers=("Accept", "Accept-Encoding", "User-Agent"),
            auto_decompress=False,
        )

    async def close(self) -> None:
        await self._session.close()

    @asynccontextmanager
    async def post(
        self, pool: Pool, instance: Instance, path: str, body: bytes, headers: Mapping[str, str]
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """One leg. Leaving the block before the answer's end closes the connection, which aborts the request there.

        Raises:
            UnreachableError: no connection was made. The instance is then passed over for a while.
            DiedError: the connection broke, here or while the block was reading the answer.
        """
        data = io.BytesIO(body) if len(body) > _LARGE_BODY_BYTES else body
        instance.active.inc()
        try:
            async with self._session.post(
                instance.url.with_path(path), data=data, headers=headers, allow_redirects=False
            ) as response:
                yield response
        except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as error:
            pool.avoid(instance)
            raise self.failed(
                instance, UnreachableError(f"No connection to the {pool.role} instance"), error
            ) from error
        except aiohttp.ClientError as error:
            raise self.failed(instance, DiedError(f"The {pool.role} instance broke off the request"), error) from error
        finally:
            instance.active.dec()

    def failed(self, instance: Instance, error: UpstreamError, cause: Exception | None = None) -> UpstreamError:
        """Count and log a leg that failed."""
        self._metrics.upstream_failures.labels(instance.role, instance.name, error.reason).inc()
        logger.warning("%s %s %s: %s", instance.role, instance.name, error.reason, cause or error)
        return error

    async def get(
        self, url: URL, timeout_s: float, headers: Mapping[str, str] | None = None
    ) -> tuple[int, str, bytes] | None:
        """A small answer as (status, content type, body); None when there is none in time."""
        try:
            async with (
                asyncio.timeout(timeout_s),
                self._session.get(url, headers=headers, allow_redirects=False) as response,
            ):
                return response.status, response.headers.get("Content-Type", ""), await response.read()
        except (aiohttp.ClientError, TimeoutError):
            return None

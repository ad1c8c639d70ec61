"""Whether requests can be served: at least one instance of each role answers its own /health."""

import asyncio
import time

from services.global_proxy.upstream import EngineClient, Instance, Pool

_ASK_TIMEOUT_S = 1.0
_REMEMBER_S = 1.0


class HealthCheck:
    """Asks every instance when somebody asks, at most once a second, and never two at a time."""

    def __init__(self, pools: tuple[Pool, ...], client: EngineClient) -> None:
        self._pools = pools
        self._client = client
        self._asking = asyncio.Lock()
        self._missing: list[str] = []
        self._asked_s = -_REMEMBER_S  # on the monotonic clock

    async def missing_roles(self) -> list[str]:
        """The roles of which no instance answers with 200."""
        async with self._asking:
            if time.monotonic() - self._asked_s >= _REMEMBER_S:
                healthy = await asyncio.gather(*(self._any_healthy(pool) for pool in self._pools))
                self._missing = [pool.role for pool, up in zip(self._pools, healthy, strict=True) if not up]
                self._asked_s = time.monotonic()
            return self._missing

    async def _any_healthy(self, pool: Pool) -> bool:
        return any(await asyncio.gather(*(self._is_healthy(instance) for instance in pool.instances)))

    async def _is_healthy(self, instance: Instance) -> bool:
        answer = await self._client.get(instance.url.with_path("/health"), _ASK_TIMEOUT_S)
        return answer is not None and answer[0] == 200

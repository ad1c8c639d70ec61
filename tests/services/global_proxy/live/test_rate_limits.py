"""A key's rate is the same however many workers there are, and whichever of them its holder is connected to."""

import asyncio
import os
import signal

from services.global_proxy.admission.rate_limit import RateLimits
from services.global_proxy.security.api_keys import new_key
from tests.services.global_proxy.faults.processes import until
from tests.services.global_proxy.live.conftest import Client, Stage

REQUESTS_PER_MINUTE = 12  # one every 5 s


async def test_one_rate_over_two_workers(stage: Stage) -> None:
    """All of it on one connection; then nothing on another, nor after a worker has been killed."""
    key, entry = new_key("alice", RateLimits(requests_per_minute=REQUESTS_PER_MINUTE))
    keys_file = stage.folder / "keys"
    keys_file.write_text(entry.line() + "\n")
    keys_file.chmod(0o600)
    prefill, decode = await stage.engines(1, 1)
    proxy = await stage.proxy(prefill + decode, "--workers", "2", "--api-keys", str(keys_file))
    victim, other = proxy.workers()
    first, second = await proxy.client_of(victim), await proxy.client_of(other)
    began_s = asyncio.get_running_loop().time()
    num_let_in = 0
    while num_let_in < 2 * REQUESTS_PER_MINUTE and await complete(first, key) == 200:
        num_let_in += 1
    assert num_let_in - refilled(began_s) <= REQUESTS_PER_MINUTE <= num_let_in

    os.kill(victim, signal.SIGKILL)
    await until(lambda: len({*proxy.workers()} - {victim}) == 2, "it has a successor")
    successor = next(worker for worker in proxy.workers() if worker not in (victim, other))
    anew = await proxy.client_of(successor)
    for client in (second, anew) * REQUESTS_PER_MINUTE:
        num_let_in += await complete(client, key) == 200
    assert num_let_in <= REQUESTS_PER_MINUTE + refilled(began_s)


def refilled(began_s: float) -> int:
    """As many as have become free since then, however slow this machine is."""
    return int((asyncio.get_running_loop().time() - began_s) * REQUESTS_PER_MINUTE / 60)


async def complete(client: Client, key: str) -> int:
    body = {"prompt": "a", "max_tokens": 1}
    headers = {"Authorization": f"Bearer {key}"}
    async with client.session.post(client.url + "/v1/completions", json=body, headers=headers) as answer:
        await answer.read()
        assert answer.status in (200, 429)
        return answer.status

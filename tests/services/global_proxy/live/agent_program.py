"""An instance's agent, in a process of its own: ROLE URL KEY_FILE CONTROL_ADDRESS...; leaves on SIGTERM.

The load that it reports is always the same.
"""

import asyncio
import signal
import sys
from dataclasses import dataclass
from pathlib import Path

from kv_transfer.auth import load_key
from omni.process import obey_parent
from services.instance_agent import AgentSettings, InstanceAgent


@dataclass(frozen=True)
class Load:
    num_running: int = 3
    num_waiting: int = 1
    kv_used_tokens: int = 700
    kv_total_tokens: int = 10_000


async def run(role: str, url: str, key_file: str, proxies: tuple[str, ...]) -> None:
    leaving = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, leaving.set)
    settings = AgentSettings(proxies=proxies, role=role, url=url, facts={"model": "m", "connector": "nixl"})
    async with InstanceAgent(settings, load_key(Path(key_file)), Load):
        await leaving.wait()


if __name__ == "__main__":
    obey_parent()
    role, url, key_file, *proxies = sys.argv[1:]
    asyncio.run(run(role, url, key_file, tuple(proxies)))

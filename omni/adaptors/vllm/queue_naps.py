"""vLLM's processes sleep while they wait for one another, where a core that waits is a core that does not compute.

EngineCore and workers exchange messages through a queue in shared memory. Whoever waits for one polls it, with
`sched_yield` between two looks, until there has been none for a second: while tokens are generated, never. On a CPU
these are the cores that compute; and Linux 6.18 may keep a core from every other process for tens of seconds while such
a loop runs, the proxy and the kernel's own threads included (`make bench-waits`; docs/performance.md has the figures).

vLLM has no setting for it; its pull requests 52814 and 52848 would add one.
"""

import time
from typing import Any

NAP_S = 20e-6  # the kernel adds some 50 µs of its own


def take_naps() -> None:
    """From now on, sleep between two looks into a queue, in this process and those forked from it.

    Raises:
        RuntimeError: this vLLM release waits in another way.
    """
    from vllm.distributed.device_communicators import shm_broadcast

    module: Any = shm_broadcast
    if not hasattr(module, "sched_yield"):
        raise RuntimeError(f"{module.__name__}.sched_yield is gone: this vLLM release waits for messages in another way")
    module.sched_yield = _nap


def _nap() -> None:
    time.sleep(NAP_S)

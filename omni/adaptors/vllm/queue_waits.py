"""vLLM's processes sleep while they wait for one another, where a core that waits is a core that does not compute.

EngineCore and workers exchange messages through a queue in shared memory. Who waits for one polls it, with
`sched_yield` between two looks, until there has been none for a second: while tokens are generated, without an end. On
a CPU these are the cores that compute; and while such a loop runs, Linux 6.18 can keep a core from every other process
for tens of seconds, the proxy and the kernel's own threads included (`make bench-waits`; docs/performance.md).

Here a reader takes naps for some milliseconds, as most messages come soon. Then it sleeps until it is notified over
zmq, as vLLM's do after that second. Of two notifications close together one can be lost: vLLM looks by itself after
5 s; here, in the first second, after 1 ms.

vLLM has no setting for it; its pull request 52814 would add one.
"""

import time
from typing import Any

NAP_S = 20e-6  # the kernel adds some 50 µs of its own
NAPS_FOR_S = 4e-3
RECHECK_MS = 1


def sleep_at_once() -> None:
    """Have the readers of vLLM's queues sleep, in this process and those forked from it.

    Raises:
        RuntimeError: this vLLM release waits in another way.
    """
    from vllm.distributed.device_communicators import shm_broadcast

    module: Any = shm_broadcast
    condition: Any = getattr(module, "SpinCondition", None)
    if condition is None or "busy_loop_s" not in condition.__init__.__annotations__:
        raise RuntimeError(
            f"{module.__name__}.SpinCondition is not what it was: this vLLM release waits in another way"
        )

    class SleepCondition(condition):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self._recheck_for_s: float = self.busy_loop_s
            self.busy_loop_s: float = 0  # the base class's wait sleeps until notified
            self._waits_since: tuple[float, float] | None = None  # the last read, and when the wait after it began

        def wait(self, timeout_ms: int | None = None) -> None:
            now = time.monotonic()
            if self._waits_since is None or self._waits_since[0] != self.last_read:
                self._waits_since = self.last_read, now
            if now <= self._waits_since[1] + NAPS_FOR_S:
                time.sleep(NAP_S)
            else:
                super().wait(RECHECK_MS if now <= self.last_read + self._recheck_for_s else timeout_ms)

    module.SpinCondition = SleepCondition

"""Waking an idle engine from another thread."""

import gc
import logging
from collections.abc import Callable

logger = logging.getLogger(__name__)


def find_wake_up() -> Callable[[], None]:
    """How to make this process's idle engine look for work.

    vLLM gives connectors no way to do so. Its engine sleeps on a queue and treats a WAKEUP in it as "look again" (that
    is how it shuts down), so the engine object is looked up, once, among those that exist.
    """
    from vllm.v1.engine import EngineCoreRequestType
    from vllm.v1.engine.core import EngineCoreProc

    # type(), as isinstance() asks each object for its __class__, which runs code of lazy modules and proxies.
    engine = next((o for o in gc.get_objects() if issubclass(type(o), EngineCoreProc)), None)
    if engine is None:
        logger.warning("no EngineCore in this process: an idle engine gives leased KV blocks back at its next request")
        return _nothing
    input_queue = engine.input_queue
    return lambda: input_queue.put_nowait((EngineCoreRequestType.WAKEUP, None))


def _nothing() -> None:
    pass

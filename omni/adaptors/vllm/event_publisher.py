"""vLLM's KV events, published at the address that was given, and to the deployment alone.

Of itself vLLM (0.32) publishes on all of the host's addresses or, told a single one, connects to it; and it lets
anyone listen. Here it binds to what it is told, and both its sockets (events, replays) take no connection but under
the deployment key (kv_transfer/event_keys.py).
"""

from argparse import Namespace
from typing import Any

from kv_transfer import event_keys
from kv_transfer.connector.settings import load_deployment_key


def install(args: Namespace) -> None:
    """Have this process, and those forked from it, publish so, if they are to publish at all.

    Raises:
        ValueError: the deployment key cannot be had; the message has the mend.
        RuntimeError: this vLLM release publishes in another way.
    """
    events, transfer = args.kv_events_config, args.kv_transfer_config
    if events is None or not events.enable_kv_cache_events:
        return
    from vllm.distributed import kv_events

    publisher: Any = kv_events.ZmqEventPublisher
    if not (hasattr(publisher, "_bind") and hasattr(publisher, "_is_bind_endpoint")):
        raise RuntimeError("ZmqEventPublisher is not what it was: this vLLM release publishes KV events in another way")
    secret = event_keys.secret_key(load_deployment_key(transfer.kv_connector_extra_config if transfer else {}))

    def bind(socket: Any, endpoint: str) -> str:
        socket.curve_server = True
        socket.curve_secretkey = secret
        socket.bind(endpoint)
        return endpoint

    publisher._bind = staticmethod(bind)
    publisher._is_bind_endpoint = staticmethod(lambda endpoint: True)

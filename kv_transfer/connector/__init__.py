"""What runs inside vLLM's processes. vLLM looks for `OmniConnector` here, by name."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kv_transfer.connector.omni_connector import OmniConnector

__all__ = ["OmniConnector"]


def __getattr__(name: str) -> Any:
    """Not before it is asked for: its import is that of vLLM, and others only need the settings."""
    if name == "OmniConnector":
        from kv_transfer.connector.omni_connector import OmniConnector

        return OmniConnector
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

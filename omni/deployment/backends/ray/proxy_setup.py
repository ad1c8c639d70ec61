"""The planned proxy's command line → the one for a Ray node, where instances come by joining."""

from collections.abc import Sequence
from pathlib import Path
from typing import Final

from omni.deployment.backends.ray.placement import PROXY, namespace
from omni.deployment.backends.ray.setup import ProxySetup
from omni.deployment.errors import ConfigError, Problem
from omni.deployment.model import Proxy
from omni.deployment.plan_types import LaunchPlan

# Of the engines that the plan knows, at addresses that Ray does not keep to.
_OF_ENGINES: Final = {"--prefill", "--decode", "--mixed", "--kv-address", "--bootstrap", "--kv-events"}
_KEY: Final = "--key-file"  # on the node it lies where it is found without
_FILES: Final = {
    "--api-keys": "api_keys_file",
    "--tls-certificate": "tls_certificate_file",
    "--tls-key": "tls_key_file",
}


def proxy_setup(plan: LaunchPlan, key: str) -> ProxySetup:
    """Reads the files that the proxy is to have, for they may not be on its node.

    Raises:
        ConfigError: one of them cannot be read.
    """
    arguments: list[str] = []
    texts: list[str] = []
    parts = iter(plan.proxy.arguments)
    for part in parts:
        if part in _OF_ENGINES or part == _KEY:
            next(parts, None)
        elif part == "--host":
            arguments += [part, "0.0.0.0"]
            next(parts, None)
        elif part in _FILES:
            arguments += [part, f"{{{len(texts)}}}"]
            texts.append(_read(Path(next(parts)), _FILES[part]))
        else:
            arguments.append(part)
    return ProxySetup(
        namespace=namespace(plan.name),
        actor_name=PROXY,
        arguments=tuple(arguments),
        env=dict(plan.proxy.env),
        port=plan.proxy.port,
        is_tls=is_tls(plan.deployment.deployment.proxy),
        secret_files=tuple(texts),
        key=key,
    )


def is_tls(proxy: Proxy) -> bool:
    return proxy.tls_certificate_file is not None


def joined_proxies(plan: LaunchPlan, head_address: str) -> tuple[str, ...]:
    """HOST:PORT of each control plane that the engines join: the deployment's own proxy is on the head node."""
    others: Sequence[str] = plan.deployment.deployment.proxy.other_control_addresses
    return tuple(dict.fromkeys((f"{head_address}:{plan.proxy.control_port}", *others)))


def _read(path: Path, key: str) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        mend = "name a text file that you may read"
        raise ConfigError([Problem(f"deployment.proxy.{key}", f"{path}: {error}", mend)]) from None

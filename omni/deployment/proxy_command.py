"""The command line of the proxy, and where engines find its control plane."""

import sys
from collections.abc import Iterator, Sequence

from omni.deployment.engine_command import EngineCommand
from omni.deployment.errors import Problem
from omni.deployment.model import Deployment, KvTransfer, Proxy
from omni.deployment.plan_types import ProcessPlan
from omni.deployment.ports import control_port

_MAX_ACTIVE = "--max-active-per-decode"
_CONTROL_PORT = "--control-port"


def proxy_command(
    deployment: Deployment, engines: Sequence[ProcessPlan], commands: Sequence[EngineCommand]
) -> tuple[str, ...]:
    """argv. `engines` and their `commands` stand in the same order."""
    proxy = deployment.deployment.proxy
    command = [sys.executable, "-m", "services.global_proxy", "--host", proxy.host, "--port", str(proxy.listen_port)]
    for engine in engines:
        if not engine.is_headless:
            command += [f"--{engine.role}", engine.url]
    if (port := control_port(deployment)) is not None:
        command += [_CONTROL_PORT, str(port)]
    max_active = _max_active_per_decode(commands)
    if max_active is not None and not any(part.partition("=")[0] == _MAX_ACTIVE for part in proxy.extra_args):
        command += [_MAX_ACTIVE, str(max_active)]
    command += _kv_arguments(deployment.services.kv_transfer, engines)
    for engine in engines:
        if engine.event_address:
            command += ["--kv-events", engine.event_address]
    return (*command, *_options(proxy))


def proxy_problems(proxy: Proxy) -> Iterator[Problem]:
    """An extra argument that the engines would not know of: they join where the plan tells them."""
    for part in proxy.extra_args:
        flag = part.partition("=")[0]
        if len(flag) > 2 and _CONTROL_PORT.startswith(flag):  # argparse takes an abbreviation for the whole flag
            mend = "delete it and write deployment.proxy.control_port"
            yield Problem("deployment.proxy.extra_args", f"{part!r} is set by the plan", mend)


def control_addresses(deployment: Deployment) -> tuple[str, ...]:
    """Of each proxy that the engines join, as they reach it from here."""
    proxy, port = deployment.deployment.proxy, control_port(deployment)
    host = "127.0.0.1" if proxy.host == "0.0.0.0" else proxy.host
    own = () if port is None else (f"{host}:{port}",)
    return tuple(dict.fromkeys((*own, *proxy.other_control_addresses)))  # twice at one proxy, one would end the other


def _max_active_per_decode(commands: Sequence[EngineCommand]) -> int | None:
    """As many requests as a D, or a mixed engine, computes at once; None: vLLM chooses that by the device.

    The proxy's limit is for all D together, so where they differ their mean counts.
    """
    decode = [command.max_num_seqs for command in commands if command.group.role != "prefill"]
    known = [number for number in decode if number is not None]
    return sum(known) // len(known) if known and len(known) == len(decode) else None


def _options(proxy: Proxy) -> Iterator[str]:
    """What differs from the proxy's own defaults."""
    for option, value, default in (
        ("--workers", proxy.workers, 1),
        ("--prefill-policy", proxy.prefill_policy, None),
        ("--decode-policy", proxy.decode_policy, None),
        ("--mixed-policy", proxy.mixed_policy, None),
        ("--fallback", proxy.fallback, "none"),
        ("--api-keys", proxy.api_keys_file, None),
        ("--tls-certificate", proxy.tls_certificate_file, None),
        ("--tls-key", proxy.tls_key_file, None),
        ("--otlp-endpoint", proxy.otlp_endpoint, None),
    ):
        if value != default:
            yield from (option, str(value))
    yield from proxy.extra_args


def _kv_arguments(kv_transfer: KvTransfer, engines: Sequence[ProcessPlan]) -> Iterator[str]:
    """What the proxy needs to drive the engines' connector, where it is not the usual: addresses in the order of P."""
    addresses = [engine.kv_address for engine in engines if engine.role == "prefill" and engine.kv_address]
    if kv_transfer.connector != "omni":
        yield from ("--connector", kv_transfer.connector)
    if kv_transfer.key_file is not None:
        yield from ("--key-file", str(kv_transfer.key_file))
    if kv_transfer.connector == "mooncake":
        for address in addresses:
            yield from ("--bootstrap", f"http://{address}")
    if kv_transfer.mode == "layerwise":
        yield from ("--mode", "layerwise")
        for address in addresses:
            yield from ("--kv-address", address)

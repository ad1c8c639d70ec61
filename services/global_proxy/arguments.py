"""The proxy's command line: an option for each of the settings."""

import argparse
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args

from services.global_proxy.policies.registry import policy_names
from services.global_proxy.settings import Connector, Fallback, Mode, Settings

# Option, the setting that it gives, and what argparse is told of it.
_OPTIONS: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("--connector", "connector", {"choices": get_args(Connector), "help": "the engines' KV connector"}),
    ("--mode", "mode", {"choices": get_args(Mode), "help": "omni: layerwise has P and D work at once"}),
    ("--key-file", "key_file", {"type": Path, "help": "the deployment key, made if it is not there"}),
    ("--prefill-policy", "prefill_policy", {"choices": policy_names("prefill")}),
    ("--decode-policy", "decode_policy", {"choices": policy_names("decode")}),
    ("--mixed-policy", "mixed_policy", {"choices": policy_names("mixed")}),
    (
        "--min-prefill-tokens",
        "min_prefill_tokens",
        {"type": int, "help": "shorter prompts go to D alone; 0: none do; default: found from what was seen"},
    ),
    ("--fallback", "fallback", {"choices": get_args(Fallback), "help": "what to do while no P is up"}),
    ("--max-retries", "max_retries", {"type": int, "help": "of one request, with other instances"}),
    (
        "--max-active-per-decode",
        "max_active_per_decode",
        {"type": int, "help": "requests in flight for each D or mixed, its --max-num-seqs; others wait in the proxy"},
    ),
    ("--max-queued", "max_queued", {"type": int, "help": "requests that wait, in each worker; others get 503"}),
    ("--max-queue-s", "max_queue_s", {"type": float, "help": "how long they wait at most"}),
    ("--workers", "num_workers", {"type": int, "help": "processes behind the port"}),
    ("--control-port", "control_port", {"type": int, "help": "where instances join by gRPC; none by default"}),
    ("--api-keys", "api_keys_file", {"type": Path, "metavar": "FILE", "help": "only holders of these keys are served"}),
    ("--tls-certificate", "tls_certificate_file", {"type": Path, "metavar": "FILE", "help": "PEM"}),
    ("--tls-key", "tls_key_file", {"type": Path, "metavar": "FILE", "help": "PEM, without a passphrase"}),
    ("--otlp-endpoint", "otlp_endpoint", {"metavar": "URL", "help": "an OpenTelemetry collector: http://HOST:4318"}),
    ("--trace-sample-ratio", "trace_sample_ratio", {"type": float, "help": "of requests that come without a trace"}),
    (
        "--max-body-bytes-total",
        "max_body_bytes_total",
        {"type": int, "help": "of requests not yet answered, in each worker; others get 503"},
    ),
    ("--request-timeout-s", "request_timeout_s", {"type": float}),
    ("--connect-timeout-s", "connect_timeout_s", {"type": float}),
    ("--drain-timeout-s", "drain_timeout_s", {"type": float}),
    ("--health-interval-s", "health_interval_s", {"type": float, "help": "between two health checks"}),
    ("--health-timeout-s", "health_timeout_s", {"type": float, "help": "for one answer"}),
    ("--health-misses", "health_misses", {"type": int, "help": "so many in a row make an instance unhealthy"}),
)


def parse_arguments(arguments: Sequence[str]) -> tuple[str, int, Settings]:
    """Host, port and settings; exits with status 2 and a message when they are wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m services.global_proxy",
        description="One address for pools of prefill and decode engines, and of engines that do both.",
        formatter_class=_Formatter,
    )
    parser.add_argument("--host", default="127.0.0.1", help="to listen on")
    parser.add_argument("--port", type=int, default=8000, help="to listen on")
    for role in ("prefill", "decode"):
        parser.add_argument(f"--{role}", action="append", default=[], metavar="URL", help="may be repeated")
    parser.add_argument(
        "--mixed", action="append", default=[], metavar="URL", help="a plain engine, alone or beside these; repeatable"
    )
    parser.add_argument(
        "--kv-address",
        action="append",
        default=[],
        metavar="HOST:PORT",
        help="layerwise: where a --prefill is asked for KV; as many as these, in their order",
    )
    parser.add_argument(
        "--bootstrap",
        action="append",
        default=[],
        metavar="URL",
        help="mooncake: the bootstrap server of a --prefill; as many as these, in their order",
    )
    parser.add_argument(
        "--kv-events",
        action="append",
        default=[],
        metavar="HOST:PORT",
        help="where a --prefill publishes its KV events; as many as these, in their order, then those of --mixed",
    )
    parser.add_argument(
        "--no-continued-streams", dest="continue_streams", action="store_false", help="end with their D"
    )
    defaults = {field.name: field.default for field in fields(Settings)}
    for option, name, kind in _OPTIONS:
        default = Settings.default_key_file() if name == "key_file" else defaults[name]
        parser.add_argument(option, dest=name, default=default, **kind)
    options = vars(parser.parse_args(arguments))
    host, port = options.pop("host"), options.pop("port")
    urls: dict[str, Any] = {
        "prefill_urls": tuple(url.rstrip("/") for url in options.pop("prefill")),
        "decode_urls": tuple(url.rstrip("/") for url in options.pop("decode")),
        "mixed_urls": tuple(url.rstrip("/") for url in options.pop("mixed")),
        "bootstrap_urls": tuple(url.rstrip("/") for url in options.pop("bootstrap")),
        "kv_addresses": tuple(options.pop("kv_address")),
        "kv_events": tuple(options.pop("kv_events")),
    }
    try:
        return host, port, Settings(**urls, **options)
    except ValueError as error:
        parser.error(str(error))


class _Formatter(argparse.HelpFormatter):
    """Says the default of every option that has one."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        if action.default in (None, argparse.SUPPRESS, []) or isinstance(action.default, bool):
            return text
        return f"{text} (default: %(default)s)".strip()

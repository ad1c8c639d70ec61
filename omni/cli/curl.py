"""`omni_cli curl`: commands to paste, for the proxy of a running deployment."""

import json
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Final
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

import typer

from kv_transfer.auth import default_key_path, load_key
from omni.cli import running
from omni.cli.clear_errors import clear_errors
from omni.deployment.admin_client import _TOKEN_PURPOSE
from omni.deployment.errors import DeploymentError
from omni.deployment.proxy_access import ProxyAccess

_KEY_HEADER: Final = '-H "Authorization: Bearer $OMNI_API_KEY"'  # of the shell that it is pasted into
_TOKEN_HEADER: Final = '-H "Authorization: Bearer $OMNI_ADMIN_TOKEN"'  # noqa: S105 (a variable's name)
_JSON_HEADER: Final = "-H 'content-type: application/json'"


@clear_errors
def curl(
    name: Annotated[str | None, typer.Argument(help="deployment name; not needed while only one runs")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON: each command by its name")] = False,
    admin_token: Annotated[
        bool, typer.Option("--admin-token", help="print the admin API's token alone, which is a secret")
    ] = False,
) -> None:
    """Print ready-to-paste curl commands for a running deployment."""
    deployment = running.find(name)
    access = ProxyAccess.of(deployment)
    if admin_token:
        print(_token(access))
        return
    commands = curl_commands(access, deployment.served_model_name)
    if as_json:
        print(json.dumps(commands | {"admin token": token_command(deployment.name)}, indent=2))
        return
    for title, command in commands.items():
        print("\n".join((f"# {title}", *_notes(title, access, deployment.name), command, "")))


def curl_commands(access: ProxyAccess, model: str) -> dict[str, str]:
    """By what each asks for."""
    key = _KEY_HEADER if access.asks_for_keys else None
    completion = {"model": model, "prompt": "The capital of France is", "max_tokens": 16}
    message = {"role": "user", "content": "Why is the sky blue? Answer in two sentences."}
    chat = {"model": model, "messages": [message], "max_tokens": 64, "stream": True}
    return {
        "completion": _command(access, "/v1/completions", key, body=completion),
        "chat, as it is written": _command(access, "/v1/chat/completions", key, "-N", body=chat),
        "models": _command(access, "/v1/models", key),
        "health": _command(access, "/health", None, "-i"),
        "metrics": _command(access, "/metrics", None),
        "admin state": _command(access, "/admin/v1/state", _TOKEN_HEADER),
    }


def _command(
    access: ProxyAccess, path: str, header: str | None, *options: str, body: Mapping[str, Any] | None = None
) -> str:
    url = f"{access.url}{path}"
    first = " ".join(("curl -sS", *_connection(access), *options, shlex.quote(url)))
    lines = [first, *([header] if header else [])]
    if body is not None:
        lines += [_JSON_HEADER, f"-d {shlex.quote(json.dumps(body, ensure_ascii=False))}"]
    return " \\\n  ".join(lines)


def _connection(access: ProxyAccess) -> list[str]:
    options = []
    parts = urlsplit(access.url)
    if parts.scheme in getproxies() and not proxy_bypass(parts.hostname or ""):
        options.append("--noproxy '*'")  # this environment's HTTP proxy is not the way to ours
    if access.certificate_file is not None:
        options.append(f"--cacert {shlex.quote(str(access.certificate_file))}")
    return options


def token_command(name: str) -> str:
    """Prints the admin API's token, by the program that runs now."""
    program = sys.argv[0] if Path(sys.argv[0]).name == "omni_cli" else f"{sys.executable} -m omni.cli.main"
    return f"{program} curl {shlex.quote(name)} --admin-token"


def _notes(title: str, access: ProxyAccess, name: str) -> list[str]:
    """What has to be done first."""
    if title == "admin state":
        note = "# the token is made of the deployment key; who has it can add and remove engines"
        return [note, f"OMNI_ADMIN_TOKEN=$({token_command(name)})"]
    notes = []
    if title == "completion" and access.asks_for_keys:
        notes.append("# requests need one of the deployment's API keys: export OMNI_API_KEY=...")
    if title == "completion" and access.certificate_file is not None:
        notes.append("# where the certificate does not name this address, add --insecure")
    return notes


def _token(access: ProxyAccess) -> str:
    try:
        return load_key(access.key_file or default_key_path()).mac(_TOKEN_PURPOSE).hex()
    except ValueError as error:
        raise DeploymentError(str(error)) from None

"""`omni_cli status`: every process of a running deployment, and one completion as proof that it serves."""

import json
import threading
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any, Final

import typer
from rich.console import Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from omni.cli import running
from omni.cli.api_key import api_key
from omni.cli.clear_errors import clear_errors
from omni.cli.completion_proof import Completion, complete
from omni.cli.deployment_view import DeploymentView, ProcessView, Viewer
from omni.cli.plain_console import plain_console
from omni.deployment.errors import DeploymentError
from omni.deployment.proxy_access import ProxyAccess
from omni.deployment.run_state import DeploymentState

_COLUMNS: Final = ("process", "address", "state", "uptime", "pid", "restarts", "req.", "run", "wait", "KV used", "")
_NO_WRAP: Final = ("process", "address")
_COLOURS: Final = {"ready": "green", "starting": "yellow", "restarting": "yellow", "failed": "red", "stopped": "red"}

console = plain_console()

Name = Annotated[str | None, typer.Argument(help="deployment name; not needed while only one runs")]
Watch = Annotated[bool, typer.Option("--watch", help="go on until Ctrl-C")]
IntervalS = Annotated[float, typer.Option("--interval-s", min=0.1, max=3600, help="with --watch: between two looks")]
AsJson = Annotated[bool, typer.Option("--json", help="print JSON; with --watch a line at each look")]
WithCompletion = Annotated[
    bool | None,
    typer.Option("--completion/--no-completion", help="[default: where the deployment's proxy runs]"),
]
CompletionIntervalS = Annotated[
    float, typer.Option("--completion-interval-s", min=0.1, max=86400, help="with --watch: between two completions")
]
TimeoutS = Annotated[float, typer.Option("--timeout-s", min=0.1, max=3600, help="for the completion")]
ApiKeyFile = Annotated[
    Path | None, typer.Option("--api-key-file", help="has the API key for the completion; else $OMNI_API_KEY")
]


@clear_errors
def status(
    name: Name = None,
    watch: Watch = False,
    as_json: AsJson = False,
    interval_s: IntervalS = 2.0,
    completion: WithCompletion = None,
    completion_interval_s: CompletionIntervalS = 30.0,
    timeout_s: TimeoutS = 30.0,
    api_key_file: ApiKeyFile = None,
) -> None:
    """Show every process of a running deployment, its load, and one real completion through the proxy.

    Exit code 1 while a process is not ready, or when the completion fails. `--watch` ends with 0.
    """
    deployment = running.find(name)
    key = api_key(api_key_file)
    access, problem = _access(deployment)
    viewer = Viewer(deployment, access, problem)
    has_proxy = "proxy" in deployment.process_names  # else another host has it, and takes the proof
    proof = (
        _Proof(deployment, access, problem, key, timeout_s)
        if completion or (completion is None and has_proxy)
        else None
    )
    if watch:
        _watch(viewer, proof, interval_s, completion_interval_s, as_json)
        return
    proven = proof.take() if proof is not None else None
    view = viewer.look()
    if as_json:
        print(json.dumps(view.as_dict(proven), indent=2))
    else:
        console.print(_drawn(view, proven))
    if not view.is_ready or (proven is not None and proven.problem is not None):
        raise typer.Exit(1)


def _access(deployment: DeploymentState) -> tuple[ProxyAccess | None, str | None]:
    try:
        return ProxyAccess.of(deployment), None
    except (DeploymentError, OSError) as error:  # the states can be shown all the same
        return None, str(error)


class _Proof:
    """Completions: one now, or again and again in the background."""

    def __init__(
        self,
        deployment: DeploymentState,
        access: ProxyAccess | None,
        access_problem: str | None,
        key: str | None,
        timeout_s: float,
    ) -> None:
        self._model = deployment.served_model_name
        self._access = access
        self._access_problem = access_problem
        self._key = key
        self._timeout_s = timeout_s
        self._taking: threading.Thread | None = None
        self.last: Completion | None = None
        self.last_at_s = float("-inf")

    def take(self) -> Completion:
        if self._access is None:
            return Completion(problem=self._access_problem)
        try:
            tls = self._access.ssl_context()
        except OSError as error:
            return Completion(problem=f"the proxy's certificate {self._access.certificate_file}: {error}")
        return complete(
            self._access.url,
            self._model,
            timeout_s=self._timeout_s,
            key=self._key,
            asks_for_keys=self._access.asks_for_keys,
            tls=tls,
        )

    def begin(self) -> None:
        """Take one without waiting for it; not beside another."""
        if self._taking is None or not self._taking.is_alive():
            self._taking = threading.Thread(target=self._take_and_keep, daemon=True)  # Ctrl-C does not wait for it
            self._taking.start()

    def _take_and_keep(self) -> None:
        self.last = self.take()
        self.last_at_s = time.monotonic()


def _watch(
    viewer: Viewer, proof: _Proof | None, interval_s: float, completion_interval_s: float, as_json: bool
) -> None:
    with nullcontext() if as_json else Live(console=console, auto_refresh=False) as live:
        try:
            while True:
                if proof is not None and time.monotonic() - proof.last_at_s >= completion_interval_s:
                    proof.begin()
                view = viewer.look()
                last = proof.last if proof is not None else None
                if live is None:
                    print(json.dumps(view.as_dict(last)), flush=True)
                else:
                    live.update(_drawn(view, last, is_waiting=proof is not None), refresh=True)
                time.sleep(interval_s)
        except KeyboardInterrupt:
            return


# --- drawing


def _drawn(view: DeploymentView, completion: Completion | None, *, is_waiting: bool = False) -> RenderableType:
    """`is_waiting`: a completion is still to come."""
    deployment = view.deployment
    table = Table(title=f"{deployment.name}: {deployment.proxy_url} serves {deployment.served_model_name}")
    for column in _COLUMNS:
        table.add_column(column, no_wrap=column in _NO_WRAP)
    for process in view.processes:
        table.add_row(*_row(process, view))
    for instance in view.strangers:
        table.add_row(instance["role"], instance["name"], *["-"] * 4, *_load(instance), "not started by omni_cli here")
    parts: list[RenderableType] = [table]
    if view.proxy_problem is not None:
        parts.append(Text(f"load: {view.proxy_problem}", style="yellow"))
    if completion is not None:
        parts.append(_completion_line(completion))
    elif is_waiting:
        parts.append(Text("completion: is being taken"))
    return Group(*parts)


def _row(process: ProcessView, view: DeploymentView) -> list[str | Text]:
    state = process.state
    address = f"{process.host or '-'}:{process.port if process.port is not None else '-'}"
    load = _proxy_load(view) if process.role == "proxy" else _load(process.instance)
    return [
        state.name,
        address,
        Text(state.state, style=_COLOURS[state.state]),
        _duration(process.uptime_s),
        str(state.pid or "-"),
        str(state.restarts),
        *load,
        _note(process),
    ]


def _load(instance: Any) -> list[str]:
    """Requests of this proxy there; of all proxies: running, waiting; the part of its KV memory that is used."""
    if instance is None:
        return ["-"] * 4
    report = instance.get("report") or {}
    total = report.get("kv_total_tokens")
    kv_used = f"{report['kv_used_tokens'] / total:.0%}" if total else "-"
    return [str(instance["num_requests"]), *(str(report.get(n, "-")) for n in ("num_running", "num_waiting")), kv_used]


def _proxy_load(view: DeploymentView) -> list[str]:
    if view.proxy is None:
        return ["-"] * 4
    return [str(view.proxy.get("num_in_flight", "-")), "-", str(view.proxy.get("num_queued", "-")), "-"]


def _note(process: ProcessView) -> str:
    """What is not as it should be."""
    state = process.state
    notes = [state.message or (state.stage if state.state == "starting" else "")]
    if process.instance is not None and process.instance["state"] != "active":
        notes.append(f"the proxy: {process.instance['state']}")
    if process.instance is not None and not process.instance["is_up"]:
        notes.append("the proxy: down")
    return "; ".join(note for note in notes if note)


def _completion_line(completion: Completion) -> Text:
    if completion.problem is not None:
        return Text(f"completion: failed: {completion.problem}", style="red")
    path = f", {completion.path}" if completion.path else ""
    text = (
        f"completion: {completion.text!r} ({completion.num_tokens} tokens, TTFT {completion.ttft_ms:.0f} ms, "
        f"{completion.total_ms:.0f} ms in all{path})"
    )
    return Text(text, style="green")


def _duration(seconds: float | None) -> str:
    """75 → "1m15s"."""
    if seconds is None:
        return "-"
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    parts = [(days, "d"), (hours, "h"), (minutes, "m"), (seconds, "s")]
    first = next((index for index, (number, _) in enumerate(parts) if number), 3)
    return "".join(f"{number}{unit}" for number, unit in parts[first : first + 2])

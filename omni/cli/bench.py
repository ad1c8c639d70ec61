"""`omni_cli bench`: a load test against a running deployment, by vLLM's own benchmark."""

import json
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from enum import StrEnum
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Final

import typer
from rich.table import Table

from omni.cli import bench_plot, running
from omni.cli.api_key import api_key
from omni.cli.clear_errors import clear_errors
from omni.cli.deployment_view import engine_plans
from omni.cli.load_test import LATENCIES, PERCENTILES, Figures, Load, Slo, Target, check_vllm, run_at
from omni.cli.plain_console import plain_console
from omni.deployment.engines_file import Engines
from omni.deployment.errors import ConfigError, DeploymentError, Problem
from omni.deployment.proxy_access import ProxyAccess
from omni.deployment.run_state import DeploymentState

_RESULT: Final = "bench.json"
_PICTURE: Final = "bench.png"

console = plain_console()
notes = plain_console(stderr=True)


class Dataset(StrEnum):
    RANDOM = "random"
    SHAREGPT = "sharegpt"
    CUSTOM = "custom"


Name = Annotated[str | None, typer.Argument(help="deployment name; not needed while only one runs")]
Rates = Annotated[str, typer.Option("--rates", help="requests per second, one after another: 1,2,4; inf: all at once")]
NumRequests = Annotated[int, typer.Option("--num-requests", min=1, help="at each rate")]
NumWarmups = Annotated[int, typer.Option("--num-warmups", min=0, help="at each rate, before it; not counted")]
DatasetName = Annotated[Dataset, typer.Option("--dataset", help="random tokens, or a file of conversations or prompts")]
DatasetPath = Annotated[Path | None, typer.Option("--dataset-path", help="of sharegpt (JSON) or custom (JSON lines)")]
InputLen = Annotated[int, typer.Option("--input-len", min=1, help="tokens of each random prompt")]
OutputLen = Annotated[
    int | None,
    typer.Option("--output-len", min=1, help="tokens of each answer [default: 64, or as the data set has it]"),
]
MaxConcurrency = Annotated[int | None, typer.Option("--max-concurrency", min=1, help="most requests at a time")]
SloTtft = Annotated[float | None, typer.Option("--slo-ttft-ms", min=0, help="for goodput: a request's TTFT at most")]
SloTpot = Annotated[
    float | None, typer.Option("--slo-tpot-ms", min=0, help="for goodput: a request's mean TPOT at most")
]
Output = Annotated[
    Path | None, typer.Option("--output", help="folder for JSON, PNG and logs [default: bench-NAME-TIME]")
]
Seed = Annotated[int, typer.Option("--seed", min=0, help="of random prompts and arrivals; rates differ in theirs")]
Tokenizer = Annotated[
    Path | None, typer.Option("--tokenizer", help="a model's folder, where the deployment's is not here")
]
TimeoutS = Annotated[float, typer.Option("--timeout-s", min=1, help="for each rate")]
ApiKeyFile = Annotated[Path | None, typer.Option("--api-key-file", help="has the API key; else $OMNI_API_KEY")]
AsJson = Annotated[bool, typer.Option("--json", help="print JSON")]


@clear_errors
def bench(
    name: Name = None,
    rates: Rates = "1",
    num_requests: NumRequests = 50,
    num_warmups: NumWarmups = 2,
    dataset: DatasetName = Dataset.RANDOM,
    dataset_path: DatasetPath = None,
    input_len: InputLen = 512,
    output_len: OutputLen = None,
    max_concurrency: MaxConcurrency = None,
    slo_ttft_ms: SloTtft = None,
    slo_tpot_ms: SloTpot = None,
    output: Output = None,
    seed: Seed = 0,
    tokenizer: Tokenizer = None,
    timeout_s: TimeoutS = 3600.0,
    api_key_file: ApiKeyFile = None,
    as_json: AsJson = False,
) -> None:
    """Load a running deployment: TTFT, TPOT, ITL, throughput, and goodput under an SLO.

    vLLM's benchmark sends the requests. A table is printed; bench.json, bench.png and vLLM's own results go to a
    folder. Exit code 1 when a request has failed.
    """
    load = Load(
        num_requests=num_requests,
        num_warmups=num_warmups,
        dataset=dataset.value,
        dataset_path=dataset_path,
        input_len=input_len,
        output_len=64 if output_len is None and dataset is Dataset.RANDOM else output_len,
        max_concurrency=max_concurrency,
        seed=seed,
    )
    slo = Slo(ttft_ms=slo_ttft_ms, tpot_ms=slo_tpot_ms)
    wanted = parse_rates(rates)
    check_vllm()
    deployment = _ready(name)
    engines = engine_plans(deployment)
    _check_load(load, engines)
    target = _target(deployment, engines, tokenizer, api_key(api_key_file))
    folder = _folder(output, deployment)
    figures: list[Figures] = []
    for number, rate in enumerate(wanted):
        with notes.status(f"{rate} requests/s ({number + 1} of {len(wanted)})"):
            # Other prompts each time: else all rates but the first would find theirs in the prefix caches.
            figures.append(run_at(rate, target, replace(load, seed=seed + number), slo, folder, timeout_s))
        _write(deployment, load, slo, figures, folder)  # what is measured stays, whatever comes
    if bench_plot.can_draw():
        bench_plot.draw(f"{deployment.name}: {deployment.served_model_name}", figures, slo, folder / _PICTURE)
    if as_json:
        print((folder / _RESULT).read_text())
    else:
        console.print(table_of(figures))
    _say_where(folder)
    if any(one.num_failed for one in figures):
        raise typer.Exit(1)


def parse_rates(text: str) -> list[str]:
    """`"1, 2.50"` → `["1", "2.5"]`. Raises ConfigError."""
    rates: list[str] = []
    for word in text.split(","):
        try:
            rate = float(word)
        except ValueError:
            rate = math.nan
        if not rate > 0 or f"{rate:g}" in rates:
            mend = "write different numbers above 0, or inf, with commas between them: 1,2,4"
            raise ConfigError([Problem("--rates", f"{word.strip()!r} is none, or stands twice", mend)])
        rates.append(f"{rate:g}")
    return rates


def table_of(figures: Sequence[Figures]) -> Table:
    table = Table()
    for column in ("sent/s", "answered", "failed", "requests/s", "goodput/s", "tokens/s"):
        table.add_column(column, justify="right")
    for name in LATENCIES:
        table.add_column(f"{name.upper()} ms\n{'/'.join(f'p{number}' for number in PERCENTILES)}", justify="right")
    for one in figures:
        latencies = ("/".join(f"{value:.1f}" for value in one.latencies_ms[name].values()) for name in LATENCIES)
        table.add_row(
            one.rate,
            str(one.num_completed),
            str(one.num_failed),
            f"{one.requests_per_s:.2f}",
            "-" if one.goodput_per_s is None else f"{one.goodput_per_s:.2f}",
            f"{one.output_tokens_per_s:.1f}",
            *latencies,
        )
    return table


def _ready(name: str | None) -> DeploymentState:
    """Raises DeploymentError."""
    deployment = running.find(name)
    others = [f"{s.name} is {s.state}" for s in running.process_states(deployment) if s.state != "ready"]
    if others:
        raise DeploymentError(f"{deployment.name} is not ready: {', '.join(others)}; see `omni_cli status`")
    return deployment


def _check_load(load: Load, engines: Engines) -> None:
    """What would fail at each request. Raises ConfigError."""
    problems: list[Problem] = []
    if load.dataset == Dataset.RANDOM:
        if load.dataset_path is not None:
            problems.append(Problem("--dataset-path", "random prompts come from no file", "leave it out"))
        longest = min((n for engine in engines if (n := _max_model_len(engine.command))), default=None)
        if longest is not None and load.input_len + (load.output_len or 0) > longest:
            text = (
                f"{load.input_len} and --output-len {load.output_len} are more than the {longest} tokens of an engine"
            )
            problems.append(Problem("--input-len", text, "lower one of them"))
    elif load.dataset_path is None or not load.dataset_path.is_file():
        text = "is not given" if load.dataset_path is None else f"{load.dataset_path} is not there"
        problems.append(Problem("--dataset-path", text, f"name the file of the data set {load.dataset}"))
    if problems:
        raise ConfigError(problems)


def _max_model_len(command: Sequence[str]) -> int | None:
    text = _value(command, "--max-model-len")
    return int(text) if text is not None and text.isdecimal() else None


def _value(command: Sequence[str], flag: str) -> str | None:
    return next((value for name, value in pairwise(command) if name == flag), None)


def _target(deployment: DeploymentState, engines: Engines, tokenizer: Path | None, key: str | None) -> Target:
    """Raises DeploymentError."""
    access = ProxyAccess.of(deployment)
    if access.asks_for_keys and key is None:
        mend = "name a file with one, or set $OMNI_API_KEY"
        raise ConfigError([Problem("--api-key-file", f"{deployment.name} asks for API keys", mend)])
    model_path = next((value for engine in engines if (value := _value(engine.command, "--model"))), None)
    path = tokenizer or Path(model_path or "")
    if not path.is_dir() or not (tokenizer or model_path):
        text = f"{path} is no folder here" if tokenizer or model_path else "the deployment's model is not known here"
        raise ConfigError([Problem("--tokenizer", text, "name a folder with the model's tokenizer")])
    return Target(
        url=access.url,
        model=deployment.served_model_name,
        tokenizer=path,
        key=key,
        is_tls=access.certificate_file is not None,
    )


def _folder(wanted: Path | None, deployment: DeploymentState) -> Path:
    """Raises ConfigError: it has results already. Raises OSError."""
    folder = wanted or Path(f"bench-{deployment.name}-{time.strftime('%Y%m%d-%H%M%S')}")
    if (folder / _RESULT).exists():
        raise ConfigError([Problem("--output", f"{folder} has results already", "name another folder, or delete it")])
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _write(deployment: DeploymentState, load: Load, slo: Slo, figures: Sequence[Figures], folder: Path) -> None:
    content = {
        "deployment": deployment.name,
        "model": deployment.served_model_name,
        "proxy_url": deployment.proxy_url,
        "measured_at": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "process_names": deployment.process_names,
        "load": asdict(load),
        "slo": asdict(slo),
        "rates": [asdict(one) for one in figures],
    }
    temporary = folder / f".{_RESULT}"
    temporary.write_text(json.dumps(content, indent=2, default=str) + "\n")
    temporary.replace(folder / _RESULT)


def _say_where(folder: Path) -> None:
    drawn = (
        f"{_RESULT} and {_PICTURE}" if bench_plot.can_draw() else f"{_RESULT}; no picture: matplotlib is not installed"
    )
    notes.print(f"{folder}: {drawn}", markup=False, highlight=False, soft_wrap=True)

"""Load tests at several request rates by vLLM's own benchmark, each in a process of its own; what they measured."""

import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from omni.deployment.errors import DeploymentError
from omni.process import parent_environment

PERCENTILES: Final = (50, 90, 99)
LATENCIES: Final = ("ttft", "tpot", "itl")
_READY_TIMEOUT_S: Final = 60
_LAST_BYTES: Final = 3000
_MODULE: Final = "omni.adaptors.vllm.bench_serve"


@dataclass(frozen=True, kw_only=True)
class Load:
    """What is sent, at every rate.

    Attributes:
        dataset_path: of "sharegpt" and "custom".
        input_len, output_len: tokens of each request; output_len None: as the data set has them.
        max_concurrency: requests in flight; None: as many as the rate makes.
    """

    num_requests: int
    num_warmups: int
    dataset: str
    dataset_path: Path | None
    input_len: int
    output_len: int | None
    max_concurrency: int | None
    seed: int


@dataclass(frozen=True, kw_only=True)
class Slo:
    """What a request must keep to count for goodput, milliseconds; None: anything does."""

    ttft_ms: float | None = None
    tpot_ms: float | None = None

    @property
    def arguments(self) -> tuple[str, ...]:
        limits = {"ttft": self.ttft_ms, "tpot": self.tpot_ms}
        written = [f"{name}:{limit:g}" for name, limit in limits.items() if limit is not None]
        return ("--goodput", *written) if written else ()


@dataclass(frozen=True, kw_only=True)
class Target:
    """Whom to ask.

    Attributes:
        key: API key; None: none is needed.
        is_tls: its certificate is not looked at.
    """

    url: str
    model: str
    tokenizer: Path
    key: str | None
    is_tls: bool


@dataclass(frozen=True, kw_only=True)
class Figures:
    """One rate's. Latencies: metric → "p50" and so on → milliseconds."""

    rate: str  # requests/s that were sent; "inf": all at once
    num_completed: int
    num_failed: int
    duration_s: float
    requests_per_s: float
    output_tokens_per_s: float
    total_tokens_per_s: float
    goodput_per_s: float | None  # requests/s that kept the SLO; None: there is none
    latencies_ms: dict[str, dict[str, float]]

    @classmethod
    def read(cls, rate: str, path: Path) -> "Figures":
        """Raises DeploymentError: the file is not what vLLM's benchmark writes."""
        try:
            found: dict[str, Any] = json.loads(path.read_text())
            goodput = found.get("request_goodput")
            return cls(
                rate=rate,
                num_completed=int(found["completed"]),
                num_failed=int(found["failed"]),
                duration_s=float(found["duration"]),
                requests_per_s=float(found["request_throughput"]),
                output_tokens_per_s=float(found["output_throughput"]),
                total_tokens_per_s=float(found["total_token_throughput"]),
                goodput_per_s=None if goodput is None else float(goodput),
                latencies_ms={
                    name: {f"p{number}": float(found[f"p{number}_{name}_ms"]) for number in PERCENTILES}
                    for name in LATENCIES
                },
            )
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise DeploymentError(f"{path}: is no result of vLLM's benchmark: {error!r}") from None


def check_vllm() -> None:
    """Raises DeploymentError: it is not installed here."""
    if importlib.util.find_spec("vllm") is None:
        raise DeploymentError(
            "the load test is vLLM's, which is not installed here: install one of this package's extras cpu, npu and "
            "cuda, or run it on a host that has it"
        )


def run_at(rate: str, target: Target, load: Load, slo: Slo, folder: Path, timeout_s: float) -> Figures:
    """Send the load at this rate; vLLM's result and output stay in `folder`.

    Raises:
        DeploymentError: it did not end well, or not in time.
    """
    log_file, result = folder / f"rate-{rate}.log", folder / f"rate-{rate}.json"
    command = [sys.executable, "-m", _MODULE, *arguments(rate, target, load, slo, result)]
    try:
        with log_file.open("wb") as log:
            done = subprocess.run(
                command,
                env=_environment(target.key),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                timeout=timeout_s,
                check=False,
            )
    except subprocess.TimeoutExpired:
        raise DeploymentError(f"rate {rate}: not over after {timeout_s:g} s (--timeout-s); see {log_file}") from None
    if done.returncode != 0:
        end = log_file.read_text(errors="replace")[-_LAST_BYTES:]
        raise DeploymentError(f"rate {rate}: the benchmark exited with code {done.returncode}:\n{end}\nsee {log_file}")
    return Figures.read(rate, result)


def arguments(rate: str, target: Target, load: Load, slo: Slo, result: Path) -> list[str]:
    """What `vllm bench serve` is told."""
    options: dict[str, object] = {
        "--backend": "openai",
        "--base-url": target.url,
        "--endpoint": "/v1/completions",
        "--model": target.model,
        "--tokenizer": target.tokenizer,
        "--dataset-name": load.dataset,
        "--dataset-path": load.dataset_path,
        "--random-input-len": load.input_len if load.dataset == "random" else None,
        "--output-len": load.output_len,
        "--num-prompts": load.num_requests,
        "--num-warmups": load.num_warmups,
        "--request-rate": rate,
        "--max-concurrency": load.max_concurrency,
        "--seed": load.seed,
        "--temperature": 0,
        "--percentile-metrics": ",".join(LATENCIES),
        "--metric-percentiles": ",".join(map(str, PERCENTILES)),
        "--ready-check-timeout-sec": _READY_TIMEOUT_S,
        "--result-dir": result.parent,
        "--result-filename": result.name,
    }
    written = [word for name, value in options.items() if value is not None for word in (name, str(value))]
    return [*written, "--save-result", "--disable-tqdm", *(["--insecure"] if target.is_tls else []), *slo.arguments]


def _environment(key: str | None) -> dict[str, str]:
    """The key goes that way, for process lists show command lines; a key meant for others stays here."""
    inherited = {name: value for name, value in os.environ.items() if name != "OPENAI_API_KEY"}
    own = {} if key is None else {"OPENAI_API_KEY": key}
    return inherited | own | parent_environment() | {"NO_PROXY": "*", "no_proxy": "*"}

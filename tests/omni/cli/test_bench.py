"""`omni_cli bench`: what it refuses, what it tells vLLM's benchmark and reads from it, and that benchmark itself."""

import json
import struct
import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner, Result

from kv_transfer.auth import default_key_path, load_or_make_key
from omni.cli import bench, bench_plot, load_test
from omni.cli.load_test import Figures, Load, Slo, Target
from omni.deployment.embedded_model import ensure_embedded_model
from omni.deployment.engines_file import write_engines
from omni.deployment.errors import ConfigError, DeploymentError
from omni.deployment.run_state import RunFolder
from tests.omni.cli.launchers import all_ready, plan_of, running
from tests.omni.cli.standin_deployment import standing_in

LOAD = Load(
    num_requests=7,
    num_warmups=0,
    dataset="random",
    dataset_path=None,
    input_len=30,
    output_len=5,
    max_concurrency=None,
    seed=3,
)
RESULT: dict[str, Any] = {
    "completed": 6,
    "failed": 1,
    "duration": 2.5,
    "request_throughput": 2.4,
    "output_throughput": 12.0,
    "total_token_throughput": 84.0,
    "request_goodput": 1.2,
    **{f"p{number}_{name}_ms": number / 2 for number in (50, 90, 99) for name in ("ttft", "tpot", "itl")},
}

# Takes the benchmark's place: writes its arguments and the key, and the result of vLLM's.
PROGRAM = """
import json, os, pathlib, sys
options = dict(zip(sys.argv[1:], sys.argv[2:]))
path = pathlib.Path(options["--result-dir"]) / options["--result-filename"]
print("arguments", sys.argv[1:])
path.with_suffix(".seen").write_text(json.dumps([sys.argv[1:], os.environ.get("OPENAI_API_KEY")]))
path.write_text({result!r})
sys.exit({code})
"""


def omni_cli(*arguments: str) -> Result:
    app = typer.Typer()
    app.command("other")(lambda: None)
    app.command("bench")(bench.bench)
    return CliRunner().invoke(app, ["bench", *arguments])


@pytest.fixture
def benchmark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Has a program of the test be run instead of vLLM's."""

    def be(result: object = RESULT, code: int = 0) -> None:
        (tmp_path / "benchmark_standin.py").write_text(PROGRAM.format(result=json.dumps(result), code=code))
        monkeypatch.setattr(load_test, "_MODULE", "benchmark_standin")
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    be()
    return be


@pytest.fixture
def ready(tmp_path: Path) -> Any:
    """A deployment of which only the states are there."""
    plan = plan_of(tmp_path, proxy_port=1)
    with running(plan, states=all_ready(plan)) as deployment:
        write_engines(RunFolder.of(plan.name), plan.processes[:-1])
        load_or_make_key(default_key_path())
        yield deployment


@pytest.mark.usefixtures("ready")
def test_rates_table_and_files(benchmark: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "of somebody else")
    out = tmp_path / "out"
    arguments = ("--rates", "0.5, 4,inf", "--slo-ttft-ms", "800", "--output", str(out), "--tokenizer", str(tmp_path))
    done = omni_cli("trial", *arguments)
    assert done.exit_code == 1, done.output  # a request has failed at each rate
    for text in ("inf", "2.40", "1.20", "25.0/45.0/49.5", "goodput/s"):
        assert text in done.stdout
    result = json.loads((out / "bench.json").read_text())
    assert [one["rate"] for one in result["rates"]] == ["0.5", "4", "inf"]
    assert result["rates"][0]["latencies_ms"]["tpot"] == {"p50": 25.0, "p90": 45.0, "p99": 49.5}
    assert (result["slo"], result["load"]["num_requests"]) == ({"ttft_ms": 800.0, "tpot_ms": None}, 50)
    seeds = []
    for rate in ("0.5", "4", "inf"):
        seen, key = json.loads((out / f"rate-{rate}.seen").read_text())
        options = dict(pairwise(seen))
        assert (options["--request-rate"], options["--goodput"], key) == (rate, "ttft:800", None)
        assert (options["--base-url"], options["--model"]) == ("http://127.0.0.1:1", "smollm2")
        seeds.append(options["--seed"])
    assert seeds == ["0", "1", "2"]
    width, height = struct.unpack(">II", (out / "bench.png").read_bytes()[16:24])
    assert width > height > 400

    done = omni_cli(*arguments)
    assert (done.exit_code, "has results already; name another folder" in done.stderr) == (2, True)


@pytest.mark.usefixtures("ready")
def test_without_matplotlib(benchmark: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    benchmark(RESULT | {"failed": 0, "request_goodput": None})
    monkeypatch.setattr(bench_plot, "can_draw", lambda: False)
    done = omni_cli("--output", str(tmp_path / "out"), "--tokenizer", str(tmp_path), "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["rates"][0]["goodput_per_s"] is None
    assert "no picture: matplotlib is not installed" in done.stderr
    assert not (tmp_path / "out" / "bench.png").exists()


@pytest.mark.usefixtures("ready")
def test_the_key_is_on_no_command_line(
    benchmark: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMNI_API_KEY", "omni-secret")
    assert omni_cli("--output", str(tmp_path / "out"), "--tokenizer", str(tmp_path)).exit_code == 1
    arguments, key = json.loads((tmp_path / "out" / "rate-1.seen").read_text())
    assert (key, "omni-secret" in str(arguments)) == ("omni-secret", False)


@pytest.mark.usefixtures("ready")
def test_what_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "out"
    for arguments, message in (
        (("--rates", "1,x"), "--rates: 'x' is none, or stands twice; write different numbers above 0"),
        (("--rates", "0"), "'0' is none"),
        (("--rates", "2,2.0"), "'2.0' is none, or stands twice"),
        (("--rates", "nan"), "'nan' is none"),
        (("--input-len", "999999"), "--input-len: 999999 and --output-len 64 are more than the"),
        (("--dataset", "sharegpt"), "--dataset-path: is not given; name the file of the data set sharegpt"),
        (("--dataset", "custom", "--dataset-path", "/none"), "--dataset-path: /none is not there"),
        (("--dataset-path", str(tmp_path)), "random prompts come from no file"),
        ((), "--tokenizer: /models/smollm2 is no folder here"),
        (("--tokenizer", "/none"), "--tokenizer: /none is no folder here"),
        (("other",), "no deployment 'other' is running"),
    ):
        done = omni_cli(*arguments, "--output", str(out))
        assert (done.exit_code, done.stdout) == (2, ""), arguments
        assert message in done.stderr, arguments
        assert not out.exists()


def test_nothing_runs_or_not_all_of_it(tmp_path: Path) -> None:
    done = omni_cli()
    assert (done.exit_code, "no deployment is running" in done.stderr) == (2, True)
    with running(plan_of(tmp_path)):
        done = omni_cli()
    assert done.exit_code == 2
    assert "trial is not ready: prefill.group1.rank0 is starting, decode.group1.rank0 is starting" in done.stderr


def test_a_deployment_with_api_keys(tmp_path: Path) -> None:
    plan = plan_of(tmp_path)
    written = plan.config_file.read_text()
    plan.config_file.write_text(written.replace("listen_port: 7000", "listen_port: 7000\n    api_keys_file: /keys"))
    with running(plan, states=all_ready(plan)):
        done = omni_cli("--tokenizer", str(tmp_path), "--output", str(tmp_path / "out"))
    assert (done.exit_code, "--api-key-file: trial asks for API keys" in done.stderr) == (2, True)


@pytest.mark.usefixtures("ready")
def test_a_benchmark_that_fails(benchmark: Callable[..., None], tmp_path: Path) -> None:
    benchmark(code=3)
    done = omni_cli("--output", str(tmp_path / "a"), "--tokenizer", str(tmp_path))
    assert done.exit_code == 2
    assert "rate 1: the benchmark exited with code 3:\narguments" in done.stderr
    benchmark({"completed": 1})
    done = omni_cli("--output", str(tmp_path / "b"), "--tokenizer", str(tmp_path))
    assert (done.exit_code, "rate-1.json: is no result of vLLM's benchmark" in done.stderr) == (2, True)


def test_one_that_takes_too_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "slow_benchmark.py").write_text("import time\ntime.sleep(1000)\n")
    monkeypatch.setattr(load_test, "_MODULE", "slow_benchmark")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    target = Target(url="http://127.0.0.1:1", model="m", tokenizer=tmp_path, key=None, is_tls=False)
    with pytest.raises(DeploymentError, match=r"rate 1: not over after 0.1 s \(--timeout-s\); see .*rate-1.log"):
        load_test.run_at("1", target, LOAD, Slo(), tmp_path, 0.1)


def test_arguments(tmp_path: Path) -> None:
    target = Target(url="https://10.0.0.7:7000", model="m", tokenizer=tmp_path, key="k", is_tls=True)
    words = load_test.arguments("2", target, LOAD, Slo(ttft_ms=1.5, tpot_ms=20), tmp_path / "r.json")
    assert words[-4:] == ["--insecure", "--goodput", "ttft:1.5", "tpot:20"]
    assert "--max-concurrency" not in words
    custom = replace(LOAD, dataset="custom", dataset_path=Path("/p"), output_len=None, max_concurrency=4)
    words = load_test.arguments("2", target, custom, Slo(), tmp_path / "r.json")
    assert ("--random-input-len" in words, "--output-len" in words, "--goodput" in words) == (False, False, False)
    assert words[words.index("--dataset-path") + 1] == "/p"


def test_rates() -> None:
    assert bench.parse_rates("1, 2.50,inf") == ["1", "2.5", "inf"]
    with pytest.raises(ConfigError):
        bench.parse_rates("")


def test_vllm_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    monkeypatch.setattr(load_test.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DeploymentError, match="not installed here: install one of this package's extras"):
        load_test.check_vllm()


def test_vllms_own_benchmark(tmp_path: Path, free_ports: Callable[[int], int]) -> None:
    """Against stand-ins: it takes our arguments, all requests are answered, and its result is what we read."""
    out = tmp_path / "out"
    with standing_in(tmp_path, free_ports) as standing:
        done = omni_cli(
            *("--rates", "20", "--num-requests", "8", "--input-len", "24", "--output-len", "4"),
            *("--slo-ttft-ms", "60000", "--slo-tpot-ms", "0.001", "--output", str(out)),
            *("--tokenizer", str(ensure_embedded_model("tiny"))),
        )
        assert done.exit_code == 0, done.output
        assert all(state.restarts == 0 for state in standing.states.values())
    one = Figures.read("20", out / "rate-20.json")
    assert (one.num_completed, one.num_failed, one.goodput_per_s) == (8, 0, 0.0)  # no TPOT is so short
    assert one.latencies_ms["ttft"]["p50"] >= 20  # the stand-in's prefill
    assert one.latencies_ms["itl"]["p50"] > 5  # its step
    assert (out / "bench.png").stat().st_size > 10_000

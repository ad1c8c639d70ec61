"""The serving benchmark's processes: watched, and gone at the end, however it ends."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from benchmarks.bench_proxy.processes import BenchmarkError
from benchmarks.bench_serving import processes
from benchmarks.bench_serving.processes import CpuMeter, is_alive, running, wait_until_healthy
from benchmarks.servers import free_port

CORES = tuple(sorted(os.sched_getaffinity(0)))
SLEEP = [sys.executable, "-c", "import time; time.sleep(600)"]


class TestProcesses:
    @pytest.fixture(autouse=True)
    def _impatience(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(processes, "_STOP_S", 1.0)

    def test_a_family_ends_with_the_block_in_whatever_session_it_is(self, tmp_path: Path) -> None:
        child = f"import subprocess; subprocess.run({SLEEP!r}, start_new_session=True)"
        parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
        with running([sys.executable, "-c", parent], tmp_path / "log", CORES) as process:
            _wait_for(lambda: len(process.family()) == 3)
            family = process.family()
        assert not any(map(is_alive, family))

    def test_who_ignores_sigterm_is_killed(self, tmp_path: Path) -> None:
        stubborn = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(1, flush=True); "
        with running([sys.executable, "-c", stubborn + "time.sleep(600)"], tmp_path / "log", CORES) as process:
            _wait_for(lambda: (tmp_path / "log").read_text() == "1\n")
            (member,) = process.family()
        assert not is_alive(member)

    def test_they_end_even_if_the_benchmark_is_killed(self, tmp_path: Path) -> None:
        code = (
            "import sys, time; from pathlib import Path; from benchmarks.bench_serving.processes import running\n"
            f"with running({SLEEP!r}, Path(sys.argv[1]), {CORES!r}) as process:\n"
            "    print(process.family()[0].pid, flush=True); time.sleep(600)"
        )
        with subprocess.Popen(
            [sys.executable, "-c", code, tmp_path / "log"],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "TMPDIR": str(tmp_path)},
        ) as bench:
            assert bench.stdout is not None
            child = psutil.Process(int(bench.stdout.readline()))
            bench.kill()
        _wait_for(lambda: not is_alive(child))

    def test_one_that_ends_early_is_an_error_with_its_last_words(self, tmp_path: Path) -> None:
        url = f"http://127.0.0.1:{free_port()}"
        with (
            running([sys.executable, "-c", "raise SystemExit('no model')"], tmp_path / "log", CORES) as process,
            pytest.raises(BenchmarkError, match=r"ended with 1; the end of .*log:\nno model"),
        ):
            wait_until_healthy([url], [process], 30.0)
        with pytest.raises(BenchmarkError, match=f"not healthy after 0 s: {url}"):
            wait_until_healthy([url], [], 0.0)

    def test_the_meter_counts_descendants_since_it_was_made(self, tmp_path: Path) -> None:
        spin = (
            "import time\nwhile time.process_time() < 0.3: pass\nprint(1, flush=True)\n"
            "while time.process_time() < 0.6: pass\nprint(2, flush=True)\ntime.sleep(600)"
        )
        parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {spin!r}])"
        log = tmp_path / "log"
        with running([sys.executable, "-c", parent], log, CORES) as process:
            everything = CpuMeter([process])
            _wait_for(lambda: "2" in log.read_text())
            cpu_s, wall_s = everything.read()
            assert cpu_s >= 0.5
            assert wall_s >= cpu_s / len(CORES)
            assert CpuMeter([process]).read()[0] < 0.3  # asleep by now


class TestMain:
    def test_a_server_that_does_not_start_ends_it_with_its_words_and_leaves_nothing(self, tmp_path: Path) -> None:
        with _main(tmp_path, "import sys; sys.exit('cannot serve')") as bench:
            _, error = bench.communicate(timeout=60)
        assert bench.returncode == 1
        assert "cannot serve" in error
        assert list((tmp_path / "tmp").iterdir()) == []
        assert json.loads((tmp_path / "out.json").read_text())["systems"]["plain"]["failures"]

    def test_a_signal_leaves_no_process_and_no_folder(self, tmp_path: Path) -> None:
        with _main(tmp_path, "import time; time.sleep(600)") as bench:
            children = psutil.Process(bench.pid).children
            _wait_for(lambda: len(children()) == 2)
            engines = children()
            bench.send_signal(signal.SIGTERM)
            bench.communicate(timeout=60)
        assert bench.returncode == 128 + signal.SIGTERM
        _wait_for(lambda: not any(map(is_alive, engines)))
        assert list((tmp_path / "tmp").iterdir()) == []


@contextmanager
def _main(tmp_path: Path, engine: str) -> "Iterator[subprocess.Popen[str]]":
    """The command line with the tiny model, and programs of these lines for vLLM's servers."""
    (tmp_path / "not_vllm.py").write_text(engine)
    (tmp_path / "tmp").mkdir()
    code = (
        "from benchmarks.bench_serving import systems; systems._VLLM = 'not_vllm'\n"
        "from benchmarks.bench_serving.__main__ import main; main()"
    )
    files = ["--json", tmp_path / "out.json", "--png", tmp_path / "out.png", "--logs", tmp_path / "logs"]
    bench = subprocess.Popen(
        [sys.executable, "-c", code, "--model", "tiny", "--quick", *files],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "TMPDIR": str(tmp_path / "tmp"), "PYTHONPATH": str(tmp_path)},
    )
    try:
        yield bench
    finally:
        bench.kill()
        bench.communicate()


def _wait_for(condition: Callable[[], bool], timeout_s: float = 30.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)

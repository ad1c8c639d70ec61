"""The proxy's benchmark: each subject is measured, what is missing is said, the figures are what was counted."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from benchmarks.bench_proxy import plot, report
from benchmarks.bench_proxy.cases import Case, Latency, Paced, Throughput, body_of, make_cases
from benchmarks.bench_proxy.processes import BenchmarkError, Process, build, find_program, on_cores
from benchmarks.bench_proxy.results import GOALS, Result, add_latencies, ratio
from benchmarks.bench_proxy.run import Plan, answers, run, start, start_engines
from benchmarks.bench_proxy.subjects import Direct, Engines, Nginx, Ours, Subject, VllmRouter, VllmRouterAsItIs

pytestmark = pytest.mark.skipif(find_program("gcc") is None, reason="needs gcc: make system-deps")

TINY = (
    Throughput("whole", 4, False, 2, 1.0),
    Throughput("streamed_32", 32, True, 2, 1.0),
    Paced("paced", 120, True, 20, 2.0, ramp_s=0.1),  # long enough for a machine that is busy
    Latency("latency", 4, False, 1, 1.0),
)


class Lazy(Nginx):
    """Says that it asks P, and does not."""

    name = "lazy"
    disaggregates = True


class Broken(Direct):
    """Ends as soon as it has started."""

    name = "broken"

    def command(self, port: int, engines: Engines, folder: Path) -> list[str]:  # type: ignore[override]
        return [sys.executable, "-c", "print('no more'); raise SystemExit(3)"]


class Deadly(Direct):
    """Takes P down."""

    def command(self, port: int, engines: Engines, folder: Path) -> None:
        engines.processes[0]._process.kill()
        engines.processes[0]._process.wait()


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    folder = tmp_path_factory.mktemp("bench_proxy")
    cores = sorted(os.sched_getaffinity(0))
    return Plan(*build(folder), folder=folder, proxy_cores=cores, other_cores=cores, num_rounds=1, total_s=60.0)


@pytest.fixture
def stack() -> Iterator[contextlib.ExitStack]:
    with contextlib.ExitStack() as stack:
        yield stack


class TestRun:
    @pytest.mark.parametrize(
        "subject", [Ours(), VllmRouter(), VllmRouterAsItIs(), Nginx(), Direct()], ids=lambda subject: subject.name
    )
    def test_every_case_of_every_subject(self, subject: Subject, plan: Plan) -> None:
        if why := subject.missing():
            pytest.skip(why)
        cases = [case for case in TINY if not isinstance(case, Throughput) or find_program("wrk")]

        result = run([subject], cases, plan, print)[subject.name]

        assert result.failures == []
        expected = {"latency_p50_us", "latency_p99_us", "paced_chunks_per_s", "paced_spacing_p50_ms"}
        if find_program("wrk"):
            expected |= {"whole_per_s", "streamed_32_per_s"}
        if not isinstance(subject, Direct):
            expected |= {"paced_cpu_us", "paced_rss_kb"}
        assert expected <= result.rounds.keys()
        assert all(len(values) == 1 for values in result.rounds.values())
        assert result.rounds["paced_num_unfinished"] == [0]

    def test_who_does_not_start_or_leaves_p_out_is_named_and_the_others_go_on(self, plan: Plan) -> None:
        subjects: list[Subject] = [Broken(), Direct()]
        if find_program("nginx"):
            subjects.append(Lazy())

        results = run(subjects, TINY[-1:], plan, print)

        assert results["broken"].failures == ["start failed: broken does not start: no more\n"]
        assert results["direct"].failures == []
        assert len(results["direct"].rounds["latency_p50_us"]) == 1
        if find_program("nginx"):
            assert results["lazy"].failures == ["start failed: lazy asks D alone"]

    def test_a_dead_engine_is_the_end(self, plan: Plan) -> None:
        with pytest.raises(BenchmarkError, match="a stand-in engine has died"):
            run([Deadly()], TINY[-1:], plan, print)

    def test_nothing_is_left_running(self, plan: Plan, stack: contextlib.ExitStack) -> None:
        engines = start_engines(plan, stack)
        subject = Nginx() if find_program("nginx") else Direct()
        started = start(subject, engines, plan, stack)
        assert answers(started.port)
        processes = [
            process
            for started_by in (*engines.processes, started.process)
            if started_by
            for process in started_by._tree()
        ]
        assert len(processes) >= 2
        stack.close()
        assert [process for process in processes if process.is_running()] == []
        assert not answers(started.port)

    def test_failed_answers_are_no_answers(self, plan: Plan, stack: contextlib.ExitStack) -> None:
        engines = start_engines(plan, stack)
        (plan.folder / "body.json").write_bytes(b"x" * 200_000)  # more than the stand-in takes: it hangs up
        done = subprocess.run(
            [plan.http_load, str(engines.decode_port), "1", "10", "100", plan.folder / "body.json"],
            capture_output=True,
            check=True,
        )
        answer = json.loads(done.stdout.splitlines()[-1])
        assert answer["num_failed"] > 0
        assert answer["num_requests"] == 0


class TestMain:
    def test_a_signal_leaves_no_process_and_no_folder(self, tmp_path: Path) -> None:
        command = [sys.executable, "-m", "benchmarks.bench_proxy", "--only", "direct", "--cases", "latency"]
        bench = subprocess.Popen(
            command, stderr=subprocess.PIPE, text=True, env={**os.environ, "TMPDIR": str(tmp_path)}
        )
        assert bench.stderr is not None
        try:
            while "round 1" not in (line := bench.stderr.readline()):
                assert line
            children = psutil.Process(bench.pid).children(recursive=True)
            assert len(children) >= 2
            bench.send_signal(signal.SIGTERM)
            assert bench.wait(20) == 128 + signal.SIGTERM
        finally:
            bench.kill()
            bench.stderr.close()
        _, alive = psutil.wait_procs(children, timeout=10)
        assert alive == []
        assert list(tmp_path.iterdir()) == []

    def test_says_what_it_leaves_out_and_writes_both_files(self, tmp_path: Path) -> None:
        code = (
            "import shutil; real = shutil.which\n"
            "absent = ('wrk', 'nginx', 'vllm-router')\n"
            "shutil.which = lambda name, **more: None if name in absent else real(name, **more)\n"
            "from benchmarks.bench_proxy.__main__ import main; main()"
        )
        options = ["--seconds", "0.1", "--rounds", "1", "--streams", "10", "--streams-light", "5"]
        files = ["--json", str(tmp_path / "out.json"), "--png", str(tmp_path / "out.png")]
        done = subprocess.run(
            [sys.executable, "-c", code, "--only", "nginx", "vllm-router", "direct", *options, *files],
            capture_output=True,
            text=True,
            check=True,
        )
        assert "leaving out vllm-router: its Python package is not installed: make install" in done.stderr
        assert "leaving out nginx: nginx is not installed: make system-deps" in done.stderr
        assert "leaving out whole: wrk is not installed: make system-deps" in done.stderr
        written = json.loads((tmp_path / "out.json").read_text())
        assert list(written["results"]["pinned"]) == ["direct"]
        assert written["results"]["pinned"]["direct"]["medians"]["paced_spacing_p50_ms"] > 0
        assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")


class TestProcess:
    def test_cores_are_those_asked_for_and_ours_stay(self) -> None:
        before = os.sched_getaffinity(0)
        core = min(before)
        process = Process(
            [sys.executable, "-c", "import os, time; print(os.sched_getaffinity(0), flush=True); time.sleep(60)"],
            [core],
        )
        try:
            assert process.first_line() == str({core})
        finally:
            process.stop()
        assert os.sched_getaffinity(0) == before
        with pytest.raises(ZeroDivisionError), on_cores([core]):
            raise ZeroDivisionError
        assert os.sched_getaffinity(0) == before

    def test_a_program_that_is_not_there(self) -> None:
        with pytest.raises(BenchmarkError, match="no_such_program cannot be started"):
            Process(["no_such_program"], os.sched_getaffinity(0))

    def test_cpu_time_counts_children_too(self) -> None:
        spin = "import time\nwhile time.process_time() < 0.3: pass\nprint('done', flush=True); time.sleep(60)"
        parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {spin!r}])"
        process = Process([sys.executable, "-c", parent], os.sched_getaffinity(0))
        try:
            while "done" not in process.log_tail():
                assert process.is_running()
            assert process.cpu_s() >= 0.3
        finally:
            process.stop()

    def test_a_compiler_that_fails_is_an_error_with_its_words(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("benchmarks.bench_proxy.processes.find_program", lambda name: None)
        with pytest.raises(BenchmarkError, match="gcc is missing"):
            build(tmp_path)


class TestCases:
    def test_paced_streams_outlive_their_window(self) -> None:
        for case in make_cases(2.0, 32, 1000, 250):
            if isinstance(case, Paced):
                assert case.num_tokens * 0.02 > case.ramp_s + case.seconds

    def test_bodies_are_those_that_the_engine_understands(self) -> None:
        bodies = {case.name: body_of(case) for case in TINY}
        assert b'"stream":true' not in bodies["whole"]
        assert b'"model":"instant"' in bodies["whole"]
        assert b'"max_tokens":32,' in bodies["streamed_32"]
        assert b'"stream":true' in bodies["paced"]
        assert b'"model":"paced"' in bodies["paced"]


class TestResults:
    RESULTS = (
        Result(
            "ours", {"whole_per_s": [50.0, 10.0, 30.0], "latency_p50_us": [300.0, 500.0], "paced_rss_kb": [9.0, 1.0]}
        ),
        Result("vllm-router", {"whole_per_s": [20.0], "latency_p50_us": [900.0]}),
        Result("direct", {"latency_p50_us": [100.0, 200.0]}),
    )

    def test_medians_ratios_and_what_a_proxy_adds(self) -> None:
        results = {result.subject: result for result in self.RESULTS}
        add_latencies(results)
        assert results["ours"].median("whole_per_s") == 30.0
        assert results["ours"].median("paced_rss_kb") == 9.0
        assert ratio(results, "whole_per_s") == 1.5
        assert results["ours"].rounds["added_p50_us"] == [200.0, 300.0]
        assert "added_p50_us" not in results["vllm-router"].rounds  # a round is missing: they do not pair
        assert "added_p50_us" not in results["direct"].rounds
        assert {goal.figure: goal.met(results) for goal in GOALS} == {
            "whole_per_s": True,
            "streamed_32_per_s": None,
            "streamed_256_per_s": None,
            "paced_cpu_us": None,
            "paced_light_cpu_us": None,
            "added_p50_us": True,
        }

    def test_table_and_json(self, tmp_path: Path) -> None:
        results = {result.subject: result for result in self.RESULTS}
        results["direct"].failures.append("whole failed: because")
        lines = list(report.table(results, {"num_streams": 1000, "num_streams_light": 250}))
        assert lines[1].split() == ["whole:", "requests/s", "30", "20", "1.50", "at", "least", "1.25:", "met"]
        assert "1000 paced streams" not in "\n".join(lines)  # nobody has figures for it
        assert lines[-1] == "direct: whole failed: because"
        written = json.loads(json.dumps(report.as_json({"pinned": results}, {"load": 1})))
        assert written["results"]["pinned"]["ours"]["over_vllm-router"]["whole_per_s"] == 1.5
        assert written["goals"][0] == {"figure": "whole_per_s", "goal": "at least 1.25", "met": True, "of": "ours"}
        plot.draw({"free": results}, tmp_path / "plot.png")
        assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_every_case_is_in_the_table() -> None:
    """A case whose figures nobody sees would be measured for nothing."""
    shown = {figure for figure, _, _ in report._ROWS}
    cases: tuple[Case, ...] = make_cases(1.0, 1, 1, 1)
    assert all(any(figure.startswith(f"{case.name}_") for figure in shown) for case in cases)

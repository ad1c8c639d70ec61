"""The benchmark itself: it measures what it says, notices wrong bytes, goes on without who fails, leaves nothing."""

import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import psutil
import pytest

from benchmarks import bench_kv
from benchmarks.kv import plot, report
from benchmarks.kv.baselines import Memcpy, RawSocket
from benchmarks.kv.buffers import Buffer
from benchmarks.kv.cases import BLOCK_BYTES, BUFFER_BYTES, CASES, Case, spans_of
from benchmarks.kv.contender import Contender
from benchmarks.kv.pair import Pair, PairError
from benchmarks.kv.results import Result, verdicts
from benchmarks.kv.side import Timing
from kv_transfer.memory.regions import Spans

SMALL = (Case(4 * BLOCK_BYTES, False, 3), Case(4 * BLOCK_BYTES, True, 3))
FORGOTTEN = int(spans_of(SMALL[1], 1).local[3]) // BLOCK_BYTES


@dataclass
class Lying(Memcpy):
    """Forgets the last block of what lies apart."""

    def read(self, spans: Spans) -> None:
        super().read(Spans(spans.remote[:3], spans.local[:3], spans.sizes[:3]))


@dataclass
class Dying(Memcpy):
    """Its process ends in the second read."""

    num_reads: int = 0

    def read(self, spans: Spans) -> None:
        self.num_reads += 1
        if self.num_reads > 3:
            print("no more", flush=True)
            os._exit(9)
        super().read(spans)


@dataclass
class Missing(Contender):
    family = "peer"
    needs: ClassVar[tuple[str, ...]] = ("no_such_package.engine",)

    def serve(self, buffer: Buffer) -> Any: ...

    def connect(self, buffer: Buffer, served: Any) -> None: ...

    def read(self, spans: Spans) -> None: ...

    def close(self) -> None: ...


class TestSpansOf:
    @pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.num_bytes}-{case.shape}")
    def test_reads_walk_through_the_whole_buffer(self, case: Case) -> None:
        for side in ("remote", "local"):
            seen = np.zeros(BUFFER_BYTES // BLOCK_BYTES, int)
            for index in range(BUFFER_BYTES // case.num_bytes):
                spans = spans_of(case, index)
                assert spans.num_bytes == case.num_bytes
                for offset, size in zip(getattr(spans, side), spans.sizes, strict=True):
                    seen[offset // BLOCK_BYTES : (offset + size) // BLOCK_BYTES] += 1
            assert (seen == 1).all()

    def test_scattered_blocks_have_no_neighbours(self) -> None:
        spans = spans_of(Case(BUFFER_BYTES, True, 1), 0)
        assert (spans.sizes == BLOCK_BYTES).all()
        for offsets in (spans.remote, spans.local):
            assert (np.abs(np.diff(offsets)) > BLOCK_BYTES).all()


class TestRun:
    def test_each_contender_is_measured_or_says_why_not(self, tmp_path: Path) -> None:
        contenders = [Memcpy("memcpy"), RawSocket("raw tcp"), Lying("lying"), Dying("dying"), Missing("missing")]
        effort = bench_kv.Effort(SMALL, num_rounds=2, total_s=600.0, case_s=1.0, idle_s=0.01)

        results = {result.contender.name: result for result in bench_kv.run(contenders, effort)}

        assert {name: result.status for name, result in results.items()} == {
            "memcpy": "ok",
            "raw tcp": "ok",
            "lying": f"failed: RuntimeError: wrong bytes, {4 * BLOCK_BYTES} scattered: first at block {FORGOTTEN}",
            "dying": "failed: ended with code 9: no more",
            "missing": "not installed",
        }
        for name in ("memcpy", "raw tcp"):
            assert list(results[name].measured) == list(SMALL)
            for measured in results[name].measured.values():
                assert (len(measured.round_s), measured.num_reads) == (2, 6)
                assert measured.gb_per_s > 0
            assert results[name].idle_cpu is not None
        served_by_p = results["raw tcp"].measured[SMALL[0]].cpu_s_per_gb[0]
        assert served_by_p >= results["memcpy"].measured[SMALL[0]].cpu_s_per_gb[0]
        text = "\n".join([*report.table(list(results.values())), *report.summary(list(results.values()))])
        assert "missing: not installed" in text
        assert [entry["name"] for entry in report.as_json(list(results.values()), 0.5)["contenders"]] == list(results)
        plot.draw(list(results.values()), tmp_path / "plot.png")
        assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
        assert [p for p in psutil.Process().children() if "spawn_main" in " ".join(p.cmdline())] == []

    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
    def test_a_signal_leaves_no_process_and_no_folder(self, number: signal.Signals, tmp_path: Path) -> None:
        command = [sys.executable, "-m", "benchmarks.bench_kv", "--only", "memcpy", "--output", "unused"]
        bench = subprocess.Popen(
            command, stderr=subprocess.PIPE, text=True, env={**os.environ, "TMPDIR": str(tmp_path)}
        )
        assert bench.stderr is not None
        try:
            while "round 1" not in (line := bench.stderr.readline()):
                assert line
            children = psutil.Process(bench.pid).children(recursive=True)
            assert len(children) >= 2
            bench.send_signal(number)
            bench.wait(20)
        finally:
            bench.kill()
            bench.stderr.close()
        _, alive = psutil.wait_procs(children, timeout=10)
        assert alive == []
        assert list(tmp_path.iterdir()) == []


class TestPair:
    def test_processes_are_stopped_between_commands(self, tmp_path: Path) -> None:
        pair = Pair(Memcpy("memcpy"), (None, None), tmp_path)
        try:
            pair.start(SMALL)
            pids = [child.pid for child in psutil.Process().children() if "spawn_main" in " ".join(child.cmdline())]
            assert len(pids) == 2
            for pid in pids:
                os.waitid(os.P_PID, pid, os.WSTOPPED | os.WNOWAIT)
                assert psutil.Process(pid).status() == psutil.STATUS_STOPPED
            assert len(pair.time(SMALL[0], 60.0).seconds) == 3
            assert len(pair.time(SMALL[0], 0.0).seconds) == 1
        finally:
            pair.close()

    def test_a_process_that_has_died_is_an_error(self, tmp_path: Path) -> None:
        pair = Pair(Dying("dying"), (None, None), tmp_path)
        try:
            pair.start(SMALL)
            with pytest.raises(PairError, match="ended with code 9: no more"):
                pair.time(SMALL[0], 60.0)
        finally:
            pair.close()


class TestVerdicts:
    def test_ratios_are_those_of_rounds(self) -> None:
        contiguous, scattered = Case(BUFFER_BYTES, False, 1), Case(BUFFER_BYTES, True, 1)
        tcp, raw = Result(Memcpy("tcp")), Result(Memcpy("raw tcp"))
        for ours_s, theirs_s in ((1.0, 0.8), (10.0, 9.5), (2.0, 1.0)):
            tcp.add(contiguous, Timing([ours_s], 0, 0))
            tcp.add(scattered, Timing([2 * ours_s], 0, 0))
            raw.add(contiguous, Timing([theirs_s], 0, 0))

        (verdict,) = verdicts([tcp, raw])

        assert (verdict.what, verdict.wanted) == ("tcp / raw tcp", 0.9)
        assert verdict.ratio == pytest.approx(0.8)
        assert not verdict.is_met

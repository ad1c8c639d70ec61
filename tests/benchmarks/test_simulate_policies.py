"""The simulator: its clockwork adds up, the same seed gives the same, and it prints and writes what it says."""

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks import simulate_policies
from benchmarks.simulation.engines import (
    DECODE_REQUEST_S,
    DECODE_STEP_S,
    DECODE_TOKEN_S,
    PREFILL_STEP_S,
    PREFILL_TOKEN_S,
)
from benchmarks.simulation.run import HANDOFF_S, HANDOFF_TOKEN_S, Case, Simulation, rate_at
from benchmarks.simulation.trace import Request, make_trace
from services.global_proxy.policies.base import Prompt


def request(at_s: float, num_tokens: int, num_new: int, blocks: tuple[int, ...] = ()) -> Request:
    return Request(at_s, Prompt(num_tokens, num_new, None, b""), num_new, blocks)


def test_a_request_alone_takes_what_its_steps_take() -> None:
    outcome = Simulation(Case("chat", 1, 1), "round_robin", "round_robin").run([request(1.0, 1000, 101)])
    prefill_s = PREFILL_STEP_S + 1000 * PREFILL_TOKEN_S
    step_s = DECODE_STEP_S + DECODE_REQUEST_S + 1000 * DECODE_TOKEN_S
    assert outcome.ttft_p50_s == pytest.approx(prefill_s + HANDOFF_S + 1000 * HANDOFF_TOKEN_S + step_s, rel=0.01)
    assert outcome.tpot_p50_s == pytest.approx(step_s, rel=0.02)


def test_prompts_queue_on_p_and_a_cached_beginning_is_not_computed_again() -> None:
    apart = [request(0.0, 6400, 2), request(0.0, 6400, 2, tuple(range(100)))]
    case = Case("chat", 1, 1)
    queued = Simulation(case, "round_robin", "round_robin").run(apart)
    assert queued.ttft_p99_s > 1.8 * queued.ttft_p50_s * 2 / 3
    again = [request(0.0, 6400, 2, tuple(range(100))), request(10.0, 6400, 2, tuple(range(50)))]
    assert Simulation(case, "round_robin", "round_robin").run(again).cached_share == pytest.approx(0.25)


@pytest.mark.parametrize("shape", ["chat", "shared"])
def test_a_trace_has_its_rate_its_bursts_and_its_seed(shape: str) -> None:
    trace = make_trace(shape, 4000, 50.0, seed=3)
    times_s = np.array([r.at_s for r in trace])
    assert len(trace) == 4000
    assert (np.diff(times_s) >= 0).all()
    assert 4000 / times_s[-1] == pytest.approx(50.0, rel=0.35)
    per_second = np.histogram(times_s, bins=int(times_s[-1]))[0]
    assert per_second.var() > 2 * per_second.mean()  # of a Poisson process they are alike
    again, other = make_trace(shape, 4000, 50.0, seed=3), make_trace(shape, 4000, 50.0, seed=4)
    assert [r.at_s for r in again] == list(times_s)
    assert [r.prompt.text for r in again] == [r.prompt.text for r in trace]
    assert [r.at_s for r in other] != list(times_s)


def test_policies_that_look_at_costs_do_better_on_mixed_hardware() -> None:
    case = Case("chat", 4, 4, is_mixed=True)
    trace = make_trace("chat", 1500, rate_at(0.7, case), seed=2)
    blind = Simulation(case, "round_robin", "round_robin").run(trace)
    seeing = Simulation(case, "prefill_score_balance", "pd_score_balance").run(trace)
    assert seeing.good_share > blind.good_share + 0.1
    assert seeing.ttft_p99_s < blind.ttft_p99_s / 2
    assert seeing == Simulation(case, "prefill_score_balance", "pd_score_balance").run(trace)


def test_main_prints_and_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    simulate_policies.main(["--prefill", "2", "--decode", "3", "--requests", "120", "--output", str(tmp_path)])
    printed = capsys.readouterr().out
    assert "shared, 2P3D" in printed
    data = json.loads((tmp_path / "simulate_policies.json").read_text())
    policies = {(row["shape"], row["role"], row["policy"]) for row in data["rows"]}
    assert len(policies) == len(data["rows"]) == 2 * (7 + 7)
    assert (tmp_path / "simulate_policies.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("arguments", [["--prefill", "0"], ["--load", "0"], ["--load", "x"], ["--shape", "round"]])
def test_bad_arguments_are_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        simulate_policies.main(arguments)
    assert arguments[0] in capsys.readouterr().err

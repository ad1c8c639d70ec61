"""What the serving benchmark sends, and what it makes of the answers."""

import json
import random
from itertools import pairwise
from pathlib import Path

import pytest

from benchmarks.bench_serving import plot, report
from benchmarks.bench_serving.client import UNFINISHED, Outcome
from benchmarks.bench_serving.figures import (
    Slo,
    Unloaded,
    counts,
    cpu_figures,
    goodput,
    latencies,
    percentile,
    unloaded_of,
)
from benchmarks.bench_serving.run import LoadResult, Plan, Results, SystemResult, all_figures, loads_of
from benchmarks.bench_serving.trace import (
    CHAT_MESSAGE_TOKENS,
    LONG_ANSWER_TOKENS,
    LONG_PROMPT_TOKENS,
    Load,
    make_trace,
    sample,
    text_maker,
)

LOAD = Load("medium", chats_per_s=2.0, longs_per_s=0.5, duration_s=40.0)
SLO = Slo({"chat": 0.5, "long": 5.0}, itl_s=0.1)

byte_text = text_maker(lambda text: list(text.encode()), lambda token_ids: bytes(token_ids).decode())


class TestTrace:
    def test_the_seed_decides_all_of_it(self) -> None:
        trace = make_trace(LOAD, 7, byte_text)
        assert trace == make_trace(LOAD, 7, byte_text)
        assert trace != make_trace(LOAD, 8, byte_text)

    def test_as_many_arrive_as_the_rates_say_in_order(self) -> None:
        trace = make_trace(LOAD, 1, byte_text)
        chats_s = [arrival.at_s for arrival in trace if arrival.kind == "chat"]
        assert chats_s == [0.25 + 0.5 * number for number in range(80)]
        assert sum(arrival.kind == "long" for arrival in trace) == 20
        assert [arrival.at_s for arrival in trace] == sorted(arrival.at_s for arrival in trace)

    def test_lengths_are_spread_over_the_whole_range_and_shuffled(self) -> None:
        longs = [arrival for arrival in make_trace(LOAD, 1, byte_text) if arrival.kind == "long"]
        lengths = [len(arrival.text) for arrival in longs]
        shortest, longest = LONG_PROMPT_TOKENS
        width = (longest - shortest) / len(lengths)
        for number, length in enumerate(sorted(lengths)):
            assert shortest + number * width <= length <= shortest + (number + 1) * width
        assert lengths != sorted(lengths)
        assert {arrival.num_answer_tokens for arrival in longs} == {LONG_ANSWER_TOKENS}

    def test_long_prompts_come_at_random_times(self) -> None:
        """A Poisson process: its gaps vary as much as they last on average, and no time is preferred."""
        load = Load("many", chats_per_s=0.1, longs_per_s=50.0, duration_s=100.0)
        times_s = [arrival.at_s for arrival in make_trace(load, 1, lambda *_: "") if arrival.kind == "long"]
        gaps_s = [later - earlier for earlier, later in pairwise(times_s)]
        mean_s = sum(gaps_s) / len(gaps_s)
        variance = sum((gap_s - mean_s) ** 2 for gap_s in gaps_s) / len(gaps_s)
        assert variance**0.5 == pytest.approx(mean_s, rel=0.1)
        assert sum(at_s < 50.0 for at_s in times_s) == pytest.approx(2500, rel=0.05)

    def test_no_two_prompts_begin_alike(self) -> None:
        """Or prefix caches would answer."""
        loads = (LOAD, Load("light", 2.0, 0.1, 40.0))
        beginnings = [arrival.text.split()[0] for load in loads for arrival in make_trace(load, 1, byte_text)]
        assert len(set(beginnings)) == len(beginnings)

    def test_a_text_has_exactly_the_tokens_asked_for(self) -> None:
        for num_tokens in (1, 20, 1500):
            assert len(byte_text(num_tokens, random.Random(1))) == num_tokens
        assert len(sample("chat", random.Random(1), byte_text).text) == CHAT_MESSAGE_TOKENS
        assert len(sample("long", random.Random(1), byte_text).text) == 1000

    def test_rates_follow_from_the_unloaded_server(self) -> None:
        plan = _plan({"light": 0.1, "heavy": 0.8}, num_chats=3.0)
        loads = loads_of(plan, Unloaded({"chat": 0.1, "long": 2.0}, {"chat": 1.5, "long": 3.0}, 0.02))
        assert [(load.name, load.chats_per_s) for load in loads] == [("light", 2.0), ("heavy", 2.0)]
        assert [load.longs_per_s for load in loads] == pytest.approx([0.1, 0.8])


class TestFigures:
    def test_percentiles(self) -> None:
        assert percentile([], 50) is None
        assert percentile([3.0], 99) == 3.0
        assert percentile([4.0, 1.0, 3.0, 2.0], 50) == 2.5
        assert percentile(list(range(101)), 99) == 99.0
        assert percentile([0.0, 100.0], 99) == 99.0

    def test_what_was_cut_off_counts_with_the_time_it_had_taken_and_what_failed_does_not(self) -> None:
        outcomes = [
            _outcome(ttft_s=0.1, e2e_s=1.0, gaps_s=[0.02, 0.04]),
            _outcome(ttft_s=None, e2e_s=9.0, error=UNFINISHED),
            _outcome(ttft_s=None, e2e_s=0.001, error="503: busy"),
        ]
        figures = latencies(outcomes)
        assert figures["chat_ttft_p50_ms"] == pytest.approx((100 + 9000) / 2)
        assert figures["chat_itl_p50_ms"] == pytest.approx(30)
        assert figures["chat_e2e_p99_ms"] == pytest.approx(1000 + 0.99 * 8000)
        assert figures["long_ttft_p99_ms"] is None

    @pytest.mark.parametrize(
        ("outcome", "is_good"),
        [
            ({"ttft_s": 0.5, "gaps_s": [0.1, 0.1]}, True),
            ({"ttft_s": 0.51, "gaps_s": [0.01]}, False),
            ({"ttft_s": 0.1, "gaps_s": [0.01] * 62 + [0.4]}, False),  # one token of 64 that came late
            ({"ttft_s": 0.1, "gaps_s": []}, True),
            ({"ttft_s": 0.1, "gaps_s": [0.01], "error": "500: no"}, False),
            ({"ttft_s": 0.1, "gaps_s": [0.01], "error": UNFINISHED}, False),
            ({"ttft_s": 4.0, "kind": "long"}, True),
            ({"ttft_s": 5.1, "kind": "long"}, False),
        ],
    )
    def test_what_is_a_good_answer(self, outcome: dict[str, object], is_good: bool) -> None:
        assert SLO.is_met_by(_outcome(**outcome)) is is_good

    def test_goodput_counts_what_arrived_not_what_was_answered(self) -> None:
        good, late = _outcome(ttft_s=0.1), _outcome(ttft_s=0.6)
        long = _outcome(kind="long", ttft_s=None, error=UNFINISHED)
        figures = goodput([good, good, late, long], SLO, duration_s=4.0)
        assert figures["goodput_per_s"] == 0.5
        assert figures["good_share"] == 0.5
        assert figures["chat_good_share"] == pytest.approx(2 / 3)
        assert figures["long_good_share"] == 0.0
        assert goodput([], SLO, 4.0)["good_share"] is None

    def test_counts_and_cpu(self) -> None:
        outcomes = [
            _outcome(num_tokens=64, num_prompt_tokens=50, late_s=0.002),
            _outcome(kind="long", num_tokens=16, num_prompt_tokens=870, late_s=0.002),
            _outcome(kind="long", error="500: no", late_s=0.002),
            _outcome(kind="long", error=UNFINISHED, late_s=0.002),
        ]
        found = counts(outcomes)
        assert (found["num_requests"], found["chat_num_requests"], found["long_num_requests"]) == (4, 1, 3)
        assert (found["num_failed"], found["num_unfinished"], found["chat_num_failed"]) == (1, 1, 0)
        assert found["client_late_p99_ms"] == pytest.approx(2.0)
        cpu = cpu_figures(40.0, 50.0, outcomes)
        assert cpu["cores_busy"] == 0.8
        assert cpu["cpu_s_per_1000_tokens"] == pytest.approx(500.0)
        assert cpu["cpu_s_per_1000_tokens_with_prompts"] == pytest.approx(40.0)
        assert cpu_figures(1.0, 1.0, [])["cpu_s_per_1000_tokens"] is None

    def test_the_unloaded_server_is_measured_by_medians_and_must_answer(self) -> None:
        chats = [_outcome(ttft_s=ttft_s, e2e_s=1.0, gaps_s=[0.0, 0.0, 0.06]) for ttft_s in (0.1, 0.2, 0.9)]
        longs = [_outcome(kind="long", ttft_s=2.0, e2e_s=3.0, gaps_s=[0.5])]
        unloaded = unloaded_of(chats + longs)
        assert unloaded == Unloaded({"chat": 0.2, "long": 2.0}, {"chat": 1.0, "long": 3.0}, 0.02)
        assert Slo.of(unloaded, 3.0, 4.0) == Slo({"chat": pytest.approx(0.6), "long": 6.0}, itl_s=0.08)
        with pytest.raises(ValueError, match="a long request on its own: 500: no"):
            unloaded_of([*chats, _outcome(kind="long", error="500: no")])


class TestReport:
    def test_tables_goals_and_who_wins(self) -> None:
        lines = list(report.tables(_results()))
        text = "\n".join(lines)
        assert "MEDIUM: 2.00 chats/s and 0.50 long prompts/s for 40 s" in lines
        row = next(line for line in lines if line.strip().startswith("ITL p99"))
        assert row.split()[-3:] == ["400.0", "100.0", "500.0"]
        assert "goal, medium: chat_itl_p99_ms, ours ≤ 0.3 of plain: 0.25 of it, met" in lines
        assert "goal, medium: goodput_per_s, ours ≥ 1.5 of plain: not told" in lines  # plain has none at all
        wins = lines[lines.index("WHERE PLAIN SERVERS WIN (it / ours):") + 1 :]
        assert "  medium: long_ttft_p50_ms 1000 / 3000" in wins
        assert not [line for line in wins if "chat_itl" in line and "plain" in line]
        assert "nixl: 1 requests failed, the first with 500: no" in lines
        assert "FAILED: it fell" in text

    def test_a_system_that_never_started_is_no_trouble(self, tmp_path: Path) -> None:
        results = _results()
        results.systems["ours"] = SystemResult("ours", failures=["did not start"])
        text = "\n".join(report.tables(results))
        assert "ours: ours; did not start" in text
        assert all(goal.met(results) is None for goal in report.goals(results))
        plot.draw(results, tmp_path / "plot.png")

    def test_json_has_every_request_and_the_picture_is_one(self, tmp_path: Path) -> None:
        results = _results()
        written = json.loads(json.dumps(report.as_json(results, {"load_average_before": 1})))
        assert written["about"]["load_average_before"] == 1
        assert written["is_complete"] is False
        requests = written["systems"]["nixl"]["loads"]["medium"]["requests"]
        assert [request["error"] for request in requests] == [None, None, "500: no"]
        assert requests[0]["gaps_s"] == [0.5]
        assert written["goals"][0]["ratio"] == pytest.approx(0.25)
        plot.draw(results, tmp_path / "plot.png")
        assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")

    def test_nothing_measured_is_still_a_report(self, tmp_path: Path) -> None:
        assert list(report.tables(Results())) == [""]
        plot.draw(Results(), tmp_path / "plot.png")


def _outcome(**changes: object) -> Outcome:
    return Outcome(**{"kind": "chat", "at_s": 0.0, "num_asked": 64, **changes})  # type: ignore[arg-type]


def _plan(shares: dict[str, float], num_chats: float) -> Plan:
    return Plan(
        seed=1,
        shares=shares,
        num_chats=num_chats,
        duration_s=10.0,
        give_up_s=1.0,
        idle_s=0.1,
        num_unloaded=(1, 1),
        answer_timeout_s=5.0,
        ttft_factor=5.0,
        itl_factor=5.0,
    )


def _results() -> Results:
    """Plain servers are quicker with long prompts, and slow down the chats."""
    unloaded = Unloaded({"chat": 0.1, "long": 1.0}, {"chat": 1.0, "long": 2.0}, 0.02)
    results = Results(unloaded, SLO, [LOAD])
    for name, itl_s, long_ttft_s in (("plain", 0.4, 1.0), ("ours", 0.1, 3.0), ("nixl", 0.5, 4.0)):
        outcomes = [
            _outcome(ttft_s=0.2, gaps_s=[itl_s]),
            _outcome(kind="long", ttft_s=long_ttft_s, gaps_s=[itl_s]),
        ]
        if name == "nixl":
            outcomes.append(_outcome(error="500: no"))
        result = SystemResult(name, start_s=10.0, idle_cores=0.01)
        result.loads["medium"] = LoadResult(LOAD, all_figures(outcomes, SLO, LOAD, 10.0, 40.0), outcomes)
        results.systems[name] = result
    results.systems["nixl"].failures.append("it fell")
    return results

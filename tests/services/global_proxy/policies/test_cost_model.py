import gc

import pytest

from services.global_proxy.policies.cost_model import Costs, Fleet, break_even_tokens
from tests.services.global_proxy.policies.standins import teach_decode, teach_prefill


class TestFleet:
    def test_an_instance_that_nobody_knows_is_taken_to_be_like_the_others(self) -> None:
        fleet = Fleet()
        here_before, known = Costs(fleet), Costs(fleet)
        teach_prefill(known, 0.5, 2e-3)
        assert here_before.prefill_s(1000, 0) == pytest.approx(2.5, rel=0.1)
        assert Costs(fleet).prefill_s(1000, 0) == pytest.approx(2.5, rel=0.1)

    def test_a_few_samples_of_its_own_count_more(self) -> None:
        fleet = Fleet()
        fast, slow = Costs(fleet), Costs(fleet)
        teach_decode(fast, 0.01, 1e-4)
        teach_decode(slow, 0.04, 4e-4, num=8)
        assert slow.seconds_per_token(20, 0) == pytest.approx(4 * fast.seconds_per_token(20, 0), rel=0.2)

    def test_one_not_heard_of_for_long_becomes_cheaper_but_not_than_the_fleet(self) -> None:
        fleet = Fleet()
        slow, other = Costs(fleet), Costs(fleet)
        teach_prefill(slow, 0.1, 1e-3)
        teach_prefill(other, 0.01, 1e-4, num=150)
        assert slow.prefill_s(1000, 0) == pytest.approx(1.1, rel=0.1)
        teach_prefill(other, 0.01, 1e-4, num=1000)
        assert 0.3 < slow.prefill_s(1000, 0) < 0.9
        teach_prefill(other, 0.01, 1e-4, num=10_000)
        assert slow.prefill_s(1000, 0) == pytest.approx(fleet.prefill.theta[0] + 1000 * fleet.prefill.theta[1])

    def test_what_is_seen_then_counts_at_once(self) -> None:
        fleet = Fleet()
        recovered, other = Costs(fleet), Costs(fleet)
        teach_prefill(recovered, 0.1, 1e-3)
        teach_prefill(other, 0.01, 1e-4, num=2000)
        teach_prefill(recovered, 0.01, 1e-4, num=3)
        assert recovered.prefill_s(1000, 0) < 0.6

    def test_one_that_is_as_slow_as_ever_is_known_to_be_at_once(self) -> None:
        fleet = Fleet()
        slow, other = Costs(fleet), Costs(fleet)
        teach_prefill(slow, 0.1, 1e-3)
        teach_prefill(other, 0.01, 1e-4, num=2000)
        assert slow.prefill_s(1000, 0) < 0.6
        slow.observe_prefill(1000, 0, 1.1)
        assert slow.prefill_s(1000, 0) == pytest.approx(1.1, rel=0.1)

    def test_those_that_are_gone_are_forgotten(self) -> None:
        fleet = Fleet()
        stays = Costs(fleet)
        for _ in range(20):
            Costs(fleet)
        gc.collect()
        teach_decode(stays, 0.01, 1e-4, num=60)
        assert len(fleet._members) == 1


class TestBreakEven:
    """P and D take 10 ms and 0.1 ms a token; D's streams have a token every 20 ms."""

    @pytest.fixture
    def prefill(self) -> Costs:
        costs = Costs()
        teach_prefill(costs, 0.01, 1e-4)
        return costs

    @pytest.fixture
    def decode(self) -> Costs:
        costs = Costs()
        teach_prefill(costs, 0.01, 2e-4)
        teach_decode(costs, 0.02, 1e-6)
        return costs

    def test_where_d_alone_is_as_soon(self, prefill: Costs, decode: Costs) -> None:
        assert break_even_tokens(prefill, decode, decode, handoff_s=0.005) == pytest.approx(50, rel=0.3)

    def test_a_queue_at_p_makes_it_longer(self, prefill: Costs, decode: Costs) -> None:
        one = break_even_tokens(prefill, decode, decode, 0.005, num_tokens_ahead=30)
        assert one == pytest.approx(80, rel=0.3)

    def test_streams_on_d_are_held_up_by_a_few_tokens_time_at_most(self, prefill: Costs, decode: Costs) -> None:
        assert break_even_tokens(prefill, decode, decode, handoff_s=10.0) == pytest.approx(800, rel=0.2)

    def test_the_more_streams_there_are_to_hold_up_the_more_must_be_gained(self, prefill: Costs, decode: Costs) -> None:
        bounds = [break_even_tokens(prefill, decode, decode, 0.05, num_streams=num_streams) for num_streams in (1, 4)]
        assert bounds == [pytest.approx(0.05 / 2e-4, rel=0.2), pytest.approx(0.05 / 5e-4, rel=0.2)]

    def test_a_d_that_begins_later_than_p_has_handed_off_is_never_alone(self, prefill: Costs, decode: Costs) -> None:
        teach_prefill(decode, 0.5, 1e-4, num=400)
        assert break_even_tokens(prefill, decode, decode, handoff_s=0.005) == 0

    @pytest.mark.parametrize("missing", ["P", "D's answers"])
    def test_always_disaggregated_until_enough_was_seen(self, prefill: Costs, missing: str) -> None:
        decode = Costs()
        teach_prefill(decode, 0.01, 2e-4)
        if missing != "D's answers":
            teach_decode(decode, 0.02, 1e-6)
        assert break_even_tokens(Costs() if missing == "P" else prefill, decode, decode, 0.005) == 0

    def test_a_d_of_whose_prompts_nothing_is_known_may_be_taken_for_a_p(self, prefill: Costs) -> None:
        decode = Costs()
        teach_decode(decode, 0.02, 1e-6)
        bound = break_even_tokens(prefill, decode, prefill, 0.005, num_streams=1)
        assert bound == pytest.approx(50, rel=0.3)

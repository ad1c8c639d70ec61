"""What holds for every policy, and choosing one by name."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.global_proxy.policies.registry import POLICIES, make_policy, policy_names
from tests.services.global_proxy.policies.standins import StandIn, prompt, stand_ins

ALL = [(name, role) for role in ("prefill", "decode", "mixed") for name in policy_names(role)]

Step = tuple[set[int], int, bytes]
steps = st.lists(
    st.tuples(st.sets(st.integers(0, 5), min_size=1), st.integers(0, 2000), st.binary(max_size=600)), max_size=12
)


@pytest.mark.parametrize(("name", "role"), ALL)
class TestEveryPolicy:
    @settings(deadline=None, max_examples=40)  # on a busy machine any one may take long
    @given(steps=steps)
    def test_chooses_one_of_the_candidates_as_they_come_and_go(self, name: str, role: str, steps: list[Step]) -> None:
        policy = make_policy(name, role)
        instances = stand_ins(6)
        running = []
        for present, num_tokens, text in steps:
            candidates = tuple(instances[i] for i in sorted(present))
            before = [(c.num_requests, c.num_tokens) for c in candidates]
            wanted = prompt(num_tokens, text, session=text[:2] or None)
            policy.started(instances[0], wanted)
            chosen = policy.choose(candidates, wanted)
            assert chosen in candidates
            assert [(c.num_requests, c.num_tokens) for c in candidates] == before
            chosen.num_requests += 1
            chosen.num_tokens += num_tokens
            running.append((chosen, wanted))
            if len(running) > 3:
                ended, its_prompt = running.pop(0)
                ended.num_requests -= 1
                ended.num_tokens -= its_prompt.num_tokens
            policy.finished(instances[0], wanted)

    def test_equals_get_equal_shares(self, name: str, role: str) -> None:
        policy = make_policy(name, role)
        instances = stand_ins(4)
        counts = dict.fromkeys((i.name for i in instances), 0)
        for i in range(400):
            wanted = prompt(100, text=b"%d" % i * 300, session=b"session %d" % i)
            chosen: StandIn = policy.choose(instances, wanted)
            counts[chosen.name] += 1
        assert min(counts.values()) > 60


class TestMakePolicy:
    def test_every_role_has_its_own(self) -> None:
        assert set(POLICIES) == set(policy_names("prefill")) | set(policy_names("decode"))
        assert "pd_score_balance" not in policy_names("prefill")
        assert "prefill_score_balance" not in policy_names("decode")
        assert not {"pd_score_balance", "prefill_score_balance"} & set(policy_names("mixed"))

    @pytest.mark.parametrize("name", ["fastest", "", "pd_score_balance"])
    def test_another_name_is_refused_with_those_there_are(self, name: str) -> None:
        with pytest.raises(ValueError, match=r"prefill policy '.*': choose one of round_robin, .*prefix_aware"):
            make_policy(name, "prefill")

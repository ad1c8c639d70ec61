"""What a follower reads, against a P that computes in any steps and is looked at at any time."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kv_transfer.decode.followed import Due, Followed
from kv_transfer.prefill.progress import PrefillProgressTable, PrefillStep
from kv_transfer.protocol import FollowPrefill, PrefillProgress

NUM_LAYERS = 4
LAYERS = range(NUM_LAYERS)
FOLLOW = FollowPrefill("transfer", "digest")


def progress(end_token: int, partial_end_token: int = 0, num_layers: int = 0) -> PrefillProgress:
    return PrefillProgress(
        end_token=end_token,
        partial_end_token=max(partial_end_token, end_token),
        num_layers=num_layers,
        is_last=False,
    )


def test_a_prompt_that_is_there_is_read_at_once() -> None:
    followed = Followed(0, 100, NUM_LAYERS)
    assert followed.next_reads(progress(101)) == [Due(0, 100, LAYERS)]
    assert followed.is_complete
    assert followed.next_reads(progress(101)) == []


def test_layer_by_layer() -> None:
    followed = Followed(0, 100, NUM_LAYERS)
    assert followed.next_reads(progress(0, 100, 0)) == []
    assert followed.next_reads(progress(0, 100, 1)) == [Due(0, 100, range(1))]
    assert followed.next_reads(progress(0, 100, 3)) == [Due(0, 100, range(1, 3))]
    assert not followed.is_complete
    assert followed.next_reads(progress(100)) == [Due(0, 100, range(3, 4))]
    assert followed.is_complete


def test_chunk_by_chunk() -> None:
    """A chunk that was seen in part and one that was not seen at all end between two looks."""
    followed = Followed(0, 100, NUM_LAYERS)
    assert followed.next_reads(progress(0, 30, 2)) == [Due(0, 30, range(2))]
    assert followed.next_reads(progress(60, 90, 1)) == [
        Due(0, 30, range(2, 4)),
        Due(30, 60, LAYERS),
        Due(60, 90, range(1)),
    ]
    assert followed.next_reads(progress(90, 101, 4)) == [Due(60, 90, range(1, 4)), Due(90, 100, LAYERS)]
    assert not followed.is_complete  # P has not said that the last chunk's step is over
    assert followed.next_reads(progress(101)) == []
    assert followed.is_complete


@pytest.mark.parametrize(("first_token", "expected"), [(50, [Due(50, 60, LAYERS)]), (60, []), (70, [])])
def test_what_this_reader_has_is_not_read(first_token: int, expected: list[Due]) -> None:
    followed = Followed(first_token, 100, NUM_LAYERS)
    assert followed.next_reads(progress(60)) == expected
    assert followed.next_reads(progress(100)) == [Due(max(60, first_token), 100, LAYERS)]
    assert followed.is_complete


def test_a_heartbeat_brings_nothing() -> None:
    followed = Followed(0, 100, NUM_LAYERS)
    followed.next_reads(progress(40, 80, 2))
    for _ in range(3):
        assert followed.next_reads(progress(40, 80, 2)) == []


@settings(deadline=None, database=None)
@given(
    ends=st.sets(st.integers(1, 39), max_size=6),
    first_token=st.integers(0, 38),
    looks=st.lists(st.booleans(), min_size=60, max_size=60),
    seen_after=st.integers(0, 60),
)
def test_exactly_what_was_computed_is_read_once(
    ends: set[int], first_token: int, looks: list[bool], seen_after: int
) -> None:
    """P computes the prompt's 40 tokens in chunks up to `ends`, layer by layer. The follower comes at any time, and
    from then on sees the state after some of the events. At each look it reads all that is computed then, nothing else,
    and nothing twice; in the end it has all that it needs.
    """
    num_tokens = 40
    table = PrefillProgressTable([f"layer {index}" for index in LAYERS])
    followed = Followed(first_token, num_tokens - 1, NUM_LAYERS)
    computed: set[tuple[int, int]] = set()
    read: list[tuple[int, int]] = []
    events = iter(range(len(looks)))

    def look(*, always: bool = False) -> None:
        event = next(events, len(looks) - 1)
        if not always and (event < seen_after or not looks[event]):
            return
        state, refusal, _ = table._news(FOLLOW, None)
        assert refusal is None
        for due in followed.next_reads(state):
            read.extend((token, layer) for token in range(due.first_token, due.end_token) for layer in due.layers)
        assert set(read) <= computed
        assert set(read) == {cell for cell in computed if first_token <= cell[0] < num_tokens - 1}
        assert len(set(read)) == len(read)

    start = 0
    for end in [*sorted(ends), num_tokens]:
        step = PrefillStep(
            transfer_id="transfer",
            prompt_digest="digest",
            end_token=end,
            num_prompt_tokens=num_tokens,
            block_ids=(tuple(range(end)),),
        )
        table.begin_step([step], [])
        look()
        for layer in LAYERS:
            computed |= {(token, layer) for token in range(start, end)}
            table.layer_done(f"layer {layer}")
            look()
        table.step_done()
        look()
        start = end
    look(always=True)
    assert followed.is_complete
    assert len(read) == (num_tokens - 1 - first_token) * NUM_LAYERS

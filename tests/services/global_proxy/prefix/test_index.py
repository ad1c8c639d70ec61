import random
from collections import Counter
from typing import Any

import pytest

from services.global_proxy.prefix.events import AllBlocksCleared, BlockStored
from services.global_proxy.prefix.index import KvEventIndex
from tests.services.global_proxy.prefix.blocks import block_hash, packed, removed, stored

TEXT = (1, 2, 3, 4, 5, 6, 7)  # three blocks of 2, and a token


def index_of(*names: str, max_blocks: int = 1000) -> KvEventIndex:
    index = KvEventIndex(max_blocks)
    for name in names:
        index.add(name)
    return index


def test_each_engine_has_its_own_blocks() -> None:
    index = index_of("a", "b", "c", "d")
    index.apply("a", [stored(TEXT)])
    index.apply("b", [stored(TEXT[:4])])
    index.apply("c", [stored((1, 2, 9, 4, 5, 6))])
    assert index.cached_tokens(packed(TEXT)) == {"a": 6, "b": 4, "c": 2}
    assert index.cached_tokens(packed((9, *TEXT))) == {}
    assert index.cached_tokens(b"") == {}
    assert len(index) == 5


def test_the_last_token_is_always_computed() -> None:
    index = index_of("a")
    index.apply("a", [stored(TEXT)])
    assert index.cached_tokens(packed(TEXT[:6])) == {"a": 4}
    assert index.cached_tokens(packed(TEXT[:6]), num_tokens=6) == {"a": 6}


def test_later_blocks_are_found_by_their_parent() -> None:
    index = index_of("a")
    index.apply("a", [stored(TEXT[:2]), stored(TEXT, first=1)])
    assert index.cached_tokens(packed(TEXT)) == {"a": 6}


def test_a_block_without_its_parent_waits_for_it() -> None:
    index = index_of("a")
    index.apply("a", [stored(TEXT), removed(TEXT[:2])])
    assert index.cached_tokens(packed(TEXT)) == {}
    index.apply("a", [stored(TEXT[:2])])
    assert index.cached_tokens(packed(TEXT)) == {"a": 6}


def test_a_block_stays_until_its_last_copy_goes() -> None:
    index = index_of("a")
    index.apply("a", [stored(TEXT[:2]), stored(TEXT[:2]), stored(TEXT[:2])])
    for _ in range(2):
        index.apply("a", [removed(TEXT[:2])])
        assert index.cached_tokens(packed(TEXT)) == {"a": 2}
    index.apply("a", [removed(TEXT[:2])])
    assert index.cached_tokens(packed(TEXT)) == {}
    index.apply("a", [removed(TEXT[:2]), stored(TEXT[:2])])
    assert index.cached_tokens(packed(TEXT)) == {"a": 2}


def test_a_copy_of_a_block_whose_parent_went() -> None:
    index = index_of("a")
    index.apply("a", [stored(TEXT[:4]), removed(TEXT[:2]), stored(TEXT[:4], first=1), stored(TEXT[:2])])
    index.apply("a", [removed(TEXT[:4])])
    assert index.cached_tokens(packed(TEXT)) == {"a": 4}


def test_blocks_that_cannot_be_placed_are_not_assumed() -> None:
    index = index_of("a")
    index.apply("a", [stored(TEXT, first=1), removed(TEXT[:4])])
    assert index.cached_tokens(packed(TEXT)) == {}
    too_short = BlockStored([block_hash(TEXT[:2])], None, [1], 2, "GPU", group_idx=0)
    index.apply("a", [too_short])
    assert index.num_blocks("a") == 0


@pytest.mark.parametrize(
    "other",
    [
        {"medium": "CPU"},
        {"kv_cache_spec_kind": "sliding_window", "group_idx": 1},
        {"group_idx": 1},
        {"extra_keys": [["salt"]]},
        {"extra_keys": [["lora"]], "lora_name": "lora"},
    ],
)
def test_what_a_prompt_of_tokens_alone_does_not_find(other: dict[str, Any]) -> None:
    index = index_of("a")
    index.apply("a", [stored(TEXT[:2]), stored((8, 9), **other)])
    assert index.cached_tokens(packed((8, 9, 0))) == {}
    assert index.cached_tokens(packed(TEXT)) == {"a": 2}


def test_the_first_group_that_keeps_whole_prefixes_is_followed() -> None:
    index = index_of("a")
    index.apply("a", [stored(TEXT[:2], kv_cache_spec_kind="sliding_window"), stored(TEXT, group_idx=1)])
    assert index.cached_tokens(packed(TEXT)) == {"a": 6}


def test_keys_of_each_block() -> None:
    """A salt is told with the first block only; those after it depend on it by their parent."""
    index = index_of("a")
    index.apply("a", [stored(TEXT[:2], extra_keys=[None]), stored(TEXT, first=1, extra_keys=[["image"], None])])
    assert index.cached_tokens(packed(TEXT)) == {"a": 2}
    index.apply("a", [stored((8, 9), extra_keys=[None, None])])
    assert index.cached_tokens(packed((8, 9, 0))) == {}
    assert index.num_blocks("a") == 3


def test_removals_elsewhere_do_not_count() -> None:
    index = index_of("a")
    index.apply("a", [stored(TEXT), removed(TEXT[:2], medium="CPU"), removed(TEXT[:2], group_idx=1)])
    assert index.cached_tokens(packed(TEXT)) == {"a": 6}


def test_engines_with_blocks_of_other_sizes() -> None:
    index = index_of("a", "b")
    index.apply("a", [stored(TEXT)])
    index.apply("b", [stored(TEXT, block_size=3), stored((1, 2), block_size=2)])
    assert index.cached_tokens(packed(TEXT)) == {"a": 6, "b": 6}
    assert index.cached_tokens(packed(TEXT[:5])) == {"a": 4, "b": 3}


def test_clearing() -> None:
    index = index_of("a", "b")
    for name in "ab":
        index.apply(name, [stored(TEXT), stored(TEXT)])
    index.apply("a", [AllBlocksCleared()])
    assert index.cached_tokens(packed(TEXT)) == {"b": 6}
    index.apply("a", [stored(TEXT[:2]), removed(TEXT[:2])])
    assert index.cached_tokens(packed(TEXT)) == {"b": 6}
    index.remove("b")
    assert len(index) == 0
    assert "b" not in index
    index.remove("b")
    index.add("a")  # anew, perhaps with blocks of another size
    index.apply("a", [stored(TEXT, block_size=3)])
    assert index.cached_tokens(packed(TEXT)) == {"a": 6}
    assert index.num_blocks("a") == 2
    assert index.num_blocks("b") == 0


def test_an_engine_that_leaves_makes_place_for_another() -> None:
    index = index_of("a", "b")
    index.apply("b", [stored(TEXT)])
    index.remove("a")
    index.add("c")
    index.apply("c", [stored(TEXT[:2])])
    assert index.cached_tokens(packed(TEXT)) == {"b": 6, "c": 2}


def test_memory_is_bounded() -> None:
    index = index_of("a", max_blocks=2)
    index.apply("a", [stored(TEXT)])
    assert index.cached_tokens(packed(TEXT)) == {"a": 4}
    index.apply("a", [removed(TEXT[:4]), stored((8, 9))])
    assert index.cached_tokens(packed((8, 9, 0))) == {"a": 2}


def test_every_change_changes_the_version() -> None:
    index = KvEventIndex()
    versions = [index.version]
    for change in (
        lambda: index.add("a"),
        lambda: index.apply("a", [stored(TEXT)]),
        lambda: index.clear("a"),
        lambda: index.remove("a"),
    ):
        change()
        versions.append(index.version)
    assert len(set(versions)) == 5


def test_against_a_plain_count_of_blocks() -> None:
    """Engines that store and evict at random, several copies and parents first; few tokens, so that much is shared."""
    source = random.Random(1)
    names = ("a", "b", "c")
    index = index_of(*names)
    copies: dict[str, Counter[tuple[int, ...]]] = {name: Counter() for name in names}

    def has(name: str, tokens: tuple[int, ...]) -> int:
        """As vLLM looks: from the left, to the first block that is missing."""
        length = 0
        while length + 3 <= len(tokens) and copies[name][tokens[: length + 2]]:
            length += 2
        return length

    for _ in range(3000):
        name = source.choice(names)
        mine = copies[name]
        tokens = tuple(source.randrange(2) for _ in range(2 * source.randrange(1, 6)))
        if source.random() < 0.5:
            first = source.randrange(len(tokens) // 2)
            if first == 0 or mine[tokens[: 2 * first]]:
                index.apply(name, [stored(tokens, first)])
                mine.update(tokens[:end] for end in range(2 * first + 2, len(tokens) + 1, 2))
        elif source.random() < 0.01:
            index.apply(name, [AllBlocksCleared()])
            mine.clear()
        elif present := sorted(mine.elements()):
            tokens = source.choice(present)
            index.apply(name, [removed(tokens)])
            mine[tokens] -= 1
        prompt = (*(source.randrange(2) for _ in range(8)), 0)
        expected = {name: has(name, prompt) for name in names if has(name, prompt)}
        assert index.cached_tokens(packed(prompt)) == expected

import json
from collections.abc import Sequence
from dataclasses import dataclass

import pytest

from services.global_proxy.prefix.index import KvEventIndex
from services.global_proxy.prefix.prefix_index import PrefixIndex
from tests.services.global_proxy.prefix.blocks import stored

TOKENS = tuple(range(600))


@dataclass(eq=False)
class Prompt:
    text: bytes
    num_tokens: int


def text_of(tokens: Sequence[int]) -> bytes:
    """Three bytes for each."""
    return b'"%s"' % b"".join(b"%03d" % token for token in tokens)


def as_json(tokens: Sequence[int]) -> bytes:
    return json.dumps(list(tokens)).encode()


@pytest.fixture
def events() -> KvEventIndex:
    index = KvEventIndex()
    index.add("a")
    index.add("b")
    index.apply("a", [stored(TOKENS)])
    return index


def test_token_ids_of_the_client(events: KvEventIndex) -> None:
    prefix_index = PrefixIndex(events)
    prompt = Prompt(as_json(TOKENS), 600)
    assert prefix_index.matched_tokens("a", prompt) == 598
    assert prefix_index.matched_tokens("b", prompt) == 0
    assert prefix_index.matched_tokens("does not tell", prompt) is None
    assert prefix_index.num_tokens(prompt.text) == 600
    prefix_index.learn(prompt, as_json(TOKENS[:3]))  # P's answer tells nothing new
    assert prefix_index.num_tokens(prompt.text) == 600


@pytest.mark.parametrize("text", [b"[[1, 2], [3]]", b'["a"]', b'[{"role": "user"}]', b"[1, -2]", b"", b'"[1]"'])
def test_other_prompts_are_texts(events: KvEventIndex, text: bytes) -> None:
    assert PrefixIndex(events).matches(Prompt(text, 5)) is None


def test_a_text_that_p_has_seen(events: KvEventIndex) -> None:
    prefix_index = PrefixIndex(events)
    text = text_of(TOKENS)
    assert prefix_index.matched_tokens("a", Prompt(text, 450)) is None
    assert prefix_index.num_tokens(text) is None
    prefix_index.learn(Prompt(text, 450), as_json(TOKENS))
    assert prefix_index.num_tokens(text) == 600
    assert prefix_index.matched_tokens("a", Prompt(text, 600)) == 598
    assert prefix_index.matched_tokens("a", Prompt(text, 450)) == 449  # the caller's estimate of the whole is too low
    assert prefix_index.matched_tokens("b", Prompt(text, 450)) == 0
    assert prefix_index.matched_tokens("does not tell", Prompt(text, 450)) is None


def test_a_text_with_a_known_beginning(events: KvEventIndex) -> None:
    prefix_index = PrefixIndex(events)
    prefix_index.learn(Prompt(text_of(TOKENS), 600), as_json(TOKENS))
    prompt = Prompt(text_of(TOKENS)[:1000] + bytes(800), 600)
    assert prefix_index.matches(prompt) == {"a": 254}  # 768 of 1802 bytes
    assert prefix_index.num_tokens(prompt.text) is None


def test_token_ids_with_spaces(events: KvEventIndex) -> None:
    assert PrefixIndex(events).matches(Prompt(b" [ 0, 1,\n2 , 3 ,4 ]", 5)) == {"a": 4}


def test_an_answer_is_not_kept_beyond_the_next_event(events: KvEventIndex) -> None:
    prefix_index = PrefixIndex(events)
    prompt = Prompt(as_json(TOKENS), 600)
    assert prefix_index.matches(prompt) is prefix_index.matches(prompt)
    events.apply("b", [stored(TOKENS[:100])])
    assert prefix_index.matches(prompt) == {"a": 598, "b": 100}
    assert prefix_index.matches(Prompt(as_json(TOKENS[:100]), 100)) == {"a": 98, "b": 98}


@pytest.mark.parametrize("nonsense", [b"", b"null", b"[]", b"[-1]", b"[4294967296]", b'["a"]', b"[1.5]", b"[1"])
def test_what_is_no_array_of_token_ids_is_passed_over(events: KvEventIndex, nonsense: bytes) -> None:
    prefix_index = PrefixIndex(events)
    prefix_index.learn(Prompt(b"text", 1), nonsense)
    assert prefix_index.num_tokens(b"text") is None

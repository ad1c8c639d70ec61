"""Here a token is four bytes of text where the text has `a`, and one elsewhere."""

from services.global_proxy.prefix.text_pieces import piece_keys, whole_key
from services.global_proxy.prefix.tokens import KnownTokens, TokenMemory
from tests.services.global_proxy.prefix.blocks import packed


def tokenise(text: bytes) -> bytes:
    tokens, place = [], 0
    while place < len(text):
        length = 4 if text[place : place + 4] == b"aaaa" else 1
        tokens.append(text[place] * 8 + length)
        place += length
    return packed(tokens)


def learn(memory: TokenMemory, text: bytes) -> None:
    keys = piece_keys(text)
    memory.learn(whole_key(text, keys), keys, len(text), tokenise(text))


def look_up(memory: TokenMemory, text: bytes) -> KnownTokens | None:
    keys = piece_keys(text)
    return memory.look_up(whole_key(text, keys), keys)


def test_the_same_text_has_the_same_tokens() -> None:
    memory = TokenMemory()
    for text in (b"short", b"a" * 1000, b"a" * 1000 + b"b"):
        assert look_up(memory, text + b"?") is None or len(text) > 256
        learn(memory, text)
        known = look_up(memory, text)
        assert known == KnownTokens(tokenise(text), len(tokenise(text)) // 4, is_whole=True)
    assert look_up(memory, b"something else") is None


def test_a_beginning_is_estimated_and_then_bounded() -> None:
    """1024 bytes are shared: 256 tokens. What follows has a token for each byte, so spreading evenly errs a lot."""
    memory = TokenMemory()
    common = b"a" * 1024
    learn(memory, common + bytes(range(98, 123)) * 40)
    known = look_up(memory, common + b"b" * 500)
    assert known is not None
    assert known.num_tokens == 1256 * 1024 // 2024
    learn(memory, common + b"c" * 1000)
    known = look_up(memory, common + b"d" * 500)
    assert known is not None
    assert not known.is_whole
    assert known.num_tokens == 256
    half = look_up(memory, common[:512] + b"d" * 500)
    assert half is not None
    assert half.num_tokens <= 256


def test_parting_within_a_piece_costs_no_more_than_the_piece() -> None:
    memory = TokenMemory()
    common = b"abcdefgh" * 250  # 2000 bytes, 2000 tokens: they part in the eighth piece
    learn(memory, common + b"a" * 4000)
    learn(memory, common + b"z" * 1000)
    known = look_up(memory, common + b"y" * 1000)
    assert known is not None
    assert known.num_tokens == 2000 - 256


def test_a_conversation_that_goes_on() -> None:
    memory = TokenMemory()
    text = b"abcdefgh" * 40
    for _ in range(5):
        learn(memory, text)
        longer = text + b"ijklmnop" * 60
        known = look_up(memory, longer)
        assert known is not None
        assert len(text) - 256 <= known.num_tokens <= len(text)
        assert known.token_ids[: 4 * known.num_tokens] == tokenise(longer)[: 4 * known.num_tokens]
        text = longer


def test_memory_is_bounded_and_what_is_used_stays() -> None:
    memory = TokenMemory(max_bytes=40_000)
    used = b"used" * 100
    learn(memory, used)
    for number in range(50):
        learn(memory, b"%d" % number * 500)
        assert look_up(memory, used) is not None
    assert 2 < len(memory) < 15
    assert memory._num_bytes <= 40_000
    assert set(memory._pieces) == {key for prompt in memory._prompts.values() for key in prompt.keys}
    learn(memory, b"x" * 20_000)  # takes more than there is
    assert look_up(memory, b"x" * 20_000) is None
    assert look_up(memory, used) is not None


def test_a_beginning_that_is_used_stays() -> None:
    memory = TokenMemory(max_bytes=20_000)
    learn(memory, b"used" * 100)
    for number in range(20):
        learn(memory, b"%d" % number * 500)
        assert look_up(memory, b"used" * 80) is not None


def test_a_beginning_outlives_the_prompt_that_brought_it() -> None:
    memory = TokenMemory(max_bytes=12_000)
    common = b"a" * 1000
    learn(memory, common + b"b" * 1000)
    learn(memory, common + b"c" * 500)
    learn(memory, b"d" * 500)
    assert len(memory) == 2
    assert look_up(memory, common + b"e" * 300) is not None


def test_forgetting_a_shared_beginning() -> None:
    """The later prompt had taken the pieces over, and is forgotten first."""
    first, second = b"a" * 1000 + b"b" * 1000, b"a" * 1000 + b"c" * 1000
    memory = TokenMemory(max_bytes=15_000)
    learn(memory, first)
    learn(memory, second)
    assert look_up(memory, first) is not None
    learn(memory, b"d" * 1000)  # `second` goes
    assert look_up(memory, second) is None
    known = look_up(memory, first)
    assert known is not None
    assert known.is_whole
    learn(memory, b"a" * 1500)
    for number in range(9):
        learn(memory, b"%d" % number * 1000)
    assert look_up(memory, first) is None

from itertools import pairwise

from services.global_proxy.prefix.text_pieces import PIECE_ENDS, piece_keys, whole_key

TEXT = bytes(range(256)) * 100


def test_equal_beginnings_have_equal_keys() -> None:
    keys = piece_keys(TEXT)
    other = piece_keys(TEXT[:6000] + b"x" + TEXT[6001:])
    same = sum(end <= 6000 for end in PIECE_ENDS)
    assert keys[:same] == other[:same]
    assert not set(keys[same:]) & set(other[same:])
    assert piece_keys(TEXT[: PIECE_ENDS[3]]) == keys[:4]
    assert piece_keys(TEXT[: PIECE_ENDS[3] - 1]) == keys[:3]


def test_the_same_piece_elsewhere_has_another_key() -> None:
    assert len(set(piece_keys(bytes(100_000)))) == len(piece_keys(bytes(100_000)))


def test_long_texts_have_few_pieces() -> None:
    assert PIECE_ENDS[:3] == (256, 512, 768)
    assert len(piece_keys(bytes(1 << 20))) < 150
    assert all(end - start <= max(256, start // 16) for start, end in pairwise(PIECE_ENDS))


def test_whole_keys_differ_in_what_is_left_over() -> None:
    texts = [b"", b"a", b"ab", b"b", TEXT[:256], TEXT[:257], TEXT[:512]]
    assert len({whole_key(text, piece_keys(text)) for text in texts}) == len(texts)
    assert whole_key(TEXT, piece_keys(TEXT)) == whole_key(bytes(bytearray(TEXT)), piece_keys(TEXT))

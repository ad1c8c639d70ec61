import pytest

from services.global_proxy.policies import sent_prefixes
from services.global_proxy.policies.sent_prefixes import SentPrefixes
from tests.services.global_proxy.policies.standins import prompt


def test_each_instance_has_what_it_shares_from_the_beginning() -> None:
    sent = SentPrefixes()
    sent.add("a", prompt(1000, b"x" * 4000))
    sent.add("b", prompt(1000, b"x" * 1000 + b"y" * 3000))
    sent.add("c", prompt(1000, b"z" + b"x" * 3999))
    found = sent.matches(prompt(1500, b"x" * 6000))
    assert set(found) == {"a", "b"}
    assert 900 <= found["a"] <= 1000
    assert 160 <= found["b"] <= 250  # whole blocks of 64 tokens


def test_nothing_is_known_of_what_is_too_short() -> None:
    sent = SentPrefixes()
    for text in (b"", b"x" * 255):
        sent.add("a", prompt(60, text))
        assert not sent.matches(prompt(60, text))


def test_it_remembers_the_latest_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sent_prefixes, "_MOST_BLOCKS", 8)
    monkeypatch.setattr(sent_prefixes, "_MOST_HOLDERS", 2)
    sent = SentPrefixes()
    hot = prompt(64, b"h" * 256)
    for number in range(20):
        sent.add(f"i{number}", hot)
        sent.add("other", prompt(256, b"%4d" % number * 256))
    assert set(sent.matches(hot)) == {"i19", "i18"}
    assert len(sent._holders) == 8

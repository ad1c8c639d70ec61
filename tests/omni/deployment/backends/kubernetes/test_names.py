"""Names that Kubernetes takes, of names that it would not."""

import re

import pytest

from omni.deployment.backends.kubernetes.names import Names

LABEL = re.compile(r"[a-z]([-a-z0-9]{0,61}[a-z0-9])?")  # also of a Service: it begins with a letter


def test_a_plain_name_stays() -> None:
    names = Names("chat-1")
    assert (names.base, names.proxy, names.control) == ("omni-chat-1", "omni-chat-1-proxy", "omni-chat-1-control")


@pytest.mark.parametrize("name", ["Chat", "chat.v2", "chat_v2", "chat..", "1p1d", "x" * 64, "a" * 17 + "-" * 30 + "b"])
def test_every_name_of_ours_is_a_label(name: str) -> None:
    names = Names(name)
    own = (names.proxy, names.control, names.config_map, names.key_secret, names.proxy_secret, names.env_secret)
    assert all(LABEL.fullmatch(each) for each in own)
    assert len(f"{names.base}-prefill-group123456") <= 52, "Kubernetes adds 11 characters, for a label of 63"
    assert all(
        re.fullmatch(r"[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?", v) for v in names.labels("p", "g").values()
    )


def test_names_that_look_alike_stay_apart() -> None:
    alike = ["chat-v2", "chat.v2", "chat_v2", "Chat-v2", "chat--v2", "chat-v2-"]
    long = [f"{'x' * 40}{number}" for number in range(5)]
    bases = [Names(name).base for name in (*alike, *long)]
    assert len(set(bases)) == len(bases)


def test_what_a_changed_name_looks_like() -> None:
    assert re.fullmatch(r"omni-chat-v2-[0-9a-f]{6}", Names("Chat.V2").base)
    assert Names("Chat.V2").base == Names("Chat.V2").base

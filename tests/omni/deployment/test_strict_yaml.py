"""What libyaml and PyYAML's own parser make of the same text."""

from collections.abc import Callable

import pytest
import yaml

from omni.deployment import strict_yaml

from .samples import FIELD_FILE

RUINOUS = "[" * 100_000  # libyaml's stack would overflow


@pytest.fixture(params=["libyaml", "python"])
def read(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], strict_yaml.Document]:
    if request.param == "python":
        monkeypatch.setattr(strict_yaml, "_FastLoader", None)
    elif not yaml.__with_libyaml__:
        pytest.skip("this PyYAML has no libyaml")
    return strict_yaml.read


@pytest.mark.parametrize(
    ("text", "data"),
    [
        ("", None),
        ("# nothing\n", None),
        ("a: 1\nb: [x, '2', 3.5, true, null]\n", {"a": 1, "b": ["x", "2", 3.5, True, None]}),
        ("[020000, 0_1, -010, '0']", ["020000", "0_1", "-010", "0"]),  # octal in YAML 1.1
        ("[150:00, 1:30.5, 10:20:30]", ["150:00", "1:30.5", "10:20:30"]),  # base 60
        ("[0, -0, 00.5, 0x1F, 1.0e+2, 09]", [0, 0, 0.5, 31, 100.0, "09"]),
        ("2: a\ntrue: b\n", {"2": "a", "True": "b"}),
        ("a: &x {b: 1, c: 2}\nd:\n  <<: *x\n  c: 3\n", {"a": {"b": 1, "c": 2}, "d": {"b": 1, "c": 3}}),
        ("\ufeffa: ü\n", {"a": "ü"}),
    ],
)
def test_what_is_read(read: Callable[[str], strict_yaml.Document], text: str, data: object) -> None:
    document = read(text)
    assert document.data == data
    assert (document.root is None) == (data is None)


def test_a_whole_file_reads_the_same(read: Callable[[str], strict_yaml.Document]) -> None:
    text = FIELD_FILE.read_text()
    assert read(text).data == yaml.safe_load(text)


@pytest.mark.parametrize(
    ("text", "error", "line", "words"),
    [
        ("a: [1", yaml.MarkedYAMLError, 1, "expected ',' or ']', but got '<stream end>'"),
        ("a: 1\nb: x: y\n", yaml.MarkedYAMLError, 2, "mapping values are not allowed here"),
        ("a: *x\n", yaml.MarkedYAMLError, 1, "found undefined alias 'x'"),
        ("a: 1\nb:\n  c: 1\n  c: 2\n", strict_yaml.KeyProblemError, 4, "the key c stands twice in one block, first on"),
        ("a: 1\nb: 2026-02-30\n", yaml.MarkedYAMLError, 2, "a date or number that cannot be"),
        ("a: !!int hunter2\n", yaml.MarkedYAMLError, 1, "a date or number that cannot be"),
    ],
)
def test_what_is_refused(
    read: Callable[[str], strict_yaml.Document],
    text: str,
    error: type[yaml.MarkedYAMLError],
    line: int,
    words: str,
) -> None:
    with pytest.raises(error) as caught:
        read(text)
    assert caught.value.problem is not None
    assert caught.value.problem_mark is not None
    assert caught.value.problem.startswith(words)
    assert caught.value.problem_mark.line + 1 == line
    assert "hunter2" not in caught.value.problem


@pytest.mark.parametrize("text", ["a: \x01", "a: '\ud800'"])
def test_characters_that_are_none(read: Callable[[str], strict_yaml.Document], text: str) -> None:
    with pytest.raises(yaml.reader.ReaderError):
        read(text)


@pytest.mark.parametrize("text", [RUINOUS, f"{RUINOUS}{']' * len(RUINOUS)}", "- " * 100_000, "? " * 200_000])
def test_blocks_inside_blocks(read: Callable[[str], strict_yaml.Document], text: str) -> None:
    with pytest.raises(RecursionError):
        read(text)


def test_libyaml_is_used_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    if not yaml.__with_libyaml__:
        pytest.skip("this PyYAML has no libyaml")
    monkeypatch.setattr(strict_yaml, "_StrictLoader", None)
    assert strict_yaml.read(FIELD_FILE.read_text()).data["services"]["decode"] == {"max_model_len": "16384"}

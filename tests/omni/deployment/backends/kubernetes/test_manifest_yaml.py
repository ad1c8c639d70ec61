"""YAML that people can read and kubectl can, too."""

import yaml

from omni.deployment.backends.kubernetes.manifest_yaml import to_yaml


def test_no_anchors() -> None:
    shared = {"a": 1}
    text = to_yaml([{"x": shared, "y": shared}])
    assert "&" not in text
    assert yaml.safe_load(text) == {"x": shared, "y": shared}


def test_lines_stay_lines() -> None:
    text = to_yaml([{"file": "a: 1\nb: 2\n"}])
    assert text == "---\nfile: |\n  a: 1\n  b: 2\n"


def test_texts_that_look_like_something_else() -> None:
    values = ["0600", "9000", "no", "1e3", "0.0.0.0", "", "~", "12:30", "a: b", "# c"]
    assert yaml.safe_load(to_yaml([values])) == values

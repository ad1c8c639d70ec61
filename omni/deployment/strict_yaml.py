"""YAML as `yaml.safe_load` reads it, except that a repeated key is an error and every key is text.

A number that YAML 1.1 would take for another is text too: 020000 for 8192, 150:00 for 9000.

libyaml reads a large file some ten times as fast as PyYAML's own parser. What it refuses is read again by the latter,
so that everybody gets the same words.
"""

import re
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import yaml

# Some 50,000 blocks inside one another make libyaml's stack overflow, and the process with it. Each begins with one of
# four characters, or by indentation, which takes too much text.
_MOST_NESTED = 5000
_NUMBERS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")
_ANOTHER_NUMBER = re.compile(r"[-+]?0[0-9_]+$|[^:]*:")  # octal, base 60


@dataclass(frozen=True)
class Document:
    data: Any
    root: yaml.Node | None  # what `data` was made of, with the lines; merged keys (<<) included; None: an empty file


class KeyProblemError(yaml.MarkedYAMLError):
    """A key stands twice in one block; YAML itself would silently keep the last."""


def read(text: str) -> Document:
    """Reads the only document in `text`.

    Raises:
        KeyProblemError: a repeated key.
        yaml.YAMLError: not YAML, or no plain data.
        RecursionError: a great many blocks or lists inside one another.
    """
    if _FastLoader is not None and sum(map(text.count, "[{-?")) < _MOST_NESTED:
        try:
            return _document(_FastLoader(text))
        except (yaml.YAMLError, UnicodeError):  # libyaml takes no lone surrogates
            pass
    return _document(_StrictLoader(text))


def _document(loader: Any) -> Document:
    try:
        root = loader.get_single_node()
        return Document(None if root is None else loader.construct_document(root), root)
    finally:
        loader.dispose()


class _Strict(yaml.constructor.SafeConstructor):
    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        is_number = isinstance(node, yaml.ScalarNode) and node.tag in _NUMBERS
        if is_number and _ANOTHER_NUMBER.match(node.value):
            return node.value
        try:
            return super().construct_object(node, deep=deep)
        except ValueError:  # 2026-02-30; the exception's text would quote the value
            text = "a date or number that cannot be"
            raise yaml.MarkedYAMLError(None, None, text, node.start_mark) from None

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        lines: dict[str, int] = {}
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in lines:
                text = f"the key {key.value} stands twice in one block, first on line {lines[key.value]}"
                raise KeyProblemError(None, None, text, key.start_mark)
            lines[key.value] = key.start_mark.line + 1
        return {str(key): value for key, value in super().construct_mapping(node, deep=deep).items()}


class _StrictLoader(_Strict, yaml.SafeLoader):
    pass


# Not every build of PyYAML has libyaml.
_FastLoader: Any = type("_FastLoader", (_Strict, yaml.CSafeLoader), {}) if yaml.__with_libyaml__ else None

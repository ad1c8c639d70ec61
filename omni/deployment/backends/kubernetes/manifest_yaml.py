"""Manifests as YAML. libyaml writes the same as PyYAML does, in a fifth of the time."""

from collections.abc import Sequence
from typing import Any

import yaml

_Dumper: Any = getattr(yaml, "CSafeDumper", yaml.SafeDumper)


class _ReadableDumper(_Dumper):  # type: ignore[misc]
    """Writes what is in two places twice, without anchors, and text of several lines as such."""

    def ignore_aliases(self, data: object) -> bool:
        return True


def _text(dumper: Any, text: str) -> yaml.ScalarNode:
    node: yaml.ScalarNode = dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)
    return node


_ReadableDumper.add_representer(str, _text)


def to_yaml(documents: Sequence[object], *, explicit_start: bool = True) -> str:
    text: str = yaml.dump_all(
        documents, Dumper=_ReadableDumper, sort_keys=False, width=120, explicit_start=explicit_start
    )
    return text

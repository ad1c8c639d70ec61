"""On which line of a deployment file a field stands, for the texts of errors."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import yaml

from omni.deployment import strict_yaml
from omni.deployment.errors import ConfigError
from omni.deployment.model import Deployment

_INDEX = re.compile(r"[0-9]{1,9}")


@contextmanager
def naming_lines(config_file: Path, root: yaml.Node | None = None) -> Iterator[None]:
    """Every ConfigError from the block names file and line of the fields it speaks of.

    Args:
        root: what the file was read as. Without it the file is read again when there is an error, as it is by then; if
            that fails, the error names the file alone.
    """
    try:
        yield
    except ConfigError as error:
        places = _Places(config_file, root or _root(config_file))
        raise error.placed(places.of) from error.__cause__


def shown_path(path: Path) -> str:
    """As people write it: from the working directory if it is below."""
    try:
        return str(path.relative_to(Path.cwd()))
    except (ValueError, OSError):  # it is elsewhere, or the working directory is gone
        return str(path)


class _Places:
    def __init__(self, config_file: Path, root: yaml.Node | None) -> None:
        self._file = shown_path(config_file)
        self._root = root
        self._known: dict[str, str] = {}  # many problems may be about the same field

    def of(self, field: str) -> str:
        """Such as "deploy.yml, line 12"; "" for what is no field: the file, an environment variable, an option."""
        if field not in self._known:
            self._known[field] = self._find(field)
        return self._known[field]

    def _find(self, field: str) -> str:
        if field == self._file or field.startswith(f"{self._file}, line "):
            return ""
        line = _line(self._root, field)
        if line is not None:
            return f"{self._file}, line {line}"
        return self._file if field.partition(".")[0] in Deployment.model_fields else ""


def _root(config_file: Path) -> yaml.Node | None:
    """None: the file has gone, or is not YAML any more."""
    try:
        return strict_yaml.read(config_file.read_text(encoding="utf-8")).root
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return None


def _line(root: yaml.Node | None, field: str) -> int | None:
    """Of the longest beginning of the field's path that is in the file: a missing key's is that of its block."""
    line, node, rest = None, root, field
    while rest and (found := _child(node, rest)):
        line, node, rest = found
    return line


_Found = tuple[int, yaml.Node, str]  # a line, the value there, and the path from there on


def _child(node: yaml.Node | None, path: str) -> _Found | None:
    if isinstance(node, yaml.SequenceNode):
        return _item(node, path)
    return _value(node, path) if isinstance(node, yaml.MappingNode) else None


def _item(node: yaml.SequenceNode, path: str) -> _Found | None:
    index, _, rest = path.partition(".")
    if not _INDEX.fullmatch(index) or int(index) >= len(node.value):
        return None
    item = node.value[int(index)]
    return item.start_mark.line + 1, item, rest


def _value(node: yaml.MappingNode, path: str) -> _Found | None:
    """Keys may hold dots themselves (host 10.0.0.1). Of equal ones the last counts, as it does when they are read."""
    names = [(_name(key), key, value) for key, value in node.value if isinstance(key, yaml.ScalarNode)]
    fitting = [found for found in names if f"{path}.".startswith(f"{found[0]}.")]
    if not fitting:
        return None
    name, key, value = max(reversed(fitting), key=lambda found: len(found[0]))
    return key.start_mark.line + 1, value, path[len(name) + 1 :]


def _name(key: yaml.ScalarNode) -> str:
    """A key as the paths of fields have it."""
    if key.value.startswith("host "):
        return f"host {key.value.removeprefix('host ').strip()}"
    return "proxy" if key.value == "c0" else str(key.value)  # two names for it

"""Deployment file → `Deployment`: YAML, then field by field, then the rules across fields."""

from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from omni.deployment.errors import ConfigError, Problem, raise_any
from omni.deployment.model import Deployment
from omni.deployment.translate import problems_of
from omni.deployment.validate import cross_field_problems


def load_deployment(path: Path) -> Deployment:
    """Reads and checks a deployment file.

    Raises:
        ConfigError: the file is missing, not YAML or breaks a rule; all problems of the same stage are in it.
    """
    data = _read_mapping(path)
    data.setdefault("name", path.stem)
    try:
        deployment = Deployment.model_validate(data)
    except ValidationError as error:
        raise ConfigError(problems_of(error)) from None
    raise_any(cross_field_problems(deployment))
    return deployment


def _read_mapping(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise _file_error(path, "does not exist", "name a deployment file, such as configs/demo.yaml") from None
    except UnicodeDecodeError:
        raise _file_error(path, "is not UTF-8 text", "save it as UTF-8") from None
    except OSError as error:
        raise _file_error(path, f"cannot be read ({error.strerror})", "make it a file you may read") from None
    try:
        data = yaml.load(text, Loader=_StrictLoader)  # noqa: S506 (a SafeLoader with more checks)
    except yaml.MarkedYAMLError as error:
        raise _yaml_error(path, error) from None
    except yaml.YAMLError:
        raise _file_error(path, "holds characters that YAML does not allow", "save it as plain text") from None
    if not isinstance(data, dict):
        raise _file_error(path, "is not a block of keys", "start it with `deployment:`; see configs/1p1d.yaml")
    return data


def _file_error(path: Path, text: str, mend: str) -> ConfigError:
    return ConfigError([Problem(str(path), text, mend)])


def _yaml_error(path: Path, error: yaml.MarkedYAMLError) -> ConfigError:
    """Names line and column but never quotes the line: it may hold a password."""
    mark = error.problem_mark or error.context_mark
    where = f"{path}, line {mark.line + 1}, column {mark.column + 1}" if mark else str(path)
    if isinstance(error, _KeyProblemError):
        return ConfigError([Problem(where, str(error.problem), "keep one and delete the other")])
    # The texts of these two quote the value; a scanner's or parser's text names a symbol at most.
    quotes_value = isinstance(error, yaml.composer.ComposerError | yaml.constructor.ConstructorError)
    detail = "an alias (*), anchor (&) or tag (!) that does not fit" if quotes_value else error.problem
    mend = "check indentation, and put values that hold `: `, ` #` or start with * & ! % @ in quotes"
    return ConfigError([Problem(where, f"not valid YAML ({detail})", mend)])


class _KeyProblemError(yaml.MarkedYAMLError):
    """A key stands twice in one block; YAML itself would silently keep the last."""


class _StrictLoader(yaml.SafeLoader):
    """YAML as `yaml.safe_load` reads it, except that a repeated key is an error and every key is text."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        lines: dict[str, int] = {}
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in lines:
                text = f"the key {key.value} stands twice in one block, first on line {lines[key.value]}"
                raise _KeyProblemError(None, None, text, key.start_mark)
            lines[key.value] = key.start_mark.line + 1
        return {str(key): value for key, value in super().construct_mapping(node, deep=deep).items()}

"""Deployment file → `Deployment`: YAML, then field by field, then the rules across fields."""

from pathlib import Path

import yaml
from pydantic import ValidationError

from omni.deployment import strict_yaml
from omni.deployment.errors import ConfigError, Problem, raise_any
from omni.deployment.line_numbers import naming_lines, shown_path
from omni.deployment.model import Deployment
from omni.deployment.strict_yaml import Document
from omni.deployment.translate import problems_of
from omni.deployment.validate import cross_field_problems


def load_deployment(path: Path) -> Deployment:
    """Reads and checks a deployment file.

    Raises:
        ConfigError: the file is missing, not YAML or breaks a rule; all problems of the same stage are in it.
    """
    document = _read(path)
    if not isinstance(document.data, dict):
        raise _file_error(path, "is not a block of keys", "start it with `deployment:`; see configs/1p1d.yaml")
    with naming_lines(path, document.root):
        try:
            deployment = Deployment.model_validate({"name": path.stem} | document.data)
        except ValidationError as error:
            raise ConfigError(problems_of(error)) from None
        raise_any(cross_field_problems(deployment))
    return deployment


def _read(path: Path) -> Document:
    try:
        return strict_yaml.read(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise _file_error(path, "does not exist", "name a deployment file, such as configs/demo.yaml") from None
    except UnicodeDecodeError:
        raise _file_error(path, "is not UTF-8 text", "save it as UTF-8") from None
    except OSError as error:
        raise _file_error(path, f"cannot be read ({error.strerror})", "make it a file you may read") from None
    except RecursionError:
        raise _file_error(path, "has too many blocks inside one another", "see configs/1p1d.yaml") from None
    except yaml.MarkedYAMLError as error:
        raise _yaml_error(path, error) from None
    except yaml.YAMLError:
        raise _file_error(path, "holds characters that YAML does not allow", "save it as plain text") from None


def _file_error(path: Path, text: str, mend: str) -> ConfigError:
    return ConfigError([Problem(shown_path(path), text, mend)])


def _yaml_error(path: Path, error: yaml.MarkedYAMLError) -> ConfigError:
    """Names line and column but never quotes the line: it may hold a password."""
    mark = error.problem_mark or error.context_mark
    file = shown_path(path)
    where = f"{file}, line {mark.line + 1}, column {mark.column + 1}" if mark else file
    if isinstance(error, strict_yaml.KeyProblemError):
        return ConfigError([Problem(where, str(error.problem), "keep one and delete the other")])
    # The texts of these two quote the value; a scanner's or parser's text names a symbol at most.
    quotes_value = isinstance(error, yaml.composer.ComposerError | yaml.constructor.ConstructorError)
    detail = "an alias (*), anchor (&) or tag (!) that does not fit" if quotes_value else error.problem
    mend = "check indentation, and put values that hold `: `, ` #` or start with * & ! % @ in quotes"
    return ConfigError([Problem(where, f"not valid YAML ({detail})", mend)])

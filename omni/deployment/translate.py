"""pydantic's errors in the deployment file's own words: field path, value, what to write instead."""

import difflib
from collections.abc import Iterator
from typing import Any, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from omni.deployment.errors import Problem
from omni.deployment.fields import REFUSED
from omni.deployment.model import HOST_KEY, Deployment

_MAY_HOLD_SECRETS = ("extra_args", "env")  # --api-key, HF_TOKEN


def problems_of(error: ValidationError) -> list[Problem]:
    return [_problem(detail) for detail in error.errors(include_url=False)]


def field_path(loc: tuple[int | str, ...]) -> str:
    """("deployment", "prefill", "group1", "host <IP>", "10.0.0.1", "user") as the file shows it."""
    parts: list[str] = []
    for part in map(str, loc):
        if part == "[key]":  # pydantic's mark for an error in a key; the key stands before it
            continue
        if parts and parts[-1] == HOST_KEY:
            parts[-1] = f"host {part}"
        else:
            parts.append(part)
    return ".".join(parts)


def _problem(detail: ErrorDetails) -> Problem:
    field, value, kind = field_path(detail["loc"]), detail["input"], detail["type"]
    if kind == REFUSED:
        what, _, mend = detail["ctx"]["text"].partition("; ")
        is_shown = detail["loc"][-1] not in _MAY_HOLD_SECRETS and not isinstance(value, dict)
        return Problem(field, f"{_shown(value)} {what}" if is_shown else what, mend)
    if kind == "missing":
        return Problem(field, "is missing", "add it; configs/1p1d.yaml shows a whole file")
    if kind == "extra_forbidden":
        return Problem(field, "is not a known key", _suggestion(detail["loc"]))
    if kind in ("model_type", "model_attributes_type", "dict_type"):
        # The value is not shown: a block written on one line may hold a password.
        return Problem(field, "is not a block of keys", "write its keys on the following lines, indented")
    if kind == "literal_error":
        return Problem(
            field, f"{_shown(value)} is not known", f"write {detail['ctx']['expected'].replace(chr(39), '')}"
        )
    if kind in ("bool_type", "bool_parsing"):
        return Problem(field, f"{_shown(value)} is not true or false", "write true or false")
    if kind == "tuple_type":
        return Problem(field, f"{_shown(value)} is not a list", "write its parts with commas between them, in [ ]")
    if kind == "string_type":
        # Only passwords and http_proxy get here; neither is shown.
        return Problem(field, "is not text", "put it in quotes")
    return Problem(field, detail["msg"], "configs/1p1d.yaml shows a whole file")


def _shown(value: Any) -> str:
    """The value for an error text; of a list or block, only that it is one."""
    if value is None:
        return "an empty value"
    if isinstance(value, dict):
        return "a block of keys"
    if isinstance(value, list):
        return "a list"
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _suggestion(loc: tuple[int | str, ...]) -> str:
    known = list(_known_keys(loc[:-1]))
    close = difflib.get_close_matches(str(loc[-1]), known, n=1)
    return f"did you mean {close[0]}?" if close else f"known here: {', '.join(known)}"


def _known_keys(loc: tuple[int | str, ...]) -> Iterator[str]:
    """The keys of the block at `loc`, found by walking the models."""
    block: type[BaseModel] = Deployment
    parts = iter(loc)
    for part in parts:
        annotation = next(f.annotation for name, f in block.model_fields.items() if part in (name, f.alias))
        if get_origin(annotation) is dict:
            next(parts, None)  # the group's or host's name
        block = next(_models_in(annotation))
    for name, field in block.model_fields.items():
        yield field.alias or name


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from _models_in(argument)

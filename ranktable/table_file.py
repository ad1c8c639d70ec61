"""Rank tables as files: either published form, told apart by its keys."""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ranktable import device_list_form, hccl_form
from ranktable.errors import Problem, TableError
from ranktable.json_part import JsonPart
from ranktable.model import RankTable
from ranktable.rules import check

FormName = Literal["hccl", "vllm-ascend"]


@dataclass(frozen=True)
class _Form:
    keys: tuple[str, ...]  # a file with any of these is of this form
    read: Callable[[JsonPart], RankTable]
    write: Callable[[RankTable], dict[str, Any]]


_FORMS: dict[FormName, _Form] = {
    "hccl": _Form(("server_list", "server_group_list"), hccl_form.read, hccl_form.write),
    "vllm-ascend": _Form(("prefill_device_list", "decode_device_list"), device_list_form.read, device_list_form.write),
}
FORM_NAMES = tuple(_FORMS)


def load(path: Path, *, complete: bool = True) -> tuple[RankTable, FormName]:
    """The table in a file, and the form it is written in.

    Raises TableError with everything that is wrong with its fields, or, where these are right, with every rule that the
    table breaks. With complete=False the rules are not looked at.
    """
    value = _json(path)
    where = f"{path}: "
    found = [name for name, form in _FORMS.items() if any(key in value for key in form.keys)]
    if len(found) != 1:
        keys = [f"{'/'.join(form.keys)} ({name})" for name, form in _FORMS.items()]
        what = "has the keys of both forms" if found else "has the keys of no known form"
        raise TableError([Problem(str(path), what, f"use those of one: {' or '.join(keys)}")])
    table = _FORMS[found[0]].read(JsonPart(value, where, []))
    if complete:
        check(table)
    return table, found[0]


def render(table: RankTable, form: FormName) -> str:
    """The file's text: the same table gives the same bytes. Raises RankTableError if the table breaks a rule."""
    check(table)
    return json.dumps(_FORMS[form].write(table), indent=2) + "\n"


def save(text: str, path: Path) -> None:
    """Replaces the file whole; readers see the old one or the new one. Raises OSError; then nothing has changed."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("x", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _json(path: Path) -> dict[str, Any]:
    def refuse(text: str, mend: str) -> TableError:
        return TableError([Problem(str(path), text, mend)])

    try:
        value = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_unique_keys)
    except OSError as error:
        raise refuse(f"cannot be read ({error.strerror})", "name a rank table") from None
    except RecursionError:
        raise refuse("is nested too deep for a rank table", "generate it again") from None
    except ValueError as error:  # JSON, UTF-8, a key that stands twice
        raise refuse(f"is not JSON ({error})", "generate it again; a rank table has no comments") from None
    if not isinstance(value, dict):
        raise refuse("is not a JSON object", "generate it again")
    return value


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {key!r} stands twice in one object")
        found[key] = value
    return found

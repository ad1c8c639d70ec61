"""`python -m ranktable gen | merge | validate | show`."""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from ranktable import local_table
from ranktable.arguments import parse_arguments
from ranktable.errors import Problem, RankTableError, SourceError, TableError
from ranktable.json_part import ip_address
from ranktable.merge import merge_global, merge_instance, with_roles
from ranktable.model import RankTable
from ranktable.sources import Recorded, Tools
from ranktable.table_file import FormName, load, render, save
from ranktable.text_view import summary, text_view

OK, INVALID = 0, 1


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code: 0, or 1 with one line on stderr for each thing to mend. Wrong usage exits with 2."""
    chosen = parse_arguments(arguments)
    try:
        return _COMMANDS[chosen.command](chosen)
    except RankTableError as error:
        print(error, file=sys.stderr)
        return INVALID


def _gen(chosen: argparse.Namespace) -> int:
    host = local_table.Host(
        server_id=chosen.server_id,
        server_ip=chosen.server_ip or ip_address(chosen.server_id),
        group_id=chosen.group_id,
        devices=chosen.devices,
    )
    if chosen.hccn_conf:
        table = local_table.from_hccn_conf(host, chosen.hccn_conf)
    elif chosen.hccn_output:
        recorded = Recorded(chosen.hccn_output, chosen.map_output, chosen.spod_output)
        table = local_table.from_source(host, recorded, chosen.generation)
    else:
        table = local_table.from_source(host, Tools(chosen.hccn_tool, chosen.npu_smi), chosen.generation)
    return _write(table, "hccl", chosen.output)


def _merge(chosen: argparse.Namespace) -> int:
    prefill, decode, hosts = (_load_all(paths) for paths in (chosen.prefill, chosen.decode, chosen.tables))
    if hosts:
        table = merge_instance(hosts, hosts[0].groups[0].group_id if chosen.group_id is None else chosen.group_id)
    else:
        table = merge_global(prefill, decode)
    return _write(table, chosen.form or "hccl", chosen.output)


def _validate(chosen: argparse.Namespace) -> int:
    code = OK
    for path in chosen.tables:
        try:
            table, form = load(path)
        except TableError as error:
            print(error, file=sys.stderr)
            code = INVALID
        else:
            print(f"{path}: valid: {summary(table, form)}")
    return code


def _show(chosen: argparse.Namespace) -> int:
    table, form = load(chosen.table, complete=chosen.form is not None)
    if chosen.form is None:
        print(text_view(table, form))
        return OK
    if chosen.form == "vllm-ascend" and form == "hccl":
        if chosen.prefill_groups is None:
            where = f"{chosen.table}: server_group_list"
            raise SourceError.of(where, "does not tell prefill from decode", "give --prefill-groups N")
        table = with_roles(table, chosen.prefill_groups)
    return _write(table, chosen.form, None)


def _load_all(paths: Sequence[Path]) -> list[RankTable]:
    """Raises TableError with the problems of all files."""
    tables: list[RankTable] = []
    problems: list[Problem] = []
    for path in paths:
        try:
            tables.append(load(path)[0])
        except TableError as error:
            problems += error.problems
    if problems:
        raise TableError(problems)
    return tables


def _write(table: RankTable, form: FormName, path: Path | None) -> int:
    text = render(table, form)
    if path is None:
        sys.stdout.write(text)
        return OK
    try:
        save(text, path)
    except OSError as error:
        raise SourceError.of(
            str(path), f"cannot be written ({error.strerror})", "name a file in a folder of yours"
        ) from None
    print(f"{path}: {summary(table, form)}")
    return OK


_COMMANDS: dict[str, Callable[[argparse.Namespace], int]] = {
    "gen": _gen,
    "merge": _merge,
    "validate": _validate,
    "show": _show,
}

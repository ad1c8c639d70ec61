"""The command line: options, and what may not go together."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TypeAlias

from ranktable.json_part import ip_address
from ranktable.table_file import FORM_NAMES

_EXIT_CODES = (
    "Exit codes: 0 all is well, 1 a table or a tool's output is not (one line for each reason), 2 wrong usage."
)
_HIGHEST_DEVICE = 4095


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Exits with status 2 and a message when they are wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m ranktable",
        description="Rank tables for Ascend NPUs: which device of which host has which rank and address.",
        epilog=_EXIT_CODES,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    gen, merge = _add_gen(commands), _add_merge(commands)
    _add_validate(commands)
    show = _add_show(commands)
    chosen = parser.parse_args(arguments)
    if chosen.command == "gen":
        _check_gen(gen, chosen)
    elif chosen.command == "merge":
        _check_merge(merge, chosen)
    elif chosen.command == "show" and chosen.prefill_groups is not None and chosen.form is None:
        show.error("--prefill-groups is for --form")
    return chosen


Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


def _add_gen(commands: Commands) -> argparse.ArgumentParser:
    gen = _add(
        commands, "gen", "write the local table of this host, or of one whose tools' output is at hand",
        "Runs npu-smi and hccn_tool, or reads what they said from files: the output for every device of the host, in "
        "the order of device ids, as `for i in {0..7}; do hccn_tool -i $i -ip -g; done` leaves it.",
    )  # fmt: skip
    gen.add_argument("--generation", required=True, choices=("a2", "a3"), help="of the NPUs; a3: in super pods")
    gen.add_argument("--server-id", required=True, metavar="ID", help="unique among hosts; most use the host's IP")
    gen.add_argument("--server-ip", type=_ip, metavar="IP", help="of the host or pod; default: the id, if it is one")
    gen.add_argument("--group-id", default="0", metavar="ID", help="of the instance (default: 0)")
    gen.add_argument(
        "--devices", type=_devices, metavar="IDS", help="to use, in the order of ranks: 0-7 or 0,2,4; default: all"
    )
    tools = gen.add_argument_group("tools to run (default)")
    tools.add_argument("--hccn-tool", default="hccn_tool", metavar="PATH")
    tools.add_argument("--npu-smi", default="npu-smi", metavar="PATH")
    files = gen.add_argument_group("files to read instead; nothing is run then")
    files.add_argument("--hccn-conf", type=Path, metavar="FILE", help="a2: /etc/hccn.conf; needs no other file")
    files.add_argument(
        "--hccn-output", type=Path, metavar="FILE", help="what hccn_tool said: a2: -i N -ip -g; a3: -i N -vnic -g"
    )
    files.add_argument("--map-output", type=Path, metavar="FILE", help="npu-smi info -m; default: devices count from 0")
    files.add_argument("--spod-output", type=Path, metavar="FILE", help="a3: npu-smi info -t spod-info -i NPU -c CHIP")
    _add_output(gen)
    return gen


def _add_merge(commands: Commands) -> argparse.ArgumentParser:
    merge = _add(
        commands, "merge", "local tables to an instance's, or to the global one",
        "TABLE...: the hosts of one instance, the master first; ranks go on from host to host. With --prefill and "
        "--decode: the global table of a deployment, a group for each file, prefill's first.",
    )  # fmt: skip
    merge.add_argument("tables", nargs="*", type=Path, metavar="TABLE", help="local tables of one instance's hosts")
    merge.add_argument("--group-id", metavar="ID", help="of the instance (default: 0)")
    for role in ("prefill", "decode"):
        merge.add_argument(
            f"--{role}",
            nargs="+",
            action="extend",
            type=Path,
            default=[],
            metavar="TABLE",
            help="one for each instance",
        )
    merge.add_argument("--form", choices=FORM_NAMES, help="of the global table (default: hccl)")
    _add_output(merge)
    return merge


def _add_validate(commands: Commands) -> None:
    validate = _add(
        commands, "validate", "say whether tables are right, and what to mend",
        "Checks fields, that ranks are dense and that ranks, devices and addresses are unique, in each table "
        "by itself.",
    )  # fmt: skip
    validate.add_argument("tables", nargs="+", type=Path, metavar="TABLE")


def _add_show(commands: Commands) -> argparse.ArgumentParser:
    show = _add(
        commands, "show", "print a table for people, or in the other form",
        "A line for each device. With --form: the same table as a file of that form.",
    )  # fmt: skip
    show.add_argument("table", type=Path, metavar="TABLE")
    show.add_argument("--form", choices=FORM_NAMES, help="print it so")
    show.add_argument(
        "--prefill-groups", type=_count, metavar="N", help="hccl's form does not tell: so many groups are prefill's"
    )
    return show


def _add(commands: Commands, name: str, summary: str, description: str) -> argparse.ArgumentParser:
    return commands.add_parser(name, help=summary, description=description, epilog=_EXIT_CODES)


def _add_output(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="replaced whole; default: to standard output")


def _check_gen(parser: argparse.ArgumentParser, chosen: argparse.Namespace) -> None:
    if not all(text.strip() and text.isprintable() for text in (chosen.server_id, chosen.group_id)):
        parser.error("--server-id and --group-id are printable text")
    if chosen.hccn_conf and chosen.generation == "a3":
        parser.error("--hccn-conf is for a2: a3's addresses inside of the super pod are not in it; use --hccn-output")
    if chosen.hccn_conf and (chosen.hccn_output or chosen.map_output or chosen.spod_output):
        parser.error("--hccn-conf needs no other file")
    if (chosen.map_output or chosen.spod_output) and not chosen.hccn_output:
        parser.error("give --hccn-output, too: nothing is run when there is a file")
    if chosen.hccn_output and (chosen.generation == "a3") != bool(chosen.spod_output):
        parser.error("--spod-output belongs to --hccn-output on a3, and to a3 alone")


def _check_merge(parser: argparse.ArgumentParser, chosen: argparse.Namespace) -> None:
    roles = (bool(chosen.prefill), bool(chosen.decode))
    if bool(chosen.tables) == any(roles):
        parser.error("give either TABLE... of one instance, or --prefill and --decode")
    if any(roles) and not all(roles):
        parser.error("--prefill and --decode belong together")
    if any(roles) and chosen.group_id is not None:
        parser.error("--group-id is for one instance; the groups of a global table are numbered")
    if chosen.tables and chosen.form == "vllm-ascend":
        parser.error("vllm-ascend's form is for global tables: give --prefill and --decode")


def _ip(text: str) -> str:
    if (found := ip_address(text)) is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not an IP address")
    return found


def _count(text: str) -> int:
    if not (text.isascii() and text.isdigit() and 0 < len(text) < 10):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0")
    return int(text)


def _devices(text: str) -> tuple[int, ...]:
    found: list[int] = []
    for item in text.split(","):
        first, dash, last = item.partition("-")
        low = _count(first)
        high = _count(last) if dash else low
        if not low <= high <= _HIGHEST_DEVICE:
            raise argparse.ArgumentTypeError(f"{item!r} is no range of devices; write 0-7")
        found += range(low, high + 1)
    if len(set(found)) != len(found):
        raise argparse.ArgumentTypeError(f"{text!r} names a device twice")
    return tuple(found)

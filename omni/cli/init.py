"""`omni_cli init`: a deployment file from a few questions, or from options alone."""

import os
import re
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Final, TypeVar, get_args

import typer

from omni.cli.clear_errors import clear_errors
from omni.cli.plain_console import plain_console
from omni.deployment.deployment_file import load_deployment
from omni.deployment.errors import ConfigError, DeploymentError
from omni.deployment.groups import Pool
from omni.deployment.model import Backend, Platform
from omni.deployment.new_file import LOOPBACK, NewFile

T = TypeVar("T")

_DEMO_MODEL: Final = "embedded:smollm2-135m"
_CODE_PATH: Final = "/opt/omni"
_LOGIN_KEYS: Final = ("id_ed25519", "id_rsa")
_MOST_GROUPS: Final = 1000
_MOST_DEVICES: Final = 1024  # of one host
_DEVICES: Final = re.compile(r"\d{1,6}(-\d{1,6})?(,\d{1,6}(-\d{1,6})?)*")

console = plain_console()


@clear_errors
def init(
    prefill: Annotated[int | None, typer.Option(min=0, max=_MOST_GROUPS, help="how many prefill groups")] = None,
    decode: Annotated[int | None, typer.Option(min=0, max=_MOST_GROUPS, help="how many decode groups")] = None,
    mixed: Annotated[int | None, typer.Option(min=0, max=_MOST_GROUPS, help="how many plain groups")] = None,
    hosts: Annotated[str | None, typer.Option(help="10.0.0.1,10.0.0.2,...: for P first, then D, then mixed")] = None,
    devices: Annotated[str | None, typer.Option(help="of each host: 0-15 or 0,1,2; none for CPUs")] = None,
    platform: Annotated[Platform | None, typer.Option(help="default: npu with devices, else cpu")] = None,
    model: Annotated[str | None, typer.Option(help=f"folder, the same on every host, or {_DEMO_MODEL}")] = None,
    backend: Annotated[Backend | None, typer.Option(help="default: ansible with other hosts, else local")] = None,
    image: Annotated[str | None, typer.Option(help="docker image (ansible, kubernetes)")] = None,
    code_path: Annotated[str | None, typer.Option(help="folder of the code on every host (ansible)")] = None,
    user: Annotated[str | None, typer.Option(help="to log in as (ansible)")] = None,
    private_key: Annotated[str | None, typer.Option(help="file to log in with (ansible)")] = None,
    name: Annotated[str | None, typer.Option(help="of the deployment; default: from the numbers, such as 4p1d")] = None,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="default: NAME.yaml here")] = None,
    force: Annotated[bool, typer.Option("--force", help="replace a file that is there")] = False,
    yes: Annotated[bool, typer.Option("-y", "--yes", help="ask nothing; take the defaults")] = False,
) -> None:
    """Write a deployment file. In a terminal, what no option says is asked for."""
    ask = _Asker(is_asking=not yes and sys.stdin.isatty())
    if output is not None and not force:
        _refuse_present(output)  # now rather than after the questions
    addresses = _hosts(hosts) if hosts is not None else ()
    where = ask.one("--backend", backend, "Backend", _backend(addresses), _one_of(Backend))
    if where == "ansible" and not addresses:
        addresses = ask.one("--hosts", None, "Hosts, with commas between, prefill's first", None, _hosts)
    numbers = _numbers(ask, prefill, decode, mixed)
    own = ask.one("--devices", devices, "Devices of each host, such as 0-7 (none: CPU)", "", _devices)
    kind = ask.one("--platform", platform, "Platform", "npu" if own else "cpu", _one_of(Platform))
    demo_model = _DEMO_MODEL if where == "local" and not own else None
    new = NewFile(
        name="",
        backend=where,
        platform=kind,
        num_groups=numbers,
        hosts=addresses or ((LOOPBACK,) if where == "local" else ()),
        devices=own,
        model_path=ask.one("--model", model, "Model folder", demo_model, _text),
    )
    _refuse(new)
    new = _with_backend_s_own(ask, new, image=image, code_path=code_path, user=user, private_key=private_key)
    default_name = output.stem if output else _name_of(numbers)

    def usable_name(text: str) -> str:
        if output is None and not force:
            _refuse_present(_default_path(text))
        return _text(text)

    new = replace(new, name=ask.one("--name", name, "Name of the deployment", default_name, usable_name))
    path = output or _default_path(new.name)
    write_new(path, new.text(), may_replace=force)
    console.print(f"{path}: {new.summary}", markup=False, soft_wrap=True)
    console.print(f"next: omni_cli plan {path}; omni_cli doctor {path}; omni_cli serve {path}", soft_wrap=True)


class _Asker:
    """Takes an option's value, else asks, else takes the default, else says which option is needed."""

    def __init__(self, *, is_asking: bool) -> None:
        self.is_asking = is_asking

    def one(self, option: str, given: str | None, question: str, default: str | None, parse: Callable[[str], T]) -> T:
        """`parse` raises DeploymentError for a value that is none. A `default` of None: there is none."""
        if given is None and self.is_asking:
            return self._asked(question, default, parse)
        value = default if given is None else given
        if value is None:
            raise DeploymentError(f"{option}: is needed; write it, or run this in a terminal to be asked")
        try:
            return parse(value)
        except DeploymentError as error:
            raise DeploymentError(f"{option}: {error}") from None

    @staticmethod
    def _asked(question: str, default: str | None, parse: Callable[[str], T]) -> T:
        while True:  # until it is good, or Ctrl-C
            answer: str = typer.prompt(question, default=default, show_default=bool(default))
            try:
                return parse(answer)
            except DeploymentError as error:
                console.print(str(error), style="red", markup=False)


def write_new(path: Path, text: str, *, may_replace: bool) -> None:
    """Writes a deployment file whole or not at all, once it is known to be good.

    Raises:
        ConfigError: the text is no good deployment file.
        DeploymentError: the file is there already, or its folder is not.
    """
    if not path.parent.is_dir():
        raise DeploymentError(f"--output: there is no folder {path.parent}; make it, or name another")
    with tempfile.TemporaryDirectory(prefix=".omni-init-", dir=path.parent) as folder:
        new = Path(folder) / path.name
        new.write_text(text, encoding="utf-8")
        try:
            load_deployment(new)
        except ConfigError as error:  # its place is a file that nobody will see
            raise ConfigError(replace(problem, place="") for problem in error.problems) from None
        try:
            new.replace(path) if may_replace else os.link(new, path)
        except FileExistsError:
            _refuse_present(path)
            raise


def _refuse_present(path: Path) -> None:
    if path.exists() or path.is_symlink():
        raise DeploymentError(f"{path} is there already; name another with --output, or add --force")


def _default_path(name: str) -> Path:
    return Path(f"{name.strip()}.yaml")


def _numbers(ask: _Asker, prefill: int | None, decode: int | None, mixed: int | None) -> dict[Pool, int]:
    """Of groups. With mixed ones alone, nobody is asked for the others."""
    if mixed and prefill is None and decode is None:
        return {"prefill": 0, "decode": 0, "mixed": mixed}

    def number(pool: Pool, given: int | None) -> int:
        text = None if given is None else str(given)
        return ask.one(f"--{pool}", text, f"Number of {pool} groups", "1", _count)

    found: dict[Pool, int] = {
        "prefill": number("prefill", prefill),
        "decode": number("decode", decode),
        "mixed": mixed or 0,
    }
    if not any(found.values()) or bool(found["prefill"]) != bool(found["decode"]):
        text = "prefill and decode groups go together, at least one each"
        raise DeploymentError(f"--prefill {found['prefill']} --decode {found['decode']}: {text}; or write --mixed")
    return found


def _with_backend_s_own(
    ask: _Asker, new: NewFile, *, image: str | None, code_path: str | None, user: str | None, private_key: str | None
) -> NewFile:
    if new.backend == "kubernetes":
        return replace(new, docker_image=ask.one("--image", image, "Docker image", None, _text))
    if new.backend != "ansible":
        return new
    chosen = ask.one("--image", image, "Docker image (none: a virtual environment on each host)", "", _maybe)
    default_code = "" if chosen else _CODE_PATH
    code = default_code if code_path is None else code_path
    login = {
        "user": ask.one("--user", user, "User to log in as", "root", _text),
        # A password is not asked for: it would be an option, or stay on the screen. The file says where it may stand.
        "private_key": ask.one("--private-key", private_key, "Private key to log in with", _login_key(), _maybe),
    }
    return replace(new, docker_image=chosen, code_path=code, local_code_path=_own_code() if code else "", login=login)


def _refuse(new: NewFile) -> None:
    """What the file's own rules would not say, or not in the words of these options."""
    if new.backend == "local" and len(new.hosts) > 1:
        raise DeploymentError("--hosts: backend local runs on this machine alone; give one address, or another backend")
    if new.platform != "cpu" and not new.devices:
        raise DeploymentError(f"--devices: platform {new.platform} needs them; write such as 0-7")
    if new.platform == "cpu" and new.devices:
        raise DeploymentError("--devices: platform cpu has none; leave them out, or write another platform")
    if new.platform == "cuda" and new.devices != tuple(range(len(new.devices))):
        raise DeploymentError("--devices: on cuda they are counted from 0; write such as 0-7")


def _backend(hosts: Sequence[str]) -> str:
    return "ansible" if any(not host.startswith("127.") and host != "localhost" for host in hosts) else "local"


def _name_of(numbers: dict[Pool, int]) -> str:
    parts = [f"{number}{pool[0]}" for pool, number in numbers.items() if number]
    return "".join(parts)


def _login_key() -> str:
    """This user's own, where there is one; "": ssh finds one."""
    found = (Path.home() / ".ssh" / name for name in _LOGIN_KEYS)
    return next((str(path) for path in found if path.is_file()), "")


def _own_code() -> str:
    """The checkout that this runs from; "" if it is installed as a wheel."""
    root = Path(__file__).parents[2]
    return str(root) if (root / "pyproject.toml").is_file() else ""


def _hosts(text: str) -> tuple[str, ...]:
    hosts = tuple(part.strip() for part in text.split(","))
    if not all(hosts):
        raise DeploymentError(f"{text!r} is not a list of hosts; write 10.0.0.1,10.0.0.2")
    if twice := [host for host in dict.fromkeys(hosts) if hosts.count(host) > 1]:
        raise DeploymentError(f"{twice[0]} stands twice; name each host once")
    return hosts


def _devices(text: str) -> tuple[int, ...]:
    """ "0-3,8" → (0, 1, 2, 3, 8)"""
    text = text.replace(" ", "")
    if not text:
        return ()
    if not _DEVICES.fullmatch(text):
        raise DeploymentError(f"{text!r} is not a list of devices; write 0-15 or 0,1,2")
    ends = [part.partition("-") for part in text.split(",")]
    ranges = [range(int(first), int(last or first) + 1) for first, _, last in ends]
    if not all(ranges) or sum(map(len, ranges)) > _MOST_DEVICES:
        raise DeploymentError(f"{text!r} names no devices or too many; write 0-15 or 0,1,2")
    return tuple(device for part in ranges for device in part)


def _one_of(kinds: Any) -> Callable[[str], Any]:
    """A parser for one of a Literal's words."""
    words = get_args(kinds)

    def parse(text: str) -> Any:
        if text.strip() not in words:
            raise DeploymentError(f"{text!r} is not known; write one of {', '.join(words)}")
        return text.strip()

    return parse


def _count(text: str) -> int:
    if not (text.strip().isdecimal() and int(text) <= _MOST_GROUPS):
        raise DeploymentError(f"{text!r} is not a number of groups; write one up to {_MOST_GROUPS}")
    return int(text)


def _text(text: str) -> str:
    if not text.strip():
        raise DeploymentError("an empty value; write one")
    return text.strip()


def _maybe(text: str) -> str:
    return text.strip()

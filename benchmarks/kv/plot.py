"""The results as a picture."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.kv.cases import BUFFER_BYTES
from benchmarks.kv.report import size_name
from benchmarks.kv.results import Measured, Result

_STYLES = {"baseline": ("--", "Greys_r"), "peer": (":", "autumn"), "ours": ("-", "tab10")}  # line, colours
_MARKERS = "osD^vPX*"


def draw(results: Sequence[Result], path: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    shown = [result for result in results if result.measured]
    figure, axes = pyplot.subplots(2, 2, figsize=(15, 11), constrained_layout=True)
    for result in shown:
        family = [other for other in shown if other.contender.family == result.contender.family]
        line, colours = _STYLES[result.contender.family]
        style = {
            "label": result.contender.name,
            "linestyle": line,
            "marker": _MARKERS[family.index(result) % len(_MARKERS)],
            "color": pyplot.get_cmap(colours)(0.8 * family.index(result) / len(family)),
        }
        for axis, scattered in ((axes[0][0], False), (axes[0][1], True)):
            measured = _of_shape(result, scattered)
            axis.plot([m.case.num_bytes for m in measured], [m.gb_per_s for m in measured], **style)
        measured = _of_shape(result, scattered=False)
        axes[1][0].plot([m.case.num_bytes for m in measured], [m.seconds * 1e6 for m in measured], **style)
    _label(axes[0][0], "one run of bytes", "GB/s", shown)
    _label(axes[0][1], "pieces of 32 KiB that lie apart", "GB/s", shown)
    _label(axes[1][0], "one run of bytes", "µs for one read", shown)
    axes[1][0].set_yscale("log")
    axes[1][0].legend(loc="upper left", fontsize="x-small", ncols=2)
    _draw_cpu(axes[1][1], shown)
    figure.suptitle("Reading KV bytes from one process into another (dashed: limits of the machine, dotted: others)")
    figure.savefig(path, dpi=80)
    pyplot.close(figure)


def _of_shape(result: Result, scattered: bool) -> list[Measured]:
    return [measured for case, measured in result.measured.items() if case.scattered is scattered]


def _label(axis: Any, title: str, unit: str, results: Sequence[Result]) -> None:
    sizes = sorted({case.num_bytes for result in results for case in result.measured})
    axis.set_xscale("log", base=2)
    axis.set_xticks(sizes, [size_name(size) for size in sizes])
    axis.set_title(title)
    axis.set_ylabel(unit)
    axis.grid(alpha=0.3)


def _draw_cpu(axis: Any, results: Sequence[Result]) -> None:
    rows = [
        (result, measured)
        for result in reversed(results)
        for case, measured in result.measured.items()
        if case.scattered and case.num_bytes == BUFFER_BYTES
    ]
    names = [result.contender.name for result, _ in rows]
    p, d = ([measured.cpu_s_per_gb[side] for _, measured in rows] for side in (0, 1))
    axis.barh(names, p, label="P")
    axis.barh(names, d, left=p, label="D")
    for row, (result, measured) in enumerate(rows):
        if result.idle_cpu is not None:
            axis.text(sum(measured.cpu_s_per_gb), row, f" idle {result.idle_cpu:.2f}", va="center", fontsize="small")
    axis.set_title(f"CPU seconds per GB ({size_name(BUFFER_BYTES)} in pieces); cores used while idle")
    axis.legend()
    axis.grid(axis="x", alpha=0.3)

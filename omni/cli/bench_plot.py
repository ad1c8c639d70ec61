"""A load test as a picture: latencies and throughput over the request rate."""

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from omni.cli.load_test import LATENCIES, PERCENTILES, Figures, Slo

_STYLES: Final = {50: "o-", 90: "s--", 99: "^:"}


def can_draw() -> bool:
    return importlib.util.find_spec("matplotlib") is not None


def draw(title: str, figures: Sequence[Figures], slo: Slo, path: Path) -> None:
    """A panel for each latency, for requests and for tokens; the SLO's limits as lines. Needs matplotlib."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    limits_ms = {"ttft": slo.ttft_ms, "tpot": slo.tpot_ms}
    drawing, axes = pyplot.subplots(2, 3, figsize=(13, 7), constrained_layout=True)
    for axis, name in zip(axes.flat, LATENCIES, strict=False):
        for number in PERCENTILES:
            values = [one.latencies_ms[name][f"p{number}"] for one in figures]
            axis.plot(range(len(figures)), values, _STYLES[number], label=f"p{number}")
        limit_ms = limits_ms.get(name)
        if limit_ms is not None:
            axis.axhline(limit_ms, color="tab:red", linewidth=1, label="SLO")
        axis.set_title(f"{name.upper()}, ms")
    _draw_requests(axes.flat[3], figures)
    axes.flat[4].plot(range(len(figures)), [one.output_tokens_per_s for one in figures], "o-", label="generated")
    axes.flat[4].plot(range(len(figures)), [one.total_tokens_per_s for one in figures], "s--", label="with prompts")
    axes.flat[4].set_title("tokens/s")
    axes.flat[5].bar(range(len(figures)), [one.num_failed for one in figures], color="tab:red")
    axes.flat[5].set_title("failed requests")
    for axis in axes.flat:
        axis.set_xticks(range(len(figures)), [one.rate for one in figures])
        axis.set_xlabel("requests/s that were sent")
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize="small")
    drawing.suptitle(title)
    drawing.savefig(path, dpi=80)
    pyplot.close(drawing)


def _draw_requests(axis: Any, figures: Sequence[Figures]) -> None:
    axis.plot(range(len(figures)), [one.requests_per_s for one in figures], "o-", label="answered")
    if all(one.goodput_per_s is not None for one in figures):
        axis.plot(range(len(figures)), [one.goodput_per_s for one in figures], "s--", label="within the SLO")
    axis.set_title("requests/s")

"""The results as a picture."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.bench_proxy.results import Results

_PANELS = (  # title, the figures as bars beside one another, their names
    ("requests/s", ("whole_per_s", "streamed_32_per_s"), ("whole", "32 chunks")),
    ("requests/s, streams of 256 chunks", ("streamed_256_per_s",), ("256 chunks",)),
    ("proxy's CPU, µs a request", ("whole_cpu_us", "streamed_32_cpu_us"), ("whole", "32 chunks")),
    ("proxy's CPU, µs a paced chunk", ("paced_light_cpu_us", "paced_cpu_us"), ("few streams", "many streams")),
    ("added latency, one request at a time, µs", ("added_p50_us", "added_p99_us"), ("p50", "p99")),
    ("memory a stream, KB", ("paced_rss_kb",), ("many streams",)),
)
_COLOURS = {
    "ours": "tab:blue",
    "vllm-router": "tab:orange",
    "router-as-is": "peachpuff",
    "nginx": "tab:grey",
    "direct": "lightgrey",
}


def draw(by_pinning: Mapping[str, Results], path: Path) -> None:
    """Six panels; of the run pinned to one core if there is one."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    pinning = "pinned" if "pinned" in by_pinning else next(iter(by_pinning))
    results = by_pinning[pinning]
    figure, axes = pyplot.subplots(2, 3, figsize=(15, 8), constrained_layout=True)
    for axis, (title, figures, names) in zip(axes.flat, _PANELS, strict=True):
        _draw_panel(axis, results, figures, names)
        axis.set_title(title)
    axes.flat[0].set_yscale("log")  # direct is far above the rest
    axes.flat[0].legend()
    where = "the proxy has one core" if pinning == "pinned" else "the proxy may use every core"
    figure.suptitle(f"Proxies before two instant engines; {where} (medians over rounds, subjects in turns)")
    figure.savefig(path, dpi=80)
    pyplot.close(figure)


def _draw_panel(axis: Any, results: Results, figures: tuple[str, ...], names: tuple[str, ...]) -> None:
    shown = [result for result in results.values() if any(result.median(figure) is not None for figure in figures)]
    width = 0.8 / max(len(shown), 1)
    for number, result in enumerate(shown):
        places = [place + (number - (len(shown) - 1) / 2) * width for place in range(len(figures))]
        heights = [result.median(figure) or 0.0 for figure in figures]
        bars = axis.bar(places, heights, width, label=result.subject, color=_COLOURS[result.subject])
        axis.bar_label(bars, fmt="%.0f" if max(heights) > 100 else "%.1f", fontsize="small")
    axis.set_xticks(range(len(names)), names)
    axis.grid(axis="y", alpha=0.3)

"""The results as a picture."""

from pathlib import Path
from typing import Any

from benchmarks.bench_serving.run import Results

_PANELS = (  # title, the figure, whether its axis is logarithmic
    ("chats: TTFT p99, ms", "chat_ttft_p99_ms", True),
    ("chats: ITL p99, ms", "chat_itl_p99_ms", True),
    ("chats: E2E p50, ms", "chat_e2e_p50_ms", True),
    ("long prompts: TTFT p50, ms", "long_ttft_p50_ms", True),
    ("long prompts: TTFT p99, ms", "long_ttft_p99_ms", True),
    ("goodput, requests/s", "goodput_per_s", False),
    ("CPU s per 1000 generated tokens", "cpu_s_per_1000_tokens", False),
)
_COLOURS = {"ours": "tab:blue", "plain": "tab:grey", "plain-chunks": "silver", "nixl": "tab:orange"}


def draw(results: Results, path: Path) -> None:
    """A panel for each figure over the loads, and one for idle CPU."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 4, figsize=(18, 8), constrained_layout=True)
    for axis, (title, name, is_logarithmic) in zip(axes.flat, _PANELS, strict=False):
        _draw_panel(axis, results, name)
        axis.set_title(title)
        if is_logarithmic and axis.patches and all(bar.get_height() > 0 for bar in axis.patches):
            axis.set_yscale("log")
    _draw_idle(axes.flat[-1], results)
    handles, labels = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels) or 1)
    figure.suptitle("The same two cores and the same requests: chats, and more and more long prompts")
    figure.savefig(path, dpi=80)
    pyplot.close(figure)


def _draw_panel(axis: Any, results: Results, name: str) -> None:
    systems = {system: of for system, of in results.systems.items() if of.loads}
    width = 0.8 / max(len(systems), 1)
    for number, (system, of) in enumerate(systems.items()):
        shift = (number - (len(systems) - 1) / 2) * width
        bars: list[tuple[float, float]] = []
        for place, load in enumerate(results.loads):
            value = of.loads[load.name].figures.get(name) if load.name in of.loads else None
            if value is not None:
                bars.append((place + shift, value))
        places, heights = [place for place, _ in bars], [height for _, height in bars]
        drawn = axis.bar(places, heights, width, label=of.title, color=_COLOURS.get(system))
        labels = [f"{height:.0f}" if height >= 100 else f"{height:.3g}" for height in heights]
        axis.bar_label(drawn, labels, fontsize="x-small")
    axis.set_xticks(range(len(results.loads)), [load.name for load in results.loads])
    axis.grid(axis="y", alpha=0.3)


def _draw_idle(axis: Any, results: Results) -> None:
    idle = {name: 100 * of.idle_cores for name, of in results.systems.items() if of.idle_cores is not None}
    drawn = axis.bar(range(len(idle)), list(idle.values()), color=[_COLOURS.get(name) for name in idle])
    axis.bar_label(drawn, fmt="%.1f")
    axis.set_xticks(range(len(idle)), list(idle))
    axis.set_title("idle: % of a core")
    axis.grid(axis="y", alpha=0.3)

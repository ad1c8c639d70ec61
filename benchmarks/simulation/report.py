"""The outcomes as tables, JSON and a picture."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from benchmarks.simulation.run import TPOT_SLO_S, TTFT_SLO_S, Case, Outcome
from services.global_proxy.policies.base import Role
from services.global_proxy.policies.registry import POLICIES


@dataclass(frozen=True)
class Row:
    """One policy of the role that is compared; the other role has its default."""

    case: Case
    role: Role
    policy: str
    outcome: Outcome


_HEAD = "TTFT p50    p99  TPOT p50    p99   goodput   within   P cached"


def table(rows: Sequence[Row]) -> list[str]:
    """A table per case: milliseconds, requests a second within both SLOs, shares."""
    lines = [f"milliseconds; goodput: requests/s with TTFT <= {TTFT_SLO_S:g} s and TPOT <= {TPOT_SLO_S * 1e3:g} ms"]
    for case, of_case in groupby(rows, key=lambda row: row.case):
        lines += ["", str(case), " " * 34 + _HEAD]
        for row in of_case:
            o = row.outcome
            times = (o.ttft_p50_s, o.ttft_p99_s, o.tpot_p50_s, o.tpot_p99_s)
            shown = "".join(
                f"{seconds * 1e3:{width}.{digits}f}" for seconds, (width, digits) in zip(times, _FORMATS, strict=True)
            )
            name = f"{row.role[0].upper()}: {row.policy}"
            lines.append(f"{name:34}{shown}{o.goodput:10.1f}{o.good_share:9.1%}{o.cached_share:11.0%}")
    return lines


_STYLES = {name: ("osD^vPX*"[i % 8], f"C{i % 10}") for i, name in enumerate(POLICIES)}
_FORMATS = ((8, 0), (7, 0), (10, 1), (7, 1))


def as_json(rows: Sequence[Row], load: float, seed: int) -> dict[str, Any]:
    return {
        "load": load,
        "seed": seed,
        "ttft_slo_s": TTFT_SLO_S,
        "tpot_slo_s": TPOT_SLO_S,
        "rows": [{**asdict(row.case), "role": row.role, "policy": row.policy, **asdict(row.outcome)} for row in rows],
    }


def draw(rows: Sequence[Row], path: Path) -> None:
    """p99 of what each role answers for, by the deployment's size; and the share within the SLOs in the last case."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    shapes = sorted({row.case.shape for row in rows})
    figure, grid = pyplot.subplots(
        len(shapes), 4, figsize=(20, 4.5 * len(shapes)), constrained_layout=True, squeeze=False
    )
    for axes, shape in zip(grid, shapes, strict=True):
        for role, what, by_size, shares in (
            ("prefill", "TTFT", axes[0], axes[2]),
            ("decode", "TPOT", axes[1], axes[3]),
        ):
            of_role = [row for row in rows if row.case.shape == shape and row.role == role]
            _draw_sizes(by_size, [row for row in of_role if not row.case.is_mixed])
            by_size.set_title(f"{shape}: p99 {what} by policy for {role}")
            last = of_role[-1].case
            _draw_shares(shares, [row for row in of_role if row.case == last])
            shares.set_title(f"{shape}, {role}, {last.num_prefill}P{last.num_decode}D{' mixed' * last.is_mixed}")
    figure.savefig(path, dpi=75)
    pyplot.close(figure)


def _draw_sizes(axis: Any, rows: Sequence[Row]) -> None:
    """Where there is a choice."""
    sizes = [(row.case.num_prefill if row.role == "prefill" else row.case.num_decode, row) for row in rows]
    for policy in sorted({row.policy for row in rows}):
        points = [(size, row.outcome) for size, row in sizes if row.policy == policy and size > 1]
        style = dict(zip(("marker", "color"), _STYLES[policy], strict=True))
        role = rows[0].role
        p99_ms = [1e3 * (o.ttft_p99_s if role == "prefill" else o.tpot_p99_s) for _, o in points]
        axis.plot([size for size, _ in points], p99_ms, label=policy, **style)
    axis.set_xscale("log", base=2)
    shown = sorted({size for size, _ in sizes if size > 1})
    axis.set_xticks(shown, [str(size) for size in shown])
    axis.set_ylim(bottom=0)
    axis.set_xlabel("instances")
    axis.set_ylabel("ms")
    axis.grid(alpha=0.3)
    axis.legend(fontsize="x-small", ncols=2, framealpha=0.5)


def _draw_shares(axis: Any, rows: Sequence[Row]) -> None:
    colours = [_STYLES[row.policy][1] for row in rows]
    axis.barh([row.policy for row in rows], [row.outcome.good_share * 100 for row in rows], color=colours)
    axis.set_xlim(0, 100)
    axis.set_xlabel("% of requests within both SLOs")
    axis.invert_yaxis()
    axis.grid(axis="x", alpha=0.3)

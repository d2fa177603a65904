"""Results as pictures: who takes how much longer, and how near the machine's limits ours comes."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from bench.rivals import OURS
from bench.show.results_file import Results, Row
from bench.show.tables import headline, over_floor, rows_of
from bench.workloads import MODES

# A family is drawn by its fastest member.
FAMILIES = {
    "Python loop": ("#9a9a9a", "s", ("loop",)),
    "vmap": ("#c28f2c", "D", ("vmap",)),
    "PyPI packages": ("#8d6cab", "v", ("hypnettorch", "hyperlight", "hyper-nn")),
    "bmm": ("#4c8fc0", "o", ("bmm",)),
    "compiled bmm": ("#1b4f8a", "o", ("bmm compiled", "bmm by layer compiled")),
    "JAX": ("#3f9a6b", "^", ("jax",)),
}
ACCENT = "#d1495b"
INK = "#2b2b2b"


def fastest(by_rival: dict[str, Row], names: Iterable[str]) -> Row | None:
    """The row of least time among these that has a ratio."""
    rows = [by_rival[name] for name in names if by_rival.get(name, {}).get("ratio") is not None]
    return min(rows, key=lambda row: row["ratio"], default=None)


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams.update(
        {
            "font.size": 9.5,
            "axes.edgecolor": "#bbbbbb",
            "text.color": INK,
            "axes.labelcolor": INK,
            "xtick.color": INK,
            "ytick.color": INK,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "svg.hashsalt": "hyperfast",  # the same numbers make the same file
        }
    )
    from matplotlib import pyplot

    return pyplot


def _save(pyplot: Any, figure: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    metadata = {"Date": None} if path.suffix == ".svg" else {"Software": None}
    figure.savefig(path, metadata=metadata, dpi=160, facecolor="white")
    pyplot.close(figure)


def speed(results: Results, path: Path) -> None:
    """A line a workload, a mark a family of rivals, at how many times longer it takes; the number
    is the ratio to the fastest of all."""
    pyplot = _pyplot()
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    workloads = list(results["workloads"])
    height = 1.75 + 0.4 * len(workloads)
    figure, axes = pyplot.subplots(1, len(MODES), figsize=(11, height), sharey=True)
    for mode, axis in zip(MODES, axes, strict=True):
        rows = rows_of(results, mode)
        axis.set_xscale("log")
        for y, workload in enumerate(workloads):
            found = {
                family: row
                for family, (_, _, members) in FAMILIES.items()
                if (row := fastest(rows.get(workload, {}), members))
            }
            if not found:
                axis.text(1, y, "  not a training task", va="center", color="#999999", fontsize=8)
                continue
            ratios = [row["ratio"] for row in found.values()]
            best = min(ratios)
            axis.plot([min(1, best), max(ratios)], [y, y], color="#e3e3e3", lw=2, zorder=1)
            for family, row in found.items():
                color, marker, _ = FAMILIES[family]
                axis.plot(
                    row["ratio"], y, marker, color=color, ms=7, mec="white", mew=0.6, zorder=3
                )
            axis.text(
                1.015, y, f"{best:.2f}x" if best < 10 else f"{best:.0f}x", va="center",
                transform=axis.get_yaxis_transform(), weight="bold",
                color=ACCENT if best >= 1 else INK,
            )  # fmt: skip
        axis.axvline(1, color=ACCENT, lw=1.6, zorder=2)
        low, high = axis.get_xlim()
        axis.set_xlim(min(low, 0.8), max(high, 2.2))
        axis.xaxis.set_major_locator(LogLocator(base=10, subs=(1, 2, 5)))
        axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}x"))
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.xaxis.grid(color="#f0f0f0")
        axis.set_axisbelow(True)
        axis.set_yticks(range(len(workloads)), workloads)
        axis.tick_params(axis="y", length=0)
        axis.set_ylim(len(workloads) - 0.5, -0.6)
        axis.set_title(mode, loc="left", weight="bold", fontsize=11)
        axis.text(
            1.015, -0.95, "to the fastest", transform=axis.get_yaxis_transform(), fontsize=7.5,
            color="#777777",
        )  # fmt: skip
        axis.set_xlabel(f"time relative to {OURS}")
    marks = [
        pyplot.Line2D([], [], color=color, marker=marker, ls="", ms=7, label=family)
        for family, (color, marker, _) in FAMILIES.items()
    ]
    marks.append(pyplot.Line2D([], [], color=ACCENT, lw=1.6, label=OURS))
    figure.legend(handles=marks, loc="upper center", ncols=len(marks), frameon=False)
    figure.text(0.5, 0.012, headline(results), ha="center", fontsize=7, color="#777777")
    figure.tight_layout(rect=(0, 0.035, 1, 1 - 0.32 / height), w_pad=3)
    _save(pyplot, figure, path)


def roofline(results: Results, path: Path) -> None:
    """FLOPs a byte of compulsory traffic against FLOPs a second, under the measured ceilings; the
    stems lead down, or up, to the fastest rival. The list says how many times over the floor, which
    is the time at the nearer ceiling, the two modes take."""
    pyplot = _pyplot()
    peak, read = (results["ceilings"][name] for name in ("gflops", "read_gbytes"))
    figure, axes = pyplot.subplots(1, len(MODES), figsize=(12.5, 4.9), sharey=True, sharex=True)
    facts = results["workloads"]
    work = {
        (name, mode): fact["flops"][mode] / fact["bytes"][mode]
        for name, fact in facts.items()
        for mode in fact["flops"]
    }
    left, right = min(work.values()) / 2, max(*work.values(), peak / read) * 4
    floors: dict[str, list[str]] = {name: [] for name in facts}
    for mode, axis in zip(MODES, axes, strict=True):
        axis.set_xscale("log")
        axis.set_yscale("log")
        corner = peak / read
        axis.plot([left, corner, right], [left * read, peak, peak], color=INK, lw=1.5)
        axis.text(
            right, peak * 1.06, f"{peak:.0f} GFLOP/s in products of floats", fontsize=8,
            ha="right", va="bottom",
        )  # fmt: skip
        axis.annotate(
            f"{read:.0f} GB/s read", (corner / 3, peak / 3), xytext=(-6, 4), ha="right",
            textcoords="offset points", fontsize=8,
        )  # fmt: skip
        for number, name in enumerate(facts, 1):
            by_rival = rows_of(results, mode).get(name, {})
            if OURS not in by_rival:
                continue
            floors[name].append(f"{over_floor(by_rival[OURS], results['ceilings']):.1f}x")
            x, y = work[name, mode], by_rival[OURS]["gflops"]
            rival = fastest(by_rival, [n for _, _, names in FAMILIES.values() for n in names])
            if rival:
                axis.plot([x, x], [rival["gflops"], y], color="#d5d5d5", lw=1.4, zorder=1)
                axis.plot(x, rival["gflops"], "o", color="#1b4f8a", ms=5, mec="white", zorder=2)
            axis.plot(x, y, "o", color=ACCENT, ms=13, mec="white", zorder=3 + number)
            axis.text(
                x, y, str(number), color="white", weight="bold", fontsize=7, zorder=3 + number,
                ha="center", va="center_baseline",
            )  # fmt: skip
        axis.set_xlim(left, right)
        axis.grid(color="#f2f2f2", which="major")
        axis.set_axisbelow(True)
        axis.set_title(mode, loc="left", weight="bold", fontsize=11)
        axis.set_xlabel("FLOP per byte of compulsory traffic")
    axes[0].set_ylabel("GFLOP/s")
    marks = [
        pyplot.Line2D([], [], color=ACCENT, marker="o", ls="", ms=8, label=OURS),
        pyplot.Line2D([], [], color="#1b4f8a", marker="o", ls="", ms=5, label="fastest rival"),
    ]
    figure.legend(handles=marks, loc="upper center", ncols=2, frameon=False)
    figure.text(0.5, 0.012, headline(results), ha="center", fontsize=7, color="#777777")
    lines = ["    over the floor", *(
        f"{number:>2}  {name:<13}{''.join(f'{times:>6}' for times in floors[name])}"
        for number, name in enumerate(facts, 1)
    )]  # fmt: skip
    figure.text(
        0.815, 0.9, "\n".join(lines), va="top", linespacing=1.7, family="monospace", fontsize=8
    )
    figure.tight_layout(rect=(0, 0.03, 0.81, 0.95))
    _save(pyplot, figure, path)

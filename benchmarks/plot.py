"""Plots of a record: `python benchmarks/plot.py RESULT.json OUT_DIR`. Needs matplotlib.

  floor.png     the shapes of the suite llama: time over the floor's, with the target
  roofline.png  every shape: operations a second over operations a byte, under copy speed and peak
  speedup.png   the suite sweep_k: bf16's time over ours, by K
  small_m.png   the suite small_m: int8_linear's bytes over the time, by M

A plot whose suite the record lacks is not drawn, and the script says so.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import matplotlib

matplotlib.use("Agg")

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from int8_ops._bench import record as records
from int8_ops._bench.record import Row
from int8_ops._bench.shapes import LINEAR_SUITES, SMALL_M_SIZES, SWEEP_M, SWEEP_N

DPI = 150
# A peer looks the same in every plot: (colour, marker, label). Readable without colour, too.
STYLES = {
    "cuda": ("#0b6e4f", "o", "int8_linear"),
    "cuda mm": ("#4fb286", "s", "int8_scaled_mm (x is int8 already)"),
    "bf16": ("#c1440e", "X", "bf16 F.linear"),
    "mma.sync": ("#3d5a98", "^", "int8_linear on mma.sync"),
    "mma.sync mm": ("#8fa8d6", "v", "int8_scaled_mm on mma.sync"),
    "triton": ("#7b5ea7", "D", "our Triton"),
    "int_mm": ("#8d8d8d", "P", "_int_mm + eager"),
    "int_mm compiled": ("#5c5c5c", "p", "_int_mm + torch.compile"),
}
SUITE_COLOURS = {"llama": "#0b6e4f", "small_m": "#d08c00", "sweep_k": "#3d5a98"}


class NothingToDraw(Exception):
    """The record holds nothing of what the plot shows."""


def title(record: Mapping[str, Any], text: str) -> str:
    """The title of a plot, with the device and the commit below it."""
    facts = record["facts"]
    return f"{text}\n{facts['device']}, torch {facts['torch']}, commit {facts['commit']}"


def of_suite(record: Mapping[str, Any], suite: str) -> list[Row]:
    """The measured shapes of a suite that have a time of ours. Raises NothingToDraw without any."""
    found = [row for row in records.of_suite(records.rows(record), suite) if "cuda" in row.us]
    if not found:
        raise NothingToDraw("the record has no shape of this suite")
    return found


def plain_ticks(axis: Any, values: Sequence[float]) -> None:
    """Exactly these ticks, as plain numbers, on an axis that may be logarithmic."""
    axis.set_major_locator(FixedLocator(list(values)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def columns(points: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    """The xs and the ys."""
    return [x for x, _ in points], [y for _, y in points]


def log_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times the powers of ten within the limits; the powers alone over a wide range."""
    steps = (1, 2, 5) if high / low < 2000 else (1,)
    ticks = [step * 10.0**power for power in range(-3, 7) for step in steps]
    return [tick for tick in ticks if low <= tick <= high]


def floor_plot(record: Mapping[str, Any]) -> Figure:
    """A line a shape: each peer's time over the floor, which is 1, and the target as a bar."""
    found = of_suite(record, "llama")[::-1]
    drawn = ("int_mm", "int_mm compiled", "triton", "mma.sync", "bf16", "cuda")
    present = [name for name in drawn if any(name in row.us for row in found)]
    figure = Figure(figsize=(10, 1.9 + 0.42 * len(found)), layout="constrained")
    axes = figure.subplots()
    bar = {"lw": 2.4, "solid_capstyle": "butt", "zorder": 2}
    axes.axvline(1, color="black", **bar)
    most = 1.0
    for y, row in enumerate(found):
        over = {name: row.us[name] / row.floor_us for name in present if name in row.us}
        most = max(most, *over.values())
        gap = {"lw": 5, "solid_capstyle": "butt", "zorder": 1}
        axes.plot([1, over["cuda"]], [y, y], color="#0b6e4f", alpha=0.25, **gap)
        if row.target is not None:
            at = row.target.linear_us / row.floor_us
            axes.plot([at, at], [y - 0.34, y + 0.34], color="#d08c00", **bar)
        for order, (name, x) in enumerate(over.items()):
            colour, marker, _ = STYLES[name]
            style = {"color": colour, "ms": 7, "mec": "white", "mew": 0.7}
            axes.plot(x, y, marker, zorder=3 + order, **style)
    axes.set_xscale("log")
    axes.set_xlim(0.94, 1.15 * most)
    axes.set_ylim(-0.7, len(found) - 0.3)
    plain_ticks(axes.xaxis, [tick for tick in (1, 1.5, 2, 3, 5, 10, 20, 50, 100) if tick < most])
    axes.set_yticks(range(len(found)), [str(row.shape) for row in found])
    axes.set_ylabel("M, K, N")
    axes.set_xlabel("time over the floor's, quantizing included (log scale; less is better)")
    axes.grid(axis="x", alpha=0.3)
    right = axes.secondary_yaxis("right")
    right.set_yticks(
        range(len(found)), [f"{row.us['cuda']:.1f} of {row.floor_us:.1f} us" for row in found]
    )
    right.tick_params(length=0)
    handles = [Line2D([], [], color="black", lw=2.4, label="floor")]
    if any(row.target for row in found):
        handles.append(Line2D([], [], color="#d08c00", lw=2.4, label="target"))
    handles += [
        Line2D([], [], color=STYLES[n][0], marker=STYLES[n][1], ls="", ms=7, label=STYLES[n][2])
        for n in reversed(present)
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False)
    axes.set_title(title(record, "int8_linear against its floor"))
    return figure


def roofline_plot(record: Mapping[str, Any]) -> Figure:
    """Operations a second over operations a byte of every shape, ours and bf16's."""
    found = {}
    for name in LINEAR_SUITES:
        with contextlib.suppress(NothingToDraw):
            found[name] = of_suite(record, name)
    if not found:
        raise NothingToDraw("the record has no time of ours")

    def at(row: Row, peer: str) -> tuple[float, float]:
        return row.shape.ops / row.shape.linear_bytes, 1e-6 * row.shape.ops / row.us[peer]

    points = {
        (name, peer): [at(row, peer) for row in rows if peer in row.us]
        for name, rows in found.items()
        for peer in ("cuda", "bf16")
    }
    every = [point for several in points.values() for point in several]
    left, right = min(x for x, _ in every) / 1.6, max(x for x, _ in every) * 1.6
    copy_tb, peak = 1e-3 * record["facts"]["copy_gb_per_s"], record["facts"]["floor_int8_tops"]
    top = right * copy_tb if peak is None else min(peak, right * copy_tb)
    bottom = min(y for _, y in every) / 1.6

    figure = Figure(figsize=(9, 6.2), layout="constrained")
    axes = figure.subplots()
    axes.plot([left, top / copy_tb, right], [left * copy_tb, top, top], color="black", lw=1.8)
    # Ends above the sloped roof, so that the whole of it does.
    x = (left * top / copy_tb) ** 0.5
    axes.text(x, 1.3 * x * copy_tb, f"copy speed, {copy_tb:.2f} TB/s", ha="right", fontsize=9)
    if peak is not None:
        axes.text(right / 1.05, top * 1.1, f"int8 peak, {peak:g} TOPS", ha="right", fontsize=9)
    labels = {"llama": "Llama shapes", "small_m": "M = 1 to 64", "sweep_k": "sweep of K"}
    for (name, peer), several in points.items():
        marker, label, order = ("o", "ours", 3) if peer == "cuda" else ("x", "bf16", 2)
        style = {"color": SUITE_COLOURS[name], "ms": 6, "mew": 0.6 if peer == "cuda" else 1.2}
        edge = {"mec": "white"} if peer == "cuda" else {"alpha": 0.75}
        label = f"{label}, {labels[name]}"
        axes.plot(*columns(several), marker, label=label, zorder=order, **style, **edge)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(left, right)
    axes.set_ylim(bottom, 2 * top)
    plain_ticks(axes.xaxis, log_ticks(left, right))
    plain_ticks(axes.yaxis, log_ticks(bottom, 2 * top))
    axes.set_xlabel("operations a byte that int8_linear must move (log scale)")
    axes.set_ylabel("TOPS, quantizing included (log scale)")
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right", frameon=True, fontsize=9)
    axes.set_title(title(record, "int8_linear under the roofline"))
    return figure


def speedup_plot(record: Mapping[str, Any]) -> Figure:
    """bf16's time over ours by K, and over the floor, which nothing can pass."""
    found = [row for row in of_suite(record, "sweep_k") if "bf16" in row.us]
    if not found:
        raise NothingToDraw("the record has no bf16 time in this suite")
    figure = Figure(figsize=(9, 5.6), layout="constrained")
    axes = figure.subplots()
    ks = [row.shape.k for row in found]
    best = [row.us["bf16"] / row.floor_us for row in found]
    axes.plot(ks, best, "--", color="black", lw=1.4, label="the floor of int8_linear")
    for name in ("cuda", "cuda mm", "mma.sync", "mma.sync mm"):
        points = [(row.shape.k, row.us["bf16"] / row.us[name]) for row in found if name in row.us]
        if points:
            colour, marker, label = STYLES[name]
            axes.plot(*columns(points), f"-{marker}", color=colour, ms=6, label=label)
    axes.axhline(1, color=STYLES["bf16"][0], lw=1.4, label=STYLES["bf16"][2])
    axes.set_xscale("log", base=2)
    plain_ticks(axes.xaxis, ks)
    axes.tick_params(axis="x", labelrotation=45)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("K (log scale)")
    axes.set_ylabel("bf16's time over ours (more is better)")
    axes.grid(alpha=0.3)
    axes.legend(loc="best", frameon=True, fontsize=9)
    axes.set_title(title(record, f"Speedup over bf16 at M = {SWEEP_M}, N = {SWEEP_N}"))
    return figure


def small_m_plot(record: Mapping[str, Any]) -> Figure:
    """A panel a weight: bytes a second by M against copy speed.

    The bytes are int8_linear's for each peer, so that more is always less time: bf16, which moves
    twice as many, cannot pass half of copy speed.
    """
    found = of_suite(record, "small_m")
    figure = Figure(figsize=(10, 7.4), layout="constrained")
    grid = figure.subplots(2, 2, sharex=True, sharey=True)
    copy_tb = 1e-3 * record["facts"]["copy_gb_per_s"]
    drawn = [n for n in ("cuda", "mma.sync", "bf16") if any(n in row.us for row in found)]
    for axes, (k, n) in zip(grid.flat, SMALL_M_SIZES, strict=True):
        rows = [row for row in found if (row.shape.k, row.shape.n) == (k, n)]
        axes.axhline(copy_tb, color="black", ls="--", lw=1.2)
        for name in drawn:
            colour, marker, _ = STYLES[name]
            points = [
                (row.shape.m, 1e-6 * row.shape.linear_bytes / row.us[name])
                for row in rows
                if name in row.us
            ]
            if points:
                axes.plot(*columns(points), f"-{marker}", color=colour, ms=6)
        axes.set_title(f"K = {k}, N = {n}", fontsize=10)
        axes.grid(alpha=0.3)
        label_small_m(axes, sorted({row.shape.m for row in found}))
    for axes in grid[1]:
        axes.set_xlabel("M (log scale)")
    for axes in grid[:, 0]:
        axes.set_ylabel("TB/s of int8_linear's bytes")
    handles = [Line2D([], [], color="black", ls="--", lw=1.2, label=f"copy, {copy_tb:.2f} TB/s")]
    for name in drawn:
        colour, marker, label = STYLES[name]
        handles.append(Line2D([], [], color=colour, marker=marker, ms=6, label=label))
    figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False)
    figure.suptitle(title(record, "Few rows: how fast the weight is streamed"), fontsize=12)
    return figure


def label_small_m(axes: Axes, ms: Sequence[int]) -> None:
    """The M axis of a panel."""
    axes.set_xscale("log", base=2)
    plain_ticks(axes.xaxis, ms)
    axes.set_ylim(bottom=0)


PLOTS: dict[str, Callable[[Mapping[str, Any]], Figure]] = {
    "floor": floor_plot,
    "roofline": roofline_plot,
    "speedup": speedup_plot,
    "small_m": small_m_plot,
}


def draw(record: Mapping[str, Any], folder: Path) -> list[Path]:
    """Write each plot that the record has data for; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, plot in PLOTS.items():
        try:
            figure = plot(record)
        except NothingToDraw as reason:
            print(f"{name}: not drawn: {reason}")
            continue
        path = folder / f"{name}.png"
        # Without the version of matplotlib in it, which would change the file and nothing in it.
        figure.savefig(path, dpi=DPI, metadata={"Software": None})
        print(f"{name}: {path}")
        written.append(path)
    return written


def main(argv: Sequence[str] | None = None) -> int:
    """Draw the plots of the record named: 1 if it has data for none."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("result", type=Path, metavar="RESULT.json")
    parser.add_argument("folder", type=Path, metavar="OUT_DIR")
    args = parser.parse_args(argv)
    return 0 if draw(records.load(args.result), args.folder) else 1


if __name__ == "__main__":
    sys.exit(main())

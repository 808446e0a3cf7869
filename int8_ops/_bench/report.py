"""Tables: one definition of their columns, for a terminal (line by line) and for Markdown."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .peers import NAMES, OWN, OWN_MM, PEERS
from .record import Row, ratio
from .shapes import EAGER_SHAPE, HOST_SHAPE

# Where a path for one architecture loses to what it replaces, by more than what replays scatter.
SLACK = 0.03


def number(value: float | None, digits: int = 1) -> str:
    """A cell: the number, or a dash where nothing was measured."""
    return "-" if value is None else f"{value:.{digits}f}"


@dataclass(frozen=True)
class Column:
    """A head, and the cell that a row has there."""

    head: str
    cell: Callable[[Row], str]


def own_peer(names: Iterable[str], candidates: Sequence[str]) -> str | None:
    """Whose ratios and share of the floor are shown: this library's kernels, else its Triton's."""
    present = set(names)
    return next((name for name in candidates if name in present), None)


def _time(peer: str) -> Column:
    return Column(peer, lambda row: number(row.us.get(peer)))


def _speedup(own: str) -> Column:
    return Column("x bf16", lambda row: number(ratio(row.us.get("bf16"), row.us.get(own)), 2))


def _verdict(row: Row, own: str, *, mm: bool) -> str:
    us = row.us.get(own)
    if row.target is None or us is None:
        return "-"
    wanted = row.target.mm_us if mm else row.target.linear_us
    return f"{wanted:g} {'met' if us <= wanted else 'missed'}"


def linear_columns(names: Sequence[str], *, targets: bool) -> list[Column]:
    """``us | baseline us | x baseline | % floor`` of int8_linear, then the floor and the peers."""
    shown = [p.name for p in PEERS if not p.prequantized and p.name in names]
    own = own_peer(shown, OWN)
    if own is None:
        return [_time(name) for name in shown]
    columns = [
        _time(own),
        _time("bf16"),
        _speedup(own),
        Column("% floor", lambda row: number(row.percent_of_floor(own), 0)),
        Column("floor", lambda row: number(row.floor_us)),
    ]
    if targets:
        columns.append(Column("target", lambda row: _verdict(row, own, mm=False)))
    return [*columns, *(_time(name) for name in shown if name not in (own, "bf16"))]


def mm_columns(names: Sequence[str], *, targets: bool) -> list[Column]:
    """The same of int8_scaled_mm, x being int8 already, with its rate; none without such a peer."""
    shown = [p.name for p in PEERS if p.prequantized and p.name in names]
    own = own_peer(shown, OWN_MM)
    if own is None:
        return [_time(name) for name in shown]
    columns = [
        _time(own),
        _time("bf16"),
        _speedup(own),
        Column("% floor", lambda row: number(row.percent_of_floor(own, mm=True), 0)),
        Column("floor", lambda row: number(row.mm_floor_us)),
        # Operations a microsecond are 10^-6 TOPS.
        Column("TOPS", lambda row: number(ratio(1e-6 * row.shape.ops, row.us.get(own)))),
    ]
    if targets:
        columns.append(Column("target", lambda row: _verdict(row, own, mm=True)))
    return [*columns, *(_time(name) for name in shown if name != own)]


def names_of(found: Iterable[Row]) -> list[str]:
    """The peers that have a time in any of the rows, in their usual order."""
    present = {name for row in found for name in row.us}
    return [name for name in NAMES if name in present]


# -- the terminal ---------------------------------------------------------------------------------


class Table:
    """Aligned lines, each printed as soon as it is known."""

    def __init__(self, heads: Sequence[str], min_width: int = 7) -> None:
        """Print the head."""
        self.widths = [max(min_width, len(head)) for head in heads]
        self.line(heads)
        print("-+-".join("-" * width for width in self.widths), flush=True)

    def line(self, cells: Sequence[str]) -> None:
        """Print one line; a cell a column."""
        aligned = (cell.rjust(width) for cell, width in zip(cells, self.widths, strict=True))
        print(" | ".join(aligned), flush=True)


class LinearTable:
    """A table of rows on the terminal: ``M K N``, then the columns."""

    def __init__(self, columns: Sequence[Column]) -> None:
        """Print the head."""
        self.columns = columns
        # As wide as the longest cell of a column: 'missed' after a target.
        heads = [column.head.rjust(12 if column.head == "target" else 0) for column in columns]
        self._table = Table([f"{'M':>5} {'K':>5} {'N':>5}", *heads])

    def row(self, row: Row) -> None:
        """Print one line."""
        m, k, n = row.shape
        self._table.line([f"{m:5} {k:5} {n:5}", *(column.cell(row) for column in self.columns)])


def print_mm_table(found: Sequence[Row], names: Sequence[str]) -> None:
    """The table of the peers that are given x as int8, if any of them ran."""
    columns = mm_columns(names, targets=any(row.target for row in found))
    if not columns:
        return
    print("\nint8_scaled_mm on an input that is int8 already, us a call")
    table = LinearTable(columns)
    for row in found:
        table.row(row)


def slower_than_replaced(found: Iterable[Row]) -> list[str]:
    """Shapes where ours loses, by more than ``SLACK``, to what a user would have instead."""
    lost = []
    for row in found:
        for own, peers in (("cuda", ("bf16", "mma.sync")), ("cuda mm", ("bf16", "mma.sync mm"))):
            others = {name: row.us[name] for name in peers if name in row.us}
            if own not in row.us or not others:
                continue
            best = min(others, key=lambda name: others[name])
            over = row.us[own] / others[best] - 1
            if over > SLACK:
                lost.append(f"({row.shape}) {own}: {100 * over:.0f} % slower than {best}")
    return lost


def print_summary(found: Sequence[Row]) -> None:
    """What the tables come to: the targets missed, and where ours is the slower choice."""
    for own, mm in (("cuda", False), ("cuda mm", True)):
        aimed = [row for row in found if row.target is not None and own in row.us]
        missed = [row for row in aimed if "missed" in _verdict(row, own, mm=mm)]
        if aimed:
            listed = "".join(f"\n  ({row.shape})" for row in missed)
            print(f"\n{own}: {len(aimed) - len(missed)} of {len(aimed)} targets met", end="")
            print(f"; missed:{listed}" if missed else "")
    if any("cuda" in row.us or "cuda mm" in row.us for row in found):
        lost = slower_than_replaced(found)
        print(f"\nover {100 * SLACK:.0f} % slower than the better of bf16 and mma.sync: ", end="")
        print("".join(f"\n  {line}" for line in lost) if lost else "nowhere", flush=True)


# -- Markdown -------------------------------------------------------------------------------------


def markdown(heads: Sequence[str], lines: Iterable[Sequence[str]]) -> list[str]:
    """The lines of a Markdown table."""
    return [
        f"| {' | '.join(heads)} |",
        f"|{'---|' * len(heads)}",
        *(f"| {' | '.join(cells)} |" for cells in lines),
    ]


def markdown_rows(
    found: Sequence[Row], columns: Sequence[Column], labels: Mapping[str, str] | None = None
) -> list[str]:
    """Rows as a Markdown table; ``labels`` rename heads."""
    labels = labels or {}
    heads = [labels.get(column.head, column.head) for column in columns]
    cells = ([str(row.shape), *(column.cell(row) for column in columns)] for row in found)
    return markdown(["M, K, N", *heads], cells)


def quantize_cells(line: Mapping[str, Any], backend: str) -> list[str]:
    """us, GB/s and percent of the copy bandwidth of a backend in a line of ``quantize``."""
    measured = line.get(backend)
    if measured is None:
        return ["-", "-", "-"]
    return [
        number(measured["us"]),
        number(measured["gb_per_s"], 0),
        number(measured["percent_of_copy"], 0),
    ]


def host_lines(record: Mapping[str, Any]) -> list[list[str]]:
    """The eager calls of a record: what, us, and times ``F.linear``'s."""
    kinds = (
        ("host_us", f"host alone ({HOST_SHAPE})"),
        ("eager_us", f"whole call ({EAGER_SHAPE})"),
    )
    return [
        [f"{name}, {what}", number(us, 2), number(us / record[key]["F.linear"], 2)]
        for key, what in kinds
        for name, us in record.get(key, {}).items()
    ]

"""The JSON of a run: written as it grows, read back for tables and plots."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .shapes import LINEAR_SUITES, TARGET_DEVICE, TARGETS, Shape, Target, floor_us


class RecordFile:
    """What has been measured so far, written whole after every line if there is a path.

    A run that is cut short leaves what it has; ``not_run`` then tells what it has not.
    """

    def __init__(self, path: Path | None) -> None:
        """Nothing measured yet, nothing written."""
        self.path = path
        self.data: dict[str, Any] = {"facts": {}}

    def save(self) -> None:
        """Write the file, so that it is never seen half written."""
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_name(f"{self.path.name}.part")
        partial.write_text(json.dumps(self.data, indent=1) + "\n")
        os.replace(partial, self.path)


@dataclass(frozen=True)
class Row:
    """A shape with each peer's time in us, and the floors of its two kinds."""

    shape: Shape
    us: Mapping[str, float]
    floor_us: float
    mm_floor_us: float
    target: Target | None = None

    def percent_of_floor(self, peer: str, *, mm: bool = False) -> float | None:
        """The floor's share of the peer's time, in percent; None where there is no time."""
        share = ratio(self.mm_floor_us if mm else self.floor_us, self.us.get(peer))
        return None if share is None else 100 * share

    def as_json(self) -> dict[str, Any]:
        """The row as a record holds it."""
        return {
            **self.shape._asdict(),
            "floor_us": self.floor_us,
            "mm_floor_us": self.mm_floor_us,
            "us": dict(self.us),
        }


def ratio(value: float | None, base: float | None) -> float | None:
    """``value / base``, or None where either is missing."""
    return None if value is None or base is None else value / base


def make_row(
    shape: Shape,
    us: Mapping[str, float],
    copy_bytes_per_s: float,
    peak_tops: float | None,
    device_name: str,
) -> Row:
    """The row with its floors, and with the target if the device is the one that has targets."""
    return Row(
        shape,
        us,
        floor_us(shape.linear_bytes, shape.ops, copy_bytes_per_s, peak_tops),
        floor_us(shape.mm_bytes, shape.ops, copy_bytes_per_s, peak_tops),
        TARGETS.get(shape) if TARGET_DEVICE in device_name else None,
    )


def load(path: Path) -> dict[str, Any]:
    """A record as it was written."""
    data: dict[str, Any] = json.loads(path.read_text())
    return data


def rows(record: Mapping[str, Any]) -> list[Row]:
    """The shapes of a record of a CUDA device, in the order of their measurement."""
    facts = record["facts"]
    return [
        make_row(
            Shape(line["m"], line["k"], line["n"]),
            line["us"],
            1e9 * facts["copy_gb_per_s"],
            facts["floor_int8_tops"],
            facts["device"],
        )
        for line in record["linear"]
    ]


def of_suite(found: Iterable[Row], suite: str) -> list[Row]:
    """The measured shapes of a suite, in its order.

    A shape may be in several suites. A suite of which nothing was measured but what an earlier one
    has too was not run, and has none.
    """
    by_shape = {row.shape: row for row in found}
    own = set(LINEAR_SUITES[suite].shapes)
    for name in itertools.takewhile(lambda name: name != suite, LINEAR_SUITES):
        own -= set(LINEAR_SUITES[name].shapes)
    if not own & set(by_shape):
        return []
    return [by_shape[shape] for shape in LINEAR_SUITES[suite].shapes if shape in by_shape]

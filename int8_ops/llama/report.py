"""What a conversion did, in numbers: printable, JSON, and as plots (SVG, nothing to install)."""

from __future__ import annotations

import dataclasses
import html
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .spec import LayerSpec, stream_bits, stream_rank

__all__ = ["ConversionReport", "StreamReport", "plot_lines"]


@dataclass(frozen=True)
class StreamReport:
    """One layer's keys or values.

    Attributes:
        rank: numbers a token and group.
        full_rank: the most it could be.
        bits: "8", "4", or "8+4" for two slices.
        slices: ``[[bits, rank], ...]``.
        bytes: a token, scales included.
        predicted: loss by storing this stream so, nats a token; None where the objective has none.
    """

    rank: int
    full_rank: int
    bits: str
    slices: list[list[int]]
    bytes: int
    predicted: float | None


@dataclass(frozen=True)
class LayerReport:
    """One layer; ``measured`` is its own loss in nats a token, the rest of the model unconverted.

    A mean Kullback-Leibler divergence from the unconverted model's predictions on calibration text;
    None where it was not measured.
    """

    k: StreamReport
    v: StreamReport
    measured: float | None


@dataclass(frozen=True)
class ConversionReport:
    """What ``convert`` did.

    Attributes:
        layers: one a layer, in order.
        bytes_per_token_before: of 16-bit keys and values, all layers.
        bytes_per_token: of the latent cache, scales and positions included.
        predicted_loss: sum over all streams, nats a token; None where the objective has none.
        loss_before: mean negative log likelihood of ``measured_tokens`` of the calibration, nats a
            token, through the unconverted model; None without calibration.
        loss_after: the same through the converted one.
        measured_tokens: how many.
        calibration_tokens: how many tokens the statistics are over.
        seconds: that the conversion took, by step.
        config: the ``LatentConfig``.
        curve: bytes a token and predicted loss at other budgets; empty where the objective has
            none.
    """

    layers: list[LayerReport]
    bytes_per_token_before: int
    bytes_per_token: int
    predicted_loss: float | None
    loss_before: float | None
    loss_after: float | None
    measured_tokens: int
    calibration_tokens: int
    seconds: dict[str, float]
    config: dict[str, Any] = field(default_factory=dict)
    curve: list[tuple[int, float]] = field(default_factory=list)

    @property
    def kv_ratio(self) -> float:
        """Bytes relative to 16 bits."""
        return self.bytes_per_token / self.bytes_per_token_before

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {**dataclasses.asdict(self), "kv_ratio": self.kv_ratio}

    def save(self, path: str | Path) -> None:
        """Write ``path`` as JSON, and plots beside it: ``NAME.svg`` of the ranks, and with
        calibration ``NAME_bytes.svg``, of perplexity against bytes.
        """
        path = Path(path)
        path.write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")
        path.with_suffix(".svg").write_text(self.plot_ranks(), encoding="utf-8")
        if self.loss_before is not None:
            beside = path.with_name(f"{path.stem}_bytes.svg")
            beside.write_text(self.plot_perplexity(), encoding="utf-8")

    def plot_ranks(self) -> str:
        """Ranks by layer, as SVG."""
        series = {
            name: [(i, float(getattr(layer, s).rank)) for i, layer in enumerate(self.layers)]
            for name, s in (("keys", "k"), ("values", "v"))
        }
        return plot_lines(series, "Rank of each layer's latents", "layer", "rank")

    def plot_perplexity(self) -> str:
        """Perplexity on calibration text against bytes, as SVG: measured, and as predicted.

        Raises ValueError where there was no calibration to measure it on.
        """
        if self.loss_before is None or self.loss_after is None:
            raise ValueError("plot_perplexity: expected a conversion with calibration text")
        whole, before = self.bytes_per_token_before, self.loss_before
        series = {
            # A loss that no plot could show: beyond what exp() takes.
            "predicted": [
                (size / whole, math.exp(before + loss))
                for size, loss in self.curve
                if before + loss < 50
            ],
            "unconverted": [(1.0, math.exp(before))],
            "converted": [(self.kv_ratio, math.exp(self.loss_after))],
        }
        return plot_lines(
            {name: points for name, points in series.items() if points},
            "Perplexity through the KV cache, on calibration text",
            "bytes a token, relative to 16 bits",
            "perplexity",
        )

    def __str__(self) -> str:
        """A table, a line a layer, and the totals."""
        rows = [["layer", "k rank", "k slices", "v rank", "v slices", "bytes", "predicted", "own"]]
        for i, layer in enumerate(self.layers):
            predicted = [s.predicted for s in (layer.k, layer.v) if s.predicted is not None]
            rows.append(
                [
                    str(i),
                    f"{layer.k.rank}/{layer.k.full_rank}",
                    _slices(layer.k),
                    f"{layer.v.rank}/{layer.v.full_rank}",
                    _slices(layer.v),
                    str(layer.k.bytes + layer.v.bytes),
                    f"{sum(predicted):.5f}" if predicted else "-",
                    "-" if layer.measured is None else f"{layer.measured:.5f}",
                ]
            )
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = [
            "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
            for row in rows
        ]
        lines.append("")
        lines.append(
            f"bytes a token: {self.bytes_per_token:,} of {self.bytes_per_token_before:,} in 16 "
            f"bits ({self.kv_ratio:.3f}x, {1 / self.kv_ratio:.2f} times fewer)"
        )
        if self.predicted_loss is not None:
            lines.append(f"predicted loss: {self.predicted_loss:+.5f} nats a token")
        if self.loss_before is not None and self.loss_after is not None:
            change = 100 * (math.exp(self.loss_after - self.loss_before) - 1)
            lines.append(
                f"on {self.measured_tokens} tokens of the calibration: perplexity "
                f"{math.exp(self.loss_before):.3f} -> {math.exp(self.loss_after):.3f} "
                f"({change:+.2f} %)"
            )
        lines.append(f"took {sum(self.seconds.values()):.0f} s")
        return "\n".join(lines)


def _slices(stream: StreamReport) -> str:
    return " + ".join(f"{rank} in {bits}" for bits, rank in stream.slices)


def stream_report(
    spec: LayerSpec, stream: str, full_rank: int, predicted: float | None
) -> StreamReport:
    """The report of one stream of a layer."""
    parts = getattr(spec, stream)
    return StreamReport(
        rank=stream_rank(parts),
        full_rank=full_rank,
        bits=stream_bits(parts),
        slices=[[part.bits, part.rank] for part in parts],
        bytes=spec.groups * sum(part.bytes for part in parts),
        predicted=predicted,
    )


# -- plots ----------------------------------------------------------------------------------------

_WIDTH, _HEIGHT, _MARGIN = 640, 400, 60
_COLORS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#8c564b")


def plot_lines(
    series: Mapping[str, Sequence[tuple[float, float]]], title: str, x_label: str, y_label: str
) -> str:
    """Lines with dots, as an SVG document.

    Args:
        series: points (x, y) by name, in the order they are joined.
        title: above the plot.
        x_label: below the x axis.
        y_label: above the y axis.

    Raises:
        ValueError: there is no point.
    """
    points = [point for line in series.values() for point in line]
    if not points:
        raise ValueError("plot_lines: expected at least one point, got none")
    left, right = _span([x for x, _ in points])
    low, high = _span([y for _, y in points])

    def place(x: float, y: float) -> tuple[float, float]:
        return (
            _MARGIN + (x - left) / (right - left) * (_WIDTH - 2 * _MARGIN),
            _HEIGHT - _MARGIN - (y - low) / (high - low) * (_HEIGHT - 2 * _MARGIN),
        )

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="white"/>',
        _text(_WIDTH / 2, 24, title, "middle", 15),
        _text(_WIDTH / 2, _HEIGHT - 16, x_label, "middle"),
        _text(_MARGIN, _MARGIN - 12, y_label, "middle"),
    ]
    for step in range(5):
        x, y = left + (right - left) * step / 4, low + (high - low) * step / 4
        at_x, at_y = place(x, low)[0], place(left, y)[1]
        parts.append(
            f'<line x1="{_MARGIN}" x2="{_WIDTH - _MARGIN}" y1="{at_y:.1f}" y2="{at_y:.1f}" '
            'stroke="#ddd"/>'
        )
        parts.append(_text(at_x, _HEIGHT - _MARGIN + 18, f"{x:.4g}", "middle"))
        parts.append(_text(_MARGIN - 8, at_y + 4, f"{y:.4g}", "end"))
    for i, (name, line) in enumerate(series.items()):
        color = _COLORS[i % len(_COLORS)]
        placed = [place(x, y) for x, y in line]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in placed)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{color}"/>')
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{color}"/>' for x, y in placed]
        parts.append(_text(_WIDTH - _MARGIN, _MARGIN - 12 + 16 * i, name, "end", fill=color))
    return "\n".join([*parts, "</svg>"]) + "\n"


def _span(values: list[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    return (low, high) if high > low else (low - 1, high + 1)


def _text(x: float, y: float, text: str, anchor: str, size: int = 12, fill: str = "#333") -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}" '
        f'fill="{fill}">{html.escape(text)}</text>'
    )

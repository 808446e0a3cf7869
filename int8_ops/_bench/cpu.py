"""The run on a CPU: ``int8_linear`` against ``F.linear``, each on x of its own dtype."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from pathlib import Path

import torch
from torch.nn import functional as F

from .. import _extension, reference
from . import facts, report
from .peers import Mismatch
from .record import RecordFile
from .shapes import Shape
from .timing import Call, Deadline, wall_us

MS = (1, 16, 64, 256, 1024)
SIZES, QUICK_SIZES = (512, 1024, 2048, 4096), (512, 2048)
# A shape is repeated until its calls have taken so long.
ROUND_BUDGET_US = 400_000
MIN_ROUNDS, MAX_ROUNDS = 3, 200
# Where a weight is used once or a few times a call, it has to come from memory.
COLD_WEIGHT_M = 16
MAX_WEIGHTS = 64


def shapes(quick: bool) -> list[Shape]:
    """All that a run measures unless it is told."""
    sizes = QUICK_SIZES if quick else SIZES
    return [Shape(m, k, n) for k, n, m in itertools.product(sizes, sizes, MS)]


def run(
    asked: Sequence[Shape],
    *,
    quick: bool,
    commit: str | None,
    json: Path | None,
    time_budget: float | None,
) -> int:
    """Measure the shapes, all by default, within ``time_budget`` seconds.

    Returns 0, or 1 where a kernel returned something wrong.
    """
    _extension.core.require()
    deadline = Deadline(time_budget)
    record = RecordFile(json)
    found = {**facts.software_facts(), **facts.cpu_facts()}
    if commit is not None:
        found["commit"] = commit
    facts.print_facts(found)
    record.data["facts"] = found
    left = list(asked) or shapes(quick)
    lines = record.data["linear"] = []
    failures: list[str] = []
    record.data["failures"] = failures
    print("\nint8_linear against F.linear, us a call; x: F.linear's time over ours")
    table = report.Table(["M", "K", "N", "int8 f32", "f32", "x", "int8 bf16", "bf16", "x"])
    while left and not deadline.is_over():
        shape = left.pop(0)
        try:
            us = measure_shape(shape, quick)
        except Mismatch as mismatch:
            failures.append(f"({shape}): {mismatch}")
            print(f"FAILED: {failures[-1]}")
            continue
        speedups = {name: us[name] / us[f"int8 {name}"] for name in ("f32", "bf16")}
        cells = [str(size) for size in shape]
        for name, speedup in speedups.items():
            cells += [report.number(us[key]) for key in (f"int8 {name}", name)]
            cells.append(report.number(speedup, 2))
        table.line(cells)
        lines.append({**shape._asdict(), "us": us, "speedup": speedups})
        record.data["not_run"] = [str(shape) for shape in left]
        record.save()
    if left:
        print(f"the time budget is spent; not run: {'; '.join(map(str, left))}")
    record.save()
    if record.path is not None:
        print(f"written: {record.path}")
    return 1 if failures else 0


def measure_shape(shape: Shape, quick: bool) -> dict[str, float]:
    """Median us of int8_linear and F.linear at a shape, x in float32 and in bfloat16."""
    rng = torch.Generator().manual_seed(0)
    w = torch.randn((shape.n, shape.k), generator=rng)
    w_q, w_scale = reference.quantize_per_channel(w)
    linear = torch.ops.int8_ops.int8_linear.default
    # A decode step streams its weights from memory: rotate over more than the cache holds. Where
    # a weight is used many times a call, two sets are enough.
    sets = 2
    if shape.m <= COLD_WEIGHT_M:
        cold = -(-2 * facts.last_level_cache_bytes() // (shape.n * shape.k))
        sets = min(max(2, cold), MAX_WEIGHTS)
    calls: dict[str, list[Call]] = {}
    for name, dtype in (("f32", torch.float32), ("bf16", torch.bfloat16)):
        x = torch.randn((shape.m, shape.k), generator=rng).to(dtype)
        want = reference.int8_linear(x, w_q, w_scale)
        if not torch.equal(linear(x, w_q, w_scale, None), want):
            raise Mismatch(f"int8_linear on {name} differs from the reference")
        ours = [w_q.clone() for _ in range(sets)]
        floats = [w.to(dtype, copy=True) for _ in range(sets)]
        calls[f"int8 {name}"] = [functools.partial(linear, x, one, w_scale, None) for one in ours]
        calls[name] = [functools.partial(F.linear, x, one) for one in floats]
    with torch.no_grad():
        once = sum(wall_us(calls, 1).values())
        rounds = min(max(int(ROUND_BUDGET_US / once), MIN_ROUNDS), MAX_ROUNDS)
        return wall_us(calls, MIN_ROUNDS if quick else rounds)

"""What every benchmark here shares: timing by graph replay, device facts, aligned tables."""

from __future__ import annotations

import datetime
import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
Call = Callable[[], Any]

MIN_CALLS = 10
# What a call reads next was last touched this many L2 sizes of traffic ago.
COLD_L2_SIZES = 2
COPY_BYTES = 1 << 29

# Dense int8 peak, for the floor of a compute-bound shape. By the name that torch reports.
PEAK_INT8_TOPS = {"H100": 1979.0, "H200": 1979.0}


class Mismatch(RuntimeError):
    """A peer returned other bits than the reference; nothing it measures would mean anything."""


@dataclass
class Replay:
    """A captured run of calls over rotating inputs, and the time of each replay in us a call."""

    graph: torch.cuda.CUDAGraph
    outputs: list[Any]
    us: list[float]

    @property
    def median_us(self) -> float:
        """The median replay, a call."""
        return statistics.median(self.us)


def input_sets(bytes_per_set: int, device: torch.device) -> int:
    """How many input sets keep L2 cold for a call that reads ``bytes_per_set``."""
    l2_bytes = int(torch.cuda.get_device_properties(device).L2_cache_size)
    return max(2, -(-COLD_L2_SIZES * l2_bytes // bytes_per_set) + 1)


def capture(calls: Sequence[Call]) -> Replay:
    """Warm the calls up (which tunes and loads what they launch) and capture them in one graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for call in calls[:2]:
            call()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        # Kept, so that each call writes memory of its own.
        outputs = [call() for call in calls]
    graph.replay()
    torch.cuda.synchronize()
    return Replay(graph, outputs, [])


def time_interleaved(replays: Sequence[Replay], rounds: int) -> None:
    """Replay each graph in turn, ``rounds`` times, so that drift of clocks falls on all alike."""
    start = torch.cuda.Event(enable_timing=True)
    end = torch.cuda.Event(enable_timing=True)
    for _ in range(rounds):
        for replay in replays:
            start.record()
            replay.graph.replay()
            end.record()
            end.synchronize()
            replay.us.append(1e3 * start.elapsed_time(end) / len(replay.outputs))


def copy_bandwidth(device: torch.device, rounds: int) -> float:
    """Bytes a second, read and written, of a large device-to-device copy.

    Launched eagerly: a copy captured in a graph becomes a memcpy node, which the slower copy engine
    may serve. At this size the launch is nothing.
    """
    source = torch.randint(-128, 128, (COPY_BYTES,), dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    us = []
    for _ in range(rounds + 2):
        start.record()
        target.copy_(source)
        end.record()
        end.synchronize()
        us.append(1e3 * start.elapsed_time(end))
    return 2 * COPY_BYTES / (statistics.median(us[2:]) * 1e-6)


def require_equal(name: str, what: object, got: Tensor, want: Tensor) -> None:
    """Raise Mismatch unless every bit agrees."""
    if got.dtype != want.dtype or not torch.equal(got, want):
        raise Mismatch(
            f"{name} differs from the reference at {what}: got {got.dtype} {list(got.shape)}, "
            f"expected {want.dtype} {list(want.shape)}"
        )


def host_us(calls: Mapping[str, Call], count: int) -> dict[str, float]:
    """Median host time of one asynchronous call each, interleaved, the queue never full."""
    samples: dict[str, list[int]] = {name: [] for name in calls}
    for i in range(count + 200):
        for name, call in calls.items():
            begin = time.perf_counter_ns()
            call()
            elapsed = time.perf_counter_ns() - begin
            if i >= 200:
                samples[name].append(elapsed)
        if i % 50 == 0:
            torch.cuda.synchronize()
    return {name: statistics.median(taken) / 1e3 for name, taken in samples.items()}


def wall_us(calls: Mapping[str, Sequence[Call]], rounds: int) -> dict[str, float]:
    """Median wall time of one synchronous call each (CPU), interleaved over rotating inputs."""
    samples: dict[str, list[int]] = {name: [] for name in calls}
    for i in range(-1, rounds):
        for name, sets in calls.items():
            call = sets[i % len(sets)]
            begin = time.perf_counter_ns()
            call()
            elapsed = time.perf_counter_ns() - begin
            if i >= 0:
                samples[name].append(elapsed)
    return {name: statistics.median(taken) / 1e3 for name, taken in samples.items()}


def _output_of(*command: str) -> str | None:
    try:
        run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return run.stdout.strip() if run.returncode == 0 else None


def commit() -> str | None:
    """The commit of the tree, marked where the tree differs from it; None outside git."""
    head = _output_of("git", "rev-parse", "--short=12", "HEAD")
    if head is None:
        return None
    dirty = _output_of("git", "status", "--porcelain", "--untracked-files=no")
    return f"{head}-dirty" if dirty else head


def gpu_facts(device: torch.device) -> dict[str, Any]:
    """Name, memory, driver and clocks of a CUDA device, the last two where nvidia-smi is there."""
    properties = torch.cuda.get_device_properties(device)
    fields = ("driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "power.limit")
    answer = _output_of(
        "nvidia-smi",
        f"--id=GPU-{properties.uuid}",
        f"--query-gpu={','.join(fields)}",
        "--format=csv,noheader",
    )
    smi = dict(zip(fields, answer.split(", "), strict=True)) if answer else {}
    return {
        "device": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "l2_bytes": properties.L2_cache_size,
        "memory_bytes": properties.total_memory,
        **smi,
    }


def software_facts() -> dict[str, Any]:
    """Versions, commit and date."""
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = None
    return {
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": triton_version,
        "python": platform.python_version(),
        "commit": commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def peak_tops(device_name: str, asked: float | None) -> float | None:
    """The int8 peak of the floor: as asked, else by the device's name, else unknown."""
    if asked is not None:
        return asked
    return next((tops for name, tops in PEAK_INT8_TOPS.items() if name in device_name), None)


def print_facts(facts: Mapping[str, Any]) -> None:
    """One line a fact."""
    for name, value in facts.items():
        print(f"{name:>16}  {value}")


class Table:
    """Aligned lines, each printed as soon as it is known."""

    def __init__(self, columns: Sequence[str], min_width: int = 7) -> None:
        """Print the head."""
        self.widths = [max(min_width, len(column)) for column in columns]
        self.line(columns)
        print("-+-".join("-" * width for width in self.widths), flush=True)

    def line(self, cells: Sequence[str]) -> None:
        """Print one line; a cell a column."""
        aligned = (cell.rjust(width) for cell, width in zip(cells, self.widths, strict=True))
        print(" | ".join(aligned), flush=True)


def number(value: float | None, digits: int = 1) -> str:
    """A cell: the number, or a dash where nothing was measured."""
    return "-" if value is None else f"{value:.{digits}f}"


def ratio(value: float | None, base: float | None) -> float | None:
    """``value / base``, or None where either is missing."""
    return None if value is None or base is None else value / base


def write_json(path: Path, result: Mapping[str, Any]) -> None:
    """The whole result, one file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")

"""Time: of captured CUDA graphs, of copies, of eager calls; in us, but for a bandwidth."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from . import facts

Call = Callable[[], Any]

MIN_CALLS = 10
# What a call reads next was last touched this many L2 sizes of traffic ago.
COLD_L2_SIZES = 2
COPY_BYTES = 1 << 29
HOST_WARM_UP = 200
# More than this still allocated after a shape: something holds on to it.
LEFT_OVER_BYTES = 1 << 26
# Of one measurement of whole eager calls; the device is waited for once, at the end.
EAGER_CALLS = 200


@dataclass
class Captured:
    """Calls that can be replayed as one, what each returned, and the time of each replay.

    ``us`` is a replay's time divided by its calls.
    """

    replay: Call
    outputs: list[Any]
    us: list[float] = field(default_factory=list)

    @property
    def median_us(self) -> float:
        """The median replay, a call."""
        return statistics.median(self.us)


class Timer(Protocol):
    """What a run needs of a device: ``GraphTimer``, or a stand-in where there is no GPU."""

    device: torch.device

    def device_facts(self) -> dict[str, Any]:
        """Name, memory, driver and clocks."""

    def input_sets(self, bytes_per_set: int) -> int:
        """How many sets of inputs keep the cache cold for a call that reads so much of each."""

    def copy_bytes_per_s(self, rounds: int) -> float:
        """Bytes a second, read and written, of a large copy."""

    def capture(self, calls: Sequence[Call]) -> Captured:
        """Warm the calls up (which tunes and loads what they launch), capture and run them once."""

    def time_interleaved(self, captured: Sequence[Captured], rounds: int) -> None:
        """Replay each in turn, ``rounds`` times, so that drift of clocks falls on all alike."""

    def host_us(self, calls: Mapping[str, Call], count: int) -> dict[str, float]:
        """Median host time of one asynchronous call each, interleaved, the queue never full."""

    def eager_us(self, calls: Mapping[str, Sequence[Call]], rounds: int) -> dict[str, float]:
        """Median wall time a call of many back to back, the device waited for at the end."""

    def release(self) -> None:
        """Give back what the last shape held."""


class GraphTimer:
    """The Timer of a CUDA device."""

    def __init__(self, device: torch.device) -> None:
        """A timer of ``device``, which must be the current one."""
        self.device = device

    def device_facts(self) -> dict[str, Any]:
        """Name, memory, driver and clocks."""
        return facts.gpu_facts(self.device)

    def input_sets(self, bytes_per_set: int) -> int:
        """How many sets push ``COLD_L2_SIZES`` times the L2 between two uses of one."""
        l2_bytes = int(torch.cuda.get_device_properties(self.device).L2_cache_size)
        return max(2, -(-COLD_L2_SIZES * l2_bytes // bytes_per_set) + 1)

    def copy_bytes_per_s(self, rounds: int) -> float:
        """Bytes a second, read and written, of a large device-to-device copy.

        Launched eagerly: a copy captured in a graph becomes a memcpy node, which the slower copy
        engine may serve. At this size the launch is nothing.
        """
        source = torch.randint(-128, 128, (COPY_BYTES,), dtype=torch.int8, device=self.device)
        target = torch.empty_like(source)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        us: list[float] = []
        for _ in range(rounds + 2):
            start.record()
            target.copy_(source)
            end.record()
            end.synchronize()
            us.append(1e3 * start.elapsed_time(end))
        return 2 * COPY_BYTES / (statistics.median(us[2:]) * 1e-6)

    def capture(self, calls: Sequence[Call]) -> Captured:
        """Warm the calls up and capture them in one graph, each with an output of its own."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for call in calls[:2]:
                call()
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = [call() for call in calls]
        graph.replay()
        torch.cuda.synchronize()
        return Captured(graph.replay, outputs)

    def time_interleaved(self, captured: Sequence[Captured], rounds: int) -> None:
        """Replay each in turn between two events, ``rounds`` times."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        for _ in range(rounds):
            for one in captured:
                start.record()
                one.replay()
                end.record()
                end.synchronize()
                one.us.append(1e3 * start.elapsed_time(end) / len(one.outputs))

    def host_us(self, calls: Mapping[str, Call], count: int) -> dict[str, float]:
        """Median host time of one asynchronous call each, interleaved, the queue never full."""
        samples: dict[str, list[int]] = {name: [] for name in calls}
        for i in range(count + HOST_WARM_UP):
            for name, call in calls.items():
                begin = time.perf_counter_ns()
                call()
                elapsed = time.perf_counter_ns() - begin
                if i >= HOST_WARM_UP:
                    samples[name].append(elapsed)
            if i % 50 == 0:
                torch.cuda.synchronize()
        return {name: statistics.median(taken) / 1e3 for name, taken in samples.items()}

    def eager_us(self, calls: Mapping[str, Sequence[Call]], rounds: int) -> dict[str, float]:
        """Median wall time a call of ``EAGER_CALLS`` back to back, which the end waits for.

        The first round warms up and is left out.
        """
        samples: dict[str, list[float]] = {name: [] for name in calls}
        for i in range(-1, rounds):
            for name, sets in calls.items():
                torch.cuda.synchronize()
                begin = time.perf_counter_ns()
                for j in range(EAGER_CALLS):
                    sets[j % len(sets)]()
                torch.cuda.synchronize()
                elapsed = time.perf_counter_ns() - begin
                if i >= 0:
                    samples[name].append(elapsed / EAGER_CALLS)
        return {name: statistics.median(taken) / 1e3 for name, taken in samples.items()}

    def release(self) -> None:
        """Return the memory of the last shape's graphs to the device."""
        # A full collection takes a good part of a second once the compiler is loaded; counting
        # references frees all but what a cycle holds (the traceback of a peer that failed).
        if torch.cuda.memory_allocated(self.device) > LEFT_OVER_BYTES:
            gc.collect()
        torch.cuda.empty_cache()


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


class Deadline:
    """A budget of seconds, asked between two lines of a table; without one it never ends."""

    def __init__(self, seconds: float | None, clock: Callable[[], float] = time.monotonic) -> None:
        """Start now."""
        self._clock = clock
        self._end = None if seconds is None else clock() + seconds

    def is_over(self) -> bool:
        """Whether nothing new should be begun."""
        return self._end is not None and self._clock() >= self._end

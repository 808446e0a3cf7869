"""The run on a CUDA device: every suite that was asked for, each peer checked, then timed."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import INT8Linear, reference
from ..backends import triton as triton_backend
from . import facts, peers, report
from .peers import Peer
from .record import RecordFile, Row, make_row
from .shapes import (
    EAGER_SHAPE,
    HOST_SHAPE,
    LINEAR_SUITES,
    QUANTIZE,
    SUITES,
    Shape,
    peak_tops,
)
from .timing import MIN_CALLS, Call, Captured, Deadline, Timer

ROUNDS, QUICK_ROUNDS = 15, 5
HOST_COUNT, QUICK_HOST_COUNT = 3000, 500
# Weights that whole eager calls rotate over: together past every L2 there is.
EAGER_LAYERS = 3


@dataclass(frozen=True)
class Options:
    """What was asked for; ``time_budget`` in seconds."""

    suites: tuple[str, ...] = tuple(SUITES)
    shapes: tuple[Shape, ...] = ()  # in place of the suites
    peers: tuple[str, ...] = ()  # in place of what each suite takes
    quick: bool = False
    peak_tops: float | None = None
    commit: str | None = None
    json: Path | None = None
    time_budget: float | None = None


@dataclass(frozen=True)
class Work:
    """Shapes that one table holds, and the names of the peers they are measured with."""

    title: str
    shapes: tuple[Shape, ...]
    peer_names: tuple[str, ...]


@dataclass(frozen=True)
class Task:
    """A suite: what it is to measure, by name, and how; ``measure`` strikes out what is done."""

    suite: str
    items: list[str]
    measure: Callable[[], None]


class AbsentPeer(RuntimeError):
    """A peer was asked for by name and can't run here."""


def present_peers(options: Options, device: torch.device) -> dict[str, Peer]:
    """The peers that can run here, by name; tells which can't. Raises AbsentPeer if asked for."""
    found = {}
    for peer in peers.PEERS:
        if options.peers and peer.name not in options.peers:
            continue
        reason = peers.absent_reason(peer, device)
        if reason is None:
            found[peer.name] = peer
        elif options.peers:
            raise AbsentPeer(f"{peer.name} was asked for, but is absent: {reason}")
        else:
            print(f"left out: {peer.name}: {reason}")
    return found


def linear_work(options: Options, present: Sequence[Peer]) -> dict[str, Work]:
    """The tables of int8_linear by suite; a shape of two suites is measured in the first."""
    everyone = tuple(peer.name for peer in present)
    if options.shapes:
        return {"shapes": Work("the shapes asked for", options.shapes, everyone)}
    quick_peers = tuple(peer.name for peer in present if not peer.slow)
    work = {}
    seen: set[Shape] = set()
    for name in SUITES:
        if name not in options.suites or name not in LINEAR_SUITES:
            continue
        suite = LINEAR_SUITES[name]
        shapes = suite.quick_shapes if options.quick else suite.shapes
        names = everyone if suite.slow_peers or options.peers else quick_peers
        work[name] = Work(suite.summary, tuple(s for s in shapes if s not in seen), names)
        seen |= set(shapes)
    return work


def measure_shape(
    shape: Shape, present: Sequence[Peer], timer: Timer, rounds: int
) -> tuple[dict[str, float], dict[str, str]]:
    """Median us of each peer at a shape, and why others have none: wrong, or could not run."""
    rng = torch.Generator(timer.device).manual_seed(0)
    # The least that a peer reads decides: the int8 operands.
    sets = timer.input_sets((shape.m + shape.n) * shape.k)
    inputs = [peers.make_inputs(shape, timer.device, rng) for _ in range(sets)]
    calls = max(MIN_CALLS, sets)
    # Of the first call and of the last.
    checked = [(i, peers.expected(inputs[i % sets], rng)) for i in (0, calls - 1)]
    captured: dict[str, Captured] = {}
    failed: dict[str, str] = {}
    for peer in present:
        if not peer.takes(shape):
            continue
        bound = [functools.partial(peer.run, inputs[i % sets]) for i in range(calls)]
        try:
            peer.prepare()
            with peers.held_to(peer.gemm_path):
                one = timer.capture(bound)
            for position, want in checked:
                want.check(peer, one.outputs[position])
        except Exception as error:  # one peer's fault is not the others'
            failed[peer.name] = f"{type(error).__name__}: {error}".partition("\n")[0]
        else:
            captured[peer.name] = one
    timer.time_interleaved(list(captured.values()), rounds)
    return {name: one.median_us for name, one in captured.items()}, failed


class Run:
    """One run: its options, its device, what it has measured and what is left."""

    def __init__(self, options: Options, timer: Timer) -> None:
        """Nothing is measured before ``run``."""
        self.options = options
        self.timer = timer
        self.rounds = QUICK_ROUNDS if options.quick else ROUNDS
        self.record = RecordFile(options.json)
        self.deadline = Deadline(options.time_budget)
        self.rows: list[Row] = []
        self.failures: list[str] = []
        # What is left, in order; each is struck out when it is done.
        self.not_run: list[str] = []
        # What each suite took, compiling and tuning included.
        self.seconds: dict[str, float] = {}
        self.record.data["seconds"] = self.seconds
        self.record.data["not_run"] = self.not_run
        self.record.data["failures"] = self.failures

    def run(self) -> int:
        """Measure everything: 0, or 1 if a peer returned something wrong or could not run."""
        present = present_peers(self.options, self.timer.device)
        self._start()
        tasks = self._tasks(present)
        self.not_run += [item for task in tasks for item in task.items]
        for task in tasks:
            if self.deadline.is_over():
                break
            begin = time.monotonic()
            task.measure()
            self.seconds[task.suite] = round(time.monotonic() - begin, 1)
            self._note_clocks()
        self._finish()
        return 1 if self.failures else 0

    def _tasks(self, present: dict[str, Peer]) -> list[Task]:
        work = linear_work(self.options, list(present.values()))
        own = [present[name] for name in peers.OWN if name in present]
        fast = [peer for peer in own if self.options.peers or not peer.slow]
        backends = [peer.name for peer in fast or own]
        others = {
            "quantize": Task(
                "quantize",
                [f"quantize {rows}, {cols}" for rows, cols in self._quantize_shapes()],
                functools.partial(self._quantize, backends),
            ),
            "host": Task("host", ["host", "eager"], functools.partial(self._host, backends)),
        }
        tasks = []
        for name in ("shapes", *SUITES):
            if name in work:
                items = [str(shape) for shape in work[name].shapes]
                measure = functools.partial(self._linear, work[name], present)
                tasks.append(Task(name, items, measure))
            elif name in self.options.suites and backends and not self.options.shapes:
                tasks.append(others[name])
        return tasks

    # -- the head and the foot --------------------------------------------------------------------

    def _start(self) -> None:
        found = {**facts.software_facts(), **self.timer.device_facts()}
        if self.options.commit is not None:
            found["commit"] = self.options.commit
        self.device_name = str(found["device"])
        self.peak_tops = peak_tops(self.device_name, self.options.peak_tops)
        self.copy_bytes_per_s = self.timer.copy_bytes_per_s(self.rounds)
        found |= {
            "copy_gb_per_s": round(self.copy_bytes_per_s / 1e9, 1),
            "floor_int8_tops": self.peak_tops,
            "replays": self.rounds,
        }
        facts.print_facts(found)
        self.record.data["facts"] = found

    def _note_clocks(self) -> None:
        # The clocks of a device that has just been at work.
        for name, value in self.timer.device_facts().items():
            if "clocks" in name:
                self.record.data["facts"][f"{name} (after)"] = value
        self.record.save()

    def _finish(self) -> None:
        report.print_summary(self.rows)
        for failure in self.failures:
            print(f"FAILED: {failure}")
        took = ", ".join(f"{suite} {seconds:.0f}" for suite, seconds in self.seconds.items())
        print(f"seconds taken: {took}")
        if self.not_run:
            print(f"the time budget is spent; not run: {'; '.join(self.not_run)}")
        self.record.save()
        if self.record.path is not None:
            print(f"written: {self.record.path}")

    def _done(self, item: str) -> None:
        self.not_run.remove(item)
        self.record.save()
        self.timer.release()

    # -- the suites -------------------------------------------------------------------------------

    def _linear(self, work: Work, present: dict[str, Peer]) -> None:
        chosen = [peer for name, peer in present.items() if name in work.peer_names]
        names = [peer.name for peer in chosen]
        lines: list[dict[str, Any]] = self.record.data.setdefault("linear", [])
        print(f"\n{work.title}\nint8_linear, us a call; x bf16: bf16's time over ours")
        probe = [self._row(shape, {}) for shape in work.shapes]
        table = report.LinearTable(
            report.linear_columns(names, targets=any(row.target for row in probe))
        )
        measured = []
        for shape in work.shapes:
            if self.deadline.is_over():
                break
            try:
                us, failed = measure_shape(shape, chosen, self.timer, self.rounds)
            except torch.OutOfMemoryError as error:  # the inputs alone are too much
                us, failed = {}, {"inputs": str(error).partition(". ")[0]}
            row = self._row(shape, us)
            table.row(row)
            for name, reason in failed.items():
                self.failures.append(f"{name} at ({shape}): {reason}")
                print(f"  FAILED: {self.failures[-1]}", flush=True)
            measured.append(row)
            lines.append(row.as_json())
            self._done(str(shape))
        self.rows += measured
        report.print_mm_table(measured, names)

    def _row(self, shape: Shape, us: dict[str, float]) -> Row:
        return make_row(shape, us, self.copy_bytes_per_s, self.peak_tops, self.device_name)

    def _quantize_shapes(self) -> tuple[tuple[int, int], ...]:
        return QUANTIZE[:2] if self.options.quick else QUANTIZE

    def _quantize(self, backends: list[str]) -> None:
        """``quantize_per_token`` of bf16, as a share of the copy bandwidth."""
        print("\nquantize_per_token, bf16: us, and bytes read and written against a large copy")
        heads = [head for name in backends for head in (f"{name} us", "GB/s", "% of copy")]
        table = report.Table(["rows", "cols", *heads])
        lines: list[dict[str, Any]] = self.record.data.setdefault("quantize", [])
        for rows, cols in self._quantize_shapes():
            if self.deadline.is_over():
                return
            us, failed = measure_quantize(rows, cols, backends, self.timer, self.rounds)
            line: dict[str, Any] = {"rows": rows, "cols": cols}
            for name, value in us.items():
                rate = quantize_bytes(rows, cols) / (value * 1e-6)
                line[name] = {
                    "us": value,
                    "gb_per_s": rate / 1e9,
                    "percent_of_copy": 100 * rate / self.copy_bytes_per_s,
                }
            cells = [cell for name in backends for cell in report.quantize_cells(line, name)]
            table.line([str(rows), str(cols), *cells])
            for name, reason in failed.items():
                self.failures.append(f"{name} quantize at ({rows}, {cols}): {reason}")
                print(f"  FAILED: {self.failures[-1]}", flush=True)
            lines.append(line)
            self._done(f"quantize {rows}, {cols}")

    def _host(self, names: list[str]) -> None:
        """One eager call at M = 1: the host's time alone, and the whole of it."""
        count = QUICK_HOST_COUNT if self.options.quick else HOST_COUNT
        # This library's own backend is called as its device is.
        backends = [self.timer.device.type if name == "cuda" else name for name in names]
        with torch.no_grad():
            calls = {name: sets[0] for name, sets in self._layers(HOST_SHAPE, backends, 1).items()}
            self.record.data["host_us"] = self.timer.host_us(calls, count)
            self._done("host")
            several = self._layers(EAGER_SHAPE, backends, EAGER_LAYERS)
            self.record.data["eager_us"] = self.timer.eager_us(several, self.rounds)
            del several
            self._done("eager")
        print("\none eager call: us of the host alone, and of back-to-back calls with the device's")
        lines = report.host_lines(self.record.data)
        table = report.Table(
            ["call".ljust(max(len(line[0]) for line in lines)), "us", "x F.linear"]
        )
        for line in lines:
            table.line(line)

    def _layers(self, shape: Shape, backends: list[str], count: int) -> dict[str, list[Call]]:
        rng = torch.Generator(self.timer.device).manual_seed(2)
        device = self.timer.device
        x = torch.randn((shape.m, shape.k), generator=rng, device=device, dtype=torch.bfloat16)
        weights = [
            torch.randn((shape.n, shape.k), generator=rng, device=device, dtype=torch.bfloat16)
            for _ in range(count)
        ]
        calls: dict[str, list[Call]] = {
            "F.linear": [functools.partial(F.linear, x, w) for w in weights]
        }
        for backend in backends:
            layers = [INT8Linear(w, None, backend=backend) for w in weights]
            calls[f"INT8Linear({backend})"] = [functools.partial(layer, x) for layer in layers]
        return calls


# -- quantize -------------------------------------------------------------------------------------


def quantize_bytes(rows: int, cols: int) -> int:
    """What quantize_per_token must move: bf16 in, int8 and a float32 scale a row out."""
    return 3 * rows * cols + 4 * rows


def own_quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """This library's op."""
    out: tuple[Tensor, Tensor] = torch.ops.int8_ops.quantize_per_token.default(x)
    return out


QUANTIZE_FUNCTIONS: dict[str, Callable[[Tensor], tuple[Tensor, Tensor]]] = {
    "cuda": own_quantize,
    "triton": triton_backend.quantize_per_token,
}


def measure_quantize(
    rows: int, cols: int, backends: Sequence[str], timer: Timer, rounds: int
) -> tuple[dict[str, float], dict[str, str]]:
    """Median us of each backend's quantize_per_token, and why others have none."""
    rng = torch.Generator(timer.device).manual_seed(1)
    sets = timer.input_sets(2 * rows * cols)
    xs = [
        torch.randn((rows, cols), generator=rng, device=timer.device, dtype=torch.bfloat16)
        for _ in range(sets)
    ]
    calls = max(MIN_CALLS, sets)
    checked = [(i, reference.quantize_per_token(xs[i % sets])) for i in (0, calls - 1)]
    captured: dict[str, Captured] = {}
    failed: dict[str, str] = {}
    for name in backends:
        function = QUANTIZE_FUNCTIONS[name]
        try:
            one = timer.capture([functools.partial(function, xs[i % sets]) for i in range(calls)])
            for position, want in checked:
                for got, wanted in zip(one.outputs[position], want, strict=True):
                    if got.dtype != wanted.dtype or not torch.equal(got, wanted):
                        raise peers.Mismatch(f"{name} differs from the reference")
        except Exception as error:  # one peer's fault is not the others'
            failed[name] = f"{type(error).__name__}: {error}".partition("\n")[0]
        else:
            captured[name] = one
    timer.time_interleaved(list(captured.values()), rounds)
    return {name: one.median_us for name, one in captured.items()}, failed

"""The benchmark: its arithmetic, its checks, and whole runs, on a stand-in for the GPU."""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from int8_ops import cli
from int8_ops._bench import cuda, peers, record, report, shapes, timing
from int8_ops._bench.peers import Mismatch, Peer
from int8_ops._bench.shapes import LINEAR_SUITES, LLAMA, SMALL_M, SUITES, SWEEP_K, Shape
from int8_ops._bench.timing import Captured, Deadline, GraphTimer
from int8_ops._commands import bench

ROOT = Path(__file__).resolve().parent.parent
H100 = "NVIDIA H100 80GB HBM3"


def script(name: str) -> ModuleType:
    """A script of benchmarks/, as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# -- shapes and floors ----------------------------------------------------------------------------


def test_bytes_and_operations_by_hand():
    shape = Shape(32768, 128, 1024)
    # x 8 MiB, w 128 KiB, its scales 4 KiB, y 64 MiB.
    assert shape.linear_bytes == 8_388_608 + 131_072 + 4_096 + 67_108_864
    # K + 2 N = 2176 bytes a row, and the weight with its scales.
    assert shape.mm_bytes == 32768 * 2176 + 131_072 + 4_096
    assert shape.ops == 8_589_934_592


@pytest.mark.parametrize(
    ("shape", "floor"),
    [
        ((32768, 128, 1024), 25.380),  # 75,632,640 bytes
        ((32768, 512, 4096), 102.048),  # 304,103,424 bytes; its products take 69.448
        ((1, 4096, 14336), 19.7364),  # 58,814,464 bytes: the weight
        ((32768, 1024, 4096), 138.897),  # 274,877,906,944 operations
        ((8192, 14336, 4096), 486.141),  # 962,072,674,304 operations
    ],
)
def test_floor_of_int8_linear_by_hand(shape, floor):
    row = record.make_row(Shape(*shape), {"cuda": 2 * floor}, 2.98e12, 1979.0, H100)
    assert row.floor_us == pytest.approx(floor, rel=2e-5)
    assert row.percent_of_floor("cuda") == pytest.approx(50, rel=2e-5)
    assert row.percent_of_floor("bf16") is None


def test_floor_of_int8_scaled_mm_by_hand():
    row = record.make_row(Shape(32768, 128, 1024), {"cuda mm": 47.945}, 2.98e12, 1979.0, H100)
    assert row.mm_floor_us == pytest.approx(23.9726, rel=1e-5)  # 71,438,336 bytes
    assert row.percent_of_floor("cuda mm", mm=True) == pytest.approx(50, rel=1e-4)


def test_without_a_known_peak_the_bytes_alone_are_the_floor():
    assert shapes.floor_us(1_000_000, 10**15, 1e12, None) == pytest.approx(1.0)
    assert shapes.floor_us(1_000_000, 10**15, 1e12, 1000.0) == pytest.approx(1e6)
    assert shapes.peak_tops("NVIDIA A100") is None
    assert shapes.peak_tops("NVIDIA A100", 624.0) == 624.0
    assert shapes.peak_tops("NVIDIA H200") == 1979.0


def test_suites():
    assert len(LLAMA) == 13
    assert len(SMALL_M) == 4 * 7
    assert {shape.m for shape in SMALL_M} == {1, 2, 4, 8, 16, 32, 64}
    assert [shape.k for shape in SWEEP_K] == sorted(
        [64, 128, 256, 512, 1024, 2048, 4096, 8192, 192, 384, 768, 1536, 3072]
    )
    assert {(shape.m, shape.n) for shape in SWEEP_K} == {(32768, 4096)}
    assert [cols for _, cols in shapes.QUANTIZE] == [512, 1024, 2048, 4096, 8192]
    assert set(LINEAR_SUITES) < set(SUITES)
    for suite in LINEAR_SUITES.values():
        assert set(suite.quick_shapes) < set(suite.shapes)
        assert suite.quick_shapes
        assert len(set(suite.shapes)) == len(suite.shapes)


def test_targets_are_those_of_an_h100_alone():
    shape = LLAMA[0]
    assert record.make_row(shape, {}, 1e12, None, H100).target == (29, 32.1)
    assert record.make_row(shape, {}, 1e12, None, "NVIDIA H200").target is None
    assert record.make_row(Shape(3, 4, 5), {}, 1e12, None, H100).target is None


# -- the parser -----------------------------------------------------------------------------------


def parsed(*arguments: str) -> argparse.Namespace:
    return cli.build_parser().parse_args(["bench", *arguments])


def test_parser():
    args = parsed("--shapes", "1,512,1024", "7,8,9", "--peers", "cuda", "cuda mm", "--quick")
    assert args.shapes == [Shape(1, 512, 1024), Shape(7, 8, 9)]
    assert args.peers == ["cuda", "cuda mm"]
    assert args.quick
    assert parsed().suite == ["all"]
    assert parsed("--suite", "llama", "host").suite == ["llama", "host"]
    assert parsed("--time-budget", "12.5").time_budget == 12.5


@pytest.mark.parametrize(
    "arguments",
    [
        ["--shapes", "1,2"],
        ["--shapes", "1,2,x"],
        ["--shapes", "1,0,2"],
        ["--suite", "nonsense"],
        ["--peers", "nonsense"],
        ["--suite", "llama", "--shapes", "1,2,3"],
    ],
    ids=" ".join,
)
def test_parser_refuses(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        parsed(*arguments)
    assert stopped.value.code == 2
    assert arguments[0] in capsys.readouterr().err


def test_the_help_names_every_suite_and_peer(capsys):
    with pytest.raises(SystemExit):
        parsed("--help")
    told = " ".join(capsys.readouterr().out.split())
    assert all(f"{name}: " in told for name in SUITES)
    assert all(f"'{name}': " in told for name in peers.NAMES)


def test_on_a_cpu_suites_and_peers_are_refused(capsys):
    assert cli.main(["bench", "--device", "cpu", "--suite", "small_m"]) == 2
    assert cli.main(["bench", "--device", "cpu", "--peers", "cuda"]) == 2
    assert "on a CPU: --shapes" in capsys.readouterr().err


# -- checking a peer ------------------------------------------------------------------------------


def inputs_of(shape: Shape) -> tuple[peers.Inputs, peers.Expected]:
    rng = torch.Generator().manual_seed(0)
    inputs = peers.make_inputs(shape, torch.device("cpu"), rng)
    return inputs, peers.expected(inputs, rng)


def peer(name: str) -> Peer:
    return next(found for found in peers.PEERS if found.name == name)


@pytest.mark.parametrize("m", [17, 600], ids=["whole", "sampled"])
@pytest.mark.parametrize("name", ["cuda", "bf16", "int_mm", "cuda mm"])
def test_a_right_output_passes(m, name):
    inputs, want = inputs_of(Shape(m, 64, 48))
    want.check(peer(name), peer(name).run(inputs))
    assert (want.rows is None) == (m == 17)


def test_compared_are_the_ends_and_at_least_256_other_rows():
    _, want = inputs_of(Shape(1000, 8, 8))
    assert want.rows is not None
    assert want.rows[:2].tolist() == [0, 999]
    assert len(set(want.rows.tolist())) == 258


@pytest.mark.parametrize("row", [0, -1])
def test_one_wrong_bit_is_found(row):
    inputs, want = inputs_of(Shape(700, 64, 48))
    out = peers.cuda_linear(inputs)
    out[row, 5] += out[row, 5].abs() * 2**-7
    with pytest.raises(Mismatch, match="cuda differs from the reference in 1 of"):
        want.check(peer("cuda"), out)


def test_a_wrong_type_or_shape_is_found():
    inputs, want = inputs_of(Shape(4, 64, 48))
    out = peers.cuda_linear(inputs)
    with pytest.raises(Mismatch, match="float16"):
        want.check(peer("cuda"), out.half())
    with pytest.raises(Mismatch, match=r"\[4, 47\]"):
        want.check(peer("cuda"), out[:, :47])


@pytest.mark.parametrize("name", ["bf16", "int_mm compiled"])
def test_peers_with_a_tolerance(name):
    _, want = inputs_of(Shape(40, 64, 48))
    out = want.real.bfloat16() if name == "bf16" else want.exact.clone()
    want.check(peer(name), out)
    with pytest.raises(Mismatch, match="is off by"):
        want.check(peer(name), out * 1.02)
    with pytest.raises(Mismatch, match="is off by nan"):
        want.check(peer(name), torch.full_like(out, torch.nan))


@pytest.mark.parametrize("before", [None, "other"])
def test_held_to_sets_the_path_and_puts_it_back(before, monkeypatch):
    monkeypatch.delenv(peers.GEMM_PATH, raising=False)
    if before is not None:
        monkeypatch.setenv(peers.GEMM_PATH, before)
    with peers.held_to(None):
        assert os.environ.get(peers.GEMM_PATH) == before
    with pytest.raises(ValueError, match="inside"), peers.held_to("sm80"):  # noqa: PT012
        assert os.environ[peers.GEMM_PATH] == "sm80"
        raise ValueError("inside")
    assert os.environ.get(peers.GEMM_PATH) == before


def test_peers_held_to_a_path_are_those_named_mma_sync():
    assert {p.name for p in peers.PEERS if p.gemm_path} == {"mma.sync", "mma.sync mm"}
    assert {p.name for p in peers.PEERS if p.prequantized} == {
        "cuda mm",
        "mma.sync mm",
        "triton mm",
    }
    assert len(set(peers.NAMES)) == len(peers.PEERS)
    assert not peer("int_mm").takes(Shape(16, 64, 64))
    assert not peer("int_mm").takes(Shape(17, 64, 63))
    assert peer("int_mm").takes(Shape(17, 64, 64))


# -- a whole run, on a stand-in for the GPU -------------------------------------------------------


class FakeTimer:
    """Runs the calls on the CPU; a peer's time is made up."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        self.paths: list[str | None] = []
        self.released = 0

    def device_facts(self) -> dict[str, Any]:
        return {"device": H100, "clocks.sm": "1980 MHz"}

    def input_sets(self, bytes_per_set: int) -> int:
        return 3

    def copy_bytes_per_s(self, rounds: int) -> float:
        return 1e12

    def capture(self, calls: Sequence[Callable[[], Any]]) -> Captured:
        self.paths.append(os.environ.get(peers.GEMM_PATH))
        return Captured(lambda: None, [call() for call in calls])

    def time_interleaved(self, captured: Sequence[Captured], rounds: int) -> None:
        for index, one in enumerate(captured):
            one.us += [10.0 * (index + 1)] * rounds

    def host_us(self, calls: Mapping[str, Callable[[], Any]], count: int) -> dict[str, float]:
        return {name: float(call().shape[-1]) for name, call in calls.items()}

    def eager_us(
        self, calls: Mapping[str, Sequence[Callable[[], Any]]], rounds: int
    ) -> dict[str, float]:
        return {name: float(len([call() for call in sets])) for name, sets in calls.items()}

    def release(self) -> None:
        self.released += 1


TINY = {
    "llama": (Shape(20, 64, 48), Shape(1, 64, 48)),
    "small_m": (Shape(1, 64, 48), Shape(2, 64, 48)),
    "sweep_k": (Shape(600, 32, 48),),
}


@pytest.fixture
def tiny(monkeypatch):
    """Small shapes, and every peer present but those that need Triton."""
    for name, found in TINY.items():
        suite = LINEAR_SUITES[name]
        monkeypatch.setitem(
            LINEAR_SUITES,
            name,
            shapes.LinearSuite(suite.summary, found, found[:1], suite.slow_peers),
        )
    monkeypatch.setitem(shapes.TARGETS, TINY["llama"][0], shapes.Target(9, 60))
    monkeypatch.setattr(cuda, "QUANTIZE", ((8, 32), (8, 64)))
    monkeypatch.setattr(cuda, "HOST_SHAPE", Shape(1, 32, 16))
    monkeypatch.setattr(cuda, "EAGER_SHAPE", Shape(1, 32, 24))
    monkeypatch.setattr(
        peers,
        "absent_reason",
        lambda found, device: "no Triton" if found.slow and found.name != "int_mm" else None,
    )


def test_a_whole_run(tiny, tmp_path, capsys):
    timer = FakeTimer()
    path = tmp_path / "results" / "fake.json"
    options = cuda.Options(json=path, commit="abc", quick=False)
    assert cuda.Run(options, timer).run() == 0
    told = capsys.readouterr().out
    data = json.loads(path.read_text())

    assert data["not_run"] == []
    assert data["failures"] == []
    assert list(data["seconds"]) == list(SUITES)
    assert data["facts"]["commit"] == "abc"
    assert data["facts"]["replays"] == 15
    assert data["facts"]["clocks.sm (after)"] == "1980 MHz"
    assert "left out: triton: no Triton" in told
    # A shape of two suites is measured once.
    measured = [(line["m"], line["k"], line["n"]) for line in data["linear"]]
    assert measured == [(20, 64, 48), (1, 64, 48), (2, 64, 48), (600, 32, 48)]
    quick = ["cuda", "bf16", "mma.sync", "cuda mm", "mma.sync mm"]
    assert list(data["linear"][0]["us"]) == [*quick[:3], "int_mm", *quick[3:]]
    assert list(data["linear"][1]["us"]) == quick  # _int_mm refuses M = 1
    assert list(data["linear"][3]["us"]) == quick  # and is not in the sweeps
    assert [line["cols"] for line in data["quantize"]] == [32, 64]
    assert data["quantize"][0]["cuda"]["percent_of_copy"] == pytest.approx(
        100 * (3 * 8 * 32 + 4 * 8) / 10e-6 / 1e12
    )
    assert data["host_us"] == {"F.linear": 16.0, "INT8Linear(cpu)": 16.0}
    assert data["eager_us"] == {"F.linear": 3.0, "INT8Linear(cpu)": 3.0}
    # Only the captures of the peers that are held to it saw the path.
    assert timer.paths[:6] == [None, None, "sm80", None, None, "sm80"]
    assert peers.GEMM_PATH not in os.environ
    assert timer.released >= 4
    # 10 us where 9 are wanted, 50 where 60 are.
    assert "cuda: 0 of 1 targets met; missed:\n  (20, 64, 48)" in told
    assert "cuda mm: 1 of 1 targets met" in told
    lines = [line for line in told.splitlines() if line.startswith("   20    64    48 | ")]
    assert len(lines) == 2
    assert [cell.strip() for cell in lines[0].split("|")[1:4]] == ["10.0", "20.0", "2.00"]
    assert "9 missed" in lines[0]
    assert "60 met" in lines[1]
    assert f"written: {path}" in told


def test_every_line_of_a_table_is_as_wide_as_its_head(tiny, capsys):
    assert cuda.Run(cuda.Options(suites=("llama",)), FakeTimer()).run() == 0
    told = capsys.readouterr().out.splitlines()
    start = next(i for i, line in enumerate(told) if line.startswith("    M     K     N"))
    assert len({len(line) for line in told[start : start + 4]}) == 1
    assert [line[:17] for line in told[start + 2 : start + 4]] == [
        "   20    64    48",
        "    1    64    48",
    ]


def test_a_wrong_peer_and_a_broken_one_have_no_time_and_the_others_do(
    tiny, monkeypatch, capsys, tmp_path
):
    def broken(inputs: peers.Inputs) -> torch.Tensor:
        raise RuntimeError("no such tile\nand more")

    changed = tuple(
        {
            "cuda": Peer("cuda", "", lambda i: peers.cuda_linear(i) * 1.5),
            "mma.sync": Peer("mma.sync", "", broken, gemm_path="sm80"),
        }.get(found.name, found)
        for found in peers.PEERS
    )
    monkeypatch.setattr(peers, "PEERS", changed)
    path = tmp_path / "wrong.json"
    options = cuda.Options(shapes=(Shape(20, 64, 48),), json=path)
    assert cuda.Run(options, FakeTimer()).run() == 1
    data = json.loads(path.read_text())
    assert list(data["linear"][0]["us"]) == ["bf16", "int_mm", "cuda mm", "mma.sync mm"]
    assert len(data["failures"]) == 2
    assert data["failures"][0].startswith("cuda at (20, 64, 48): Mismatch: cuda differs")
    assert data["failures"][1] == "mma.sync at (20, 64, 48): RuntimeError: no such tile"
    assert "FAILED: mma.sync at (20, 64, 48)" in capsys.readouterr().out
    assert peers.GEMM_PATH not in os.environ


def test_a_spent_budget_stops_between_shapes_and_names_the_rest(
    tiny, monkeypatch, capsys, tmp_path
):
    now = iter(range(1000))
    monkeypatch.setattr(cuda, "Deadline", lambda seconds: Deadline(seconds, lambda: next(now)))
    path = tmp_path / "cut.json"
    assert cuda.Run(cuda.Options(json=path, time_budget=3.5), FakeTimer()).run() == 0
    data = json.loads(path.read_text())
    assert [line["m"] for line in data["linear"]] == [20, 1]
    left = ["quantize 8, 32", "quantize 8, 64", "host", "eager", "2, 64, 48", "600, 32, 48"]
    assert data["not_run"] == left
    assert f"not run: {'; '.join(left)}" in capsys.readouterr().out


def test_a_record_is_whole_after_every_shape(tiny, monkeypatch, tmp_path):
    path = tmp_path / "part.json"
    seen = []
    release = FakeTimer.release

    def look(self: FakeTimer) -> None:
        seen.append(len(json.loads(path.read_text()).get("linear", [])))
        release(self)

    monkeypatch.setattr(FakeTimer, "release", look)
    cuda.Run(cuda.Options(suites=("llama",), json=path), FakeTimer()).run()
    assert seen == [1, 2]
    assert list(tmp_path.iterdir()) == [path]


def test_asked_for_peers_run_in_every_suite_and_an_absent_one_is_an_error(tiny):
    options = cuda.Options(peers=("cuda", "int_mm"))
    present = cuda.present_peers(options, FakeTimer.device)
    assert list(present) == ["cuda", "int_mm"]
    work = cuda.linear_work(options, list(present.values()))
    assert all(found.peer_names == ("cuda", "int_mm") for found in work.values())
    with pytest.raises(cuda.AbsentPeer, match="triton was asked for, but is absent: no Triton"):
        cuda.present_peers(cuda.Options(peers=("triton",)), FakeTimer.device)


def test_quick_takes_few_shapes(tiny):
    work = cuda.linear_work(cuda.Options(quick=True), peers.PEERS)
    assert {name: found.shapes for name, found in work.items()} == {
        "llama": TINY["llama"][:1],
        "small_m": TINY["small_m"][:1],
        "sweep_k": TINY["sweep_k"],
    }


def test_losing_shapes_are_named():
    us = {"cuda": 10.4, "bf16": 12.0, "mma.sync": 10.0, "cuda mm": 9.0, "mma.sync mm": 8.9}
    row = record.make_row(Shape(1, 2, 3), us, 1e12, None, H100)
    assert report.slower_than_replaced([row]) == ["(1, 2, 3) cuda: 4 % slower than mma.sync"]


# -- the CPU --------------------------------------------------------------------------------------


def test_a_quick_run_on_the_cpu(tmp_path, capsys, one_thread):
    path = tmp_path / "cpu.json"
    sizes = ["--shapes", "1,64,96", "33,100,70", "256,512,512"]
    assert cli.main(["bench", "--device", "cpu", "--quick", *sizes, "--json", str(path)]) == 0
    data = json.loads(path.read_text())
    assert [line["m"] for line in data["linear"]] == [1, 33, 256]
    assert all(value > 0 for line in data["linear"] for value in line["us"].values())
    assert data["not_run"] == []
    assert data["facts"]["isa"]
    assert "int8 bf16" in capsys.readouterr().out


def test_a_budget_of_nothing_measures_nothing_on_the_cpu(capsys):
    arguments = ["--device", "cpu", "--shapes", "1,8,8", "2,8,8", "--time-budget", "0"]
    assert cli.main(["bench", *arguments]) == 0
    assert "not run: 1, 8, 8; 2, 8, 8" in capsys.readouterr().out


def test_the_script_is_the_command():
    result = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "bench_linear.py", "--suite", "nonsense"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 2
    assert "python -m int8_ops bench" in result.stderr


# -- the timer of a GPU, on a stand-in for torch.cuda ---------------------------------------------


class FakeCuda:
    """What GraphTimer uses of torch.cuda: every event is 3 ms after the one before."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.milliseconds = 0.0
        self.allocated = 0
        owner = self

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                owner.milliseconds += 3.0
                self.at = owner.milliseconds

            def synchronize(self) -> None:
                pass

            def elapsed_time(self, end: Event) -> float:
                return end.at - self.at

        class CUDAGraph:
            def replay(self) -> None:
                owner.log.append("replay")

        self.Event = Event
        self.CUDAGraph = CUDAGraph

    def current_stream(self) -> FakeCuda:
        return self

    Stream = current_stream

    def wait_stream(self, other: FakeCuda) -> None:
        pass

    def stream(self, stream: FakeCuda) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    @contextlib.contextmanager
    def graph(self, graph: Any) -> Iterator[None]:
        self.log.append("begin")
        yield
        self.log.append("end")

    def synchronize(self) -> None:
        self.log.append("wait")

    def memory_allocated(self, device: torch.device) -> int:
        return self.allocated

    def empty_cache(self) -> None:
        self.log.append("empty")

    def get_device_properties(self, device: torch.device) -> Any:
        return SimpleNamespace(L2_cache_size=50 << 20)


@pytest.fixture
def fake_cuda(monkeypatch) -> FakeCuda:
    fake = FakeCuda()
    for name in (
        *("Event", "CUDAGraph", "Stream", "current_stream", "stream", "graph", "synchronize"),
        *("memory_allocated", "empty_cache", "get_device_properties"),
    ):
        monkeypatch.setattr(torch.cuda, name, getattr(fake, name))
    return fake


def test_a_capture_warms_up_and_keeps_every_output(fake_cuda):
    def call(i: int) -> int:
        fake_cuda.log.append(str(i))
        return i

    captured = GraphTimer(torch.device("cpu")).capture(
        [functools.partial(call, i) for i in range(4)]
    )
    assert fake_cuda.log == [*"01", "wait", "begin", *"0123", "end", "replay", "wait"]
    assert captured.outputs == [0, 1, 2, 3]


def test_replays_are_interleaved_and_timed_a_call(fake_cuda):
    log: list[str] = []
    captured = [Captured(lambda: log.append("a"), [0] * 10), Captured(lambda: log.append("b"), [0])]
    GraphTimer(torch.device("cpu")).time_interleaved(captured, 3)
    assert log == [*"ababab"]
    assert captured[0].us == pytest.approx([300.0] * 3)  # 3 ms for 10 calls
    assert captured[1].median_us == pytest.approx(3000.0)


def test_bandwidth_counts_bytes_read_and_written(fake_cuda, monkeypatch):
    monkeypatch.setattr(timing, "COPY_BYTES", 3_000_000)
    assert GraphTimer(torch.device("cpu")).copy_bytes_per_s(3) == pytest.approx(2e9)


@pytest.mark.parametrize(("bytes_per_set", "sets"), [(1 << 30, 2), (50 << 20, 3), (1 << 20, 101)])
def test_sets_push_twice_the_cache_between_two_uses(bytes_per_set, sets, fake_cuda):
    assert GraphTimer(torch.device("cpu")).input_sets(bytes_per_set) == sets


def test_eager_calls_wait_once_a_round(fake_cuda):
    made: list[str] = []
    calls = {name: [functools.partial(made.append, name + i) for i in "01"] for name in "ab"}
    us = GraphTimer(torch.device("cpu")).eager_us(calls, 2)
    assert set(us) == {"a", "b"}
    assert all(value > 0 for value in us.values())
    assert len(made) == 2 * 3 * timing.EAGER_CALLS  # one round to warm up
    assert made[:2] == ["a0", "a1"]
    assert fake_cuda.log == ["wait"] * (2 * 2 * 3)


def test_host_calls_do_not_wait_for_the_device_each(fake_cuda):
    made: list[str] = []
    us = GraphTimer(torch.device("cpu")).host_us({"a": functools.partial(made.append, "a")}, 100)
    assert us["a"] > 0
    assert len(made) == 300
    assert fake_cuda.log == ["wait"] * 6


def test_release_empties_the_cache(fake_cuda):
    for allocated in (0, 1 << 30):
        fake_cuda.allocated = allocated
        GraphTimer(torch.device("cpu")).release()
    assert fake_cuda.log == ["empty"] * 2


# -- the GPU --------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("shape", ["1,512,1024", "600,64,96"])
def test_a_quick_run_on_the_gpu(shape, tmp_path):
    path = tmp_path / "gpu.json"
    arguments = ["--device", "cuda", "--quick", "--shapes", shape, "--json", str(path)]
    assert cli.main(["bench", *arguments]) == 0
    data = json.loads(path.read_text())
    assert {"cuda", "bf16", "cuda mm"} <= set(data["linear"][0]["us"])
    assert data["facts"]["copy_gb_per_s"] > 0


@pytest.mark.gpu
def test_quantize_and_eager_calls_on_the_gpu(monkeypatch, tmp_path):
    device = torch.device("cuda", torch.cuda.current_device())
    monkeypatch.setattr(cuda, "QUANTIZE", ((512, 512),))
    path = tmp_path / "gpu.json"
    options = cuda.Options(suites=("quantize", "host"), quick=True, json=path)
    assert cuda.Run(options, GraphTimer(device)).run() == 0
    data = json.loads(path.read_text())
    assert data["quantize"][0]["cuda"]["us"] > 0
    assert data["eager_us"]["INT8Linear(cuda)"] > 0


# -- tables and plots -----------------------------------------------------------------------------


def synthetic() -> dict[str, Any]:
    """A record of an H100 with every suite, in which ours takes 1.2 times the floor."""
    facts = {"device": H100, "torch": "2.11.0", "triton": None, "commit": "0123456789ab"}
    facts |= {"copy_gb_per_s": 2980.0, "floor_int8_tops": 1979.0}
    lines = []
    for shape in dict.fromkeys((*LLAMA, *SMALL_M, *SWEEP_K)):
        row = record.make_row(shape, {}, 2.98e12, 1979.0, H100)
        us = {"cuda": 1.2 * row.floor_us, "bf16": 2 * row.floor_us, "mma.sync": 3 * row.floor_us}
        us |= {"cuda mm": 1.1 * row.mm_floor_us, "mma.sync mm": 2 * row.mm_floor_us}
        lines.append({**row.as_json(), "us": us})
    quantized = {"us": 17.0, "gb_per_s": 2800.0, "percent_of_copy": 94.0}
    return {
        "facts": facts,
        "linear": lines,
        "quantize": [{"rows": 32768, "cols": 512, "cuda": quantized}],
        "host_us": {"F.linear": 20.0, "INT8Linear(cuda)": 15.0},
        "eager_us": {"F.linear": 44.0, "INT8Linear(cuda)": 24.0},
    }


def test_the_committed_tables_are_those_of_the_record(capsys):
    assert script("readme_tables").main(["--check"]) == 0, capsys.readouterr().out


def test_tables_are_written_and_checked(tmp_path, monkeypatch, capsys):
    tables = script("readme_tables")
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    (tmp_path / "benchmarks" / "results" / "new").mkdir(parents=True)
    (tmp_path / "benchmarks" / "results" / "new" / "floor.png").touch()
    path = tmp_path / "benchmarks" / "results" / "new.json"
    path.write_text(json.dumps(synthetic()))
    blocks = ("summary", "suites", "plots")
    text = "".join(f"before\n<!-- bench {b} -->\nold\n<!-- end of bench {b} -->\n" for b in blocks)
    for name in tables.FILES:
        (tmp_path / name).write_text(text)
    asked = ["--record", "benchmarks/results/new.json"]
    assert tables.main([*asked, "--check"]) == 1
    assert (tmp_path / "README.md").read_text() == text
    assert "-old" in capsys.readouterr().out
    assert tables.main(asked) == 0
    assert tables.main([*asked, "--check"]) == 0
    written = (tmp_path / "README.md").read_text()
    assert written.count("before\n") == 3
    assert "old" not in written.replace("threshold", "")
    assert f"{H100}, torch 2.11.0, commit 0123456789ab, large copy 2.98 TB/s" in written
    assert "| 32768, 128, 1024 | 30.5 | 50.8 | 1.67 | 83 |" in written
    assert "| 30.5 | 50.8 | 1.67 | 83 | 25.4 | 29 missed | 76.1 |" in written
    for name in LINEAR_SUITES:
        assert f"**`{name}`**" in written
    assert "`INT8Linear` 24.0 us, `F.linear` 44.0 us" in written
    assert "![floor](results/new/floor.png)" in written


def test_a_block_without_its_end_is_an_error():
    tables = script("readme_tables")
    with pytest.raises(ValueError, match="not ended"):
        tables.rendered("<!-- bench suites -->\n", synthetic(), Path("x.json"))
    with pytest.raises(ValueError, match="no block is called 'x'"):
        tables.rendered("<!-- bench x -->\n<!-- end of bench x -->", synthetic(), Path("x.json"))


def test_a_suite_of_which_only_shared_shapes_were_measured_was_not_run():
    data = synthetic()
    data["linear"] = data["linear"][: len(LLAMA)]
    found = record.rows(data)
    assert len(record.of_suite(found, "llama")) == len(LLAMA)
    assert record.of_suite(found, "small_m") == []
    assert record.of_suite(found, "sweep_k") == []
    everything = record.rows(synthetic())
    assert [row.shape for row in record.of_suite(everything, "sweep_k")] == list(SWEEP_K)


@pytest.mark.parametrize("part", ["whole", "llama alone", "no mma.sync, no peak"])
def test_plots(part, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    plot = script("plot")
    data = synthetic()
    names = {"floor", "roofline", "speedup", "small_m"}
    if part == "llama alone":
        data["linear"] = data["linear"][: len(LLAMA)]
        names = {"floor", "roofline"}
    if part == "no mma.sync, no peak":
        data["facts"]["floor_int8_tops"] = None
        data["facts"]["device"] = "another"
        for line in data["linear"]:
            line["us"] = {name: line["us"][name] for name in ("cuda", "bf16")}
    path = tmp_path / "record.json"
    path.write_text(json.dumps(data))
    assert plot.main([str(path), str(tmp_path / "plots")]) == 0
    files = {found.stem: found.read_bytes() for found in (tmp_path / "plots").iterdir()}
    assert set(files) == names
    for content in files.values():
        assert content.startswith(b"\x89PNG")
        assert len(content) > 10_000
    if part == "llama alone":
        assert "speedup: not drawn" in capsys.readouterr().out


def test_nothing_to_plot(tmp_path):
    pytest.importorskip("matplotlib")
    data = {**synthetic(), "linear": []}
    path = tmp_path / "record.json"
    path.write_text(json.dumps(data))
    assert script("plot").main([str(path), str(tmp_path / "plots")]) == 1


def test_bench_is_a_command():
    assert cli.COMMANDS["bench"] is bench

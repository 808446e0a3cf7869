"""The Hopper paths bit for bit: every tile of `resident` and `stream`, and a sweep over all paths.

The reference is computed on the device here: its sums are integers that float64 holds exactly,
and its other operations round as on the CPU, which test_the_reference_is_the_same_here shows.
"""

from __future__ import annotations

import itertools
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cases import DTYPES, same_bits
from torch import Tensor

import int8_ops  # noqa: F401  (registers the ops)
from int8_ops import _extension, reference

ROOT = Path(__file__).resolve().parents[1]
BUILD = _extension.build_info.require()
FORCE = "INT8_OPS_GEMM_CONFIG"
PATH = "INT8_OPS_GEMM_PATH"
STATIONARY_TILES = BUILD.stationary_tiles()
MAX_K = {"resident": 1024, "stationary": STATIONARY_TILES[0]["max_k"]}
BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32}
ops = torch.ops.int8_ops


def why_no_cuda() -> str:
    """Why the kernels can't run here, or an empty text."""
    reason = _extension.unavailable_reason("cuda")
    return "" if reason is None else str(reason)


def why_no_hopper() -> str:
    if why_no_cuda():
        return why_no_cuda()
    if not torch.cuda.is_available():
        return "needs a CUDA device, and torch sees none"
    archs = BUILD.info()["cuda_archs"]
    if not {"9.0a", "9.0a+PTX"} & set(archs.split(";")):
        return f"built for {archs}, not for 9.0a"
    capability = torch.cuda.get_device_capability()
    return "" if capability == (9, 0) else f"needs capability 9.0, and this device has {capability}"


NO_HOPPER = why_no_hopper()
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(bool(why_no_cuda()), reason=why_no_cuda() or "-"),
]
on_hopper = pytest.mark.skipif(bool(NO_HOPPER), reason=NO_HOPPER or "-")

RESIDENT = [("resident", tile) for tile in range(len(BUILD.resident_tiles()))]
STREAM = [("stream", tile) for tile in range(len(BUILD.stream_tiles()))]
STATIONARY = [("stationary", tile) for tile in range(len(STATIONARY_TILES))]
every_tile = pytest.mark.parametrize(
    ("path", "tile"), RESIDENT + STREAM + STATIONARY, ids=lambda value: str(value)
)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)

ROWS = (1, 5, 64, 127, 128, 129, 300, 1000, 4133)
# No multiple of 64 among them: rests of every tile, of one column group of eight and more.
COLUMNS = (8, 24, 72, 136, 200, 264, 520, 1032)
SHORT = (16, 48, 128, 144, 256, 272, 512, 640, 1008, 1024)
LONG = (2064, 4096, 14336)


@pytest.fixture
def cuda() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())


def generator(seed: int, device: torch.device) -> torch.Generator:
    return torch.Generator(device).manual_seed(seed)


def same_here(got: Tensor, expected: Tensor) -> bool:
    """same_bits() on the device."""
    if got.shape != expected.shape or got.dtype != expected.dtype:
        return False
    bits = BITS[got.element_size()]
    same = got.view(bits) == expected.view(bits)
    if got.is_floating_point():
        same |= got.isnan() & expected.isnan()
    return bool(same.all())


def equal(what: object, got: Tensor, expected: Tensor) -> None:
    if same_here(got, expected):
        return
    where = f"{what}: got {tuple(got.shape)} {got.dtype}"
    if got.shape == expected.shape and got.dtype == expected.dtype:
        different = ~((got == expected) | (got.isnan() & expected.isnan()))
        index = different.nonzero()
        where += f"; {len(index)} values differ, the first at {index[:4].tolist()}"
    pytest.fail(f"{where}\n{got}\nexpected\n{expected}")


def leave_garbage(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> None:
    """In the memory that the allocator hands out next: what is not written then shows."""
    torch.full((rows, columns), 77, dtype=dtype, device=device)


def integers(rows: int, cols: int, g: torch.Generator) -> Tensor:
    return torch.randint(-128, 128, (rows, cols), generator=g, dtype=torch.int8, device=g.device)


def positive(rows: int, g: torch.Generator, size: float) -> Tensor:
    return torch.rand((rows, 1), generator=g, device=g.device) * size + 1e-4


def hard_rows(m: int, k: int, dtype: torch.dtype, g: torch.Generator) -> Tensor:
    """Rows of many magnitudes; every eleventh holds one of the values that need care."""
    device = g.device
    size = torch.tensor([1.0, 1e-3, 30.0, 1e-6], device=device)
    size = size[torch.randint(4, (m, 1), generator=g, device=device)]
    x = (torch.randn((m, k), generator=g, device=device) * size).to(dtype)
    info = torch.finfo(dtype)
    columns = torch.randint(k, (m,), generator=g, device=device)
    values = [torch.nan, torch.inf, -torch.inf, info.max, -info.max]
    for i, value in enumerate(values):
        rows = torch.arange(m, device=device)[i::11]
        x[rows, columns[rows]] = value
    for i, value in enumerate((0.0, -0.0, info.tiny, info.smallest_normal * info.eps)):
        x[len(values) + i :: 11] = value
    ties = tie_rows(-(-m // 11), k, dtype, g)
    x[9::11] = ties[: len(x[9::11])]
    return x


def tie_rows(m: int, k: int, dtype: torch.dtype, g: torch.Generator) -> Tensor:
    """Integers or halves with a largest value that makes quotients end in exactly a half."""
    device = g.device
    # The last three: 127 times 3, 7 and 15, which float16 rows are divided for.
    largest = [254.0, 160.0, 127.0, 63.5, 508.0, 2.0**-9 * 127, 381.0, 889.0, 1905.0]
    step = [1.0, 1.0, 0.5, 0.25, 2.0, 2.0**-10, 0.5, 0.5, 1.0]
    largest, step = (torch.tensor(values, device=device) for values in (largest, step))
    kind = torch.arange(m, device=device).remainder(len(largest))[:, None]
    count = (largest / step)[kind]
    signed = torch.rand((m, k), generator=g, device=device) * 2 - 1
    x = (signed * count).round() * step[kind]
    column = torch.randint(k, (m, 1), generator=g, device=device)
    return x.scatter(1, column, largest[kind]).to(dtype)


class Problem:
    """Weights, scales, bias and int8 rows of one shape, and what every op must return."""

    def __init__(self, m: int, n: int, k: int, device: torch.device, seed: int = 0) -> None:
        g = generator(m * 31 + n * 17 + k + seed, device)
        self.g = g
        self.shape = (m, n, k)
        self.w = integers(n, k, g)
        self.w_scale = positive(n, g, 0.02)
        if n > 1:
            self.w_scale[n // 2] = torch.nan
        self.bias32 = torch.randn(n, generator=g, device=device)
        self.a = integers(m, k, g)
        self.a_scale = positive(m, g, 0.1)
        if m > 1:
            self.a_scale[m // 2] = torch.nan
        self.product = reference.int8_mm(self.a, self.w)

    def bias(self, dtype: torch.dtype | None) -> Tensor | None:
        return None if dtype is None else self.bias32.to(dtype)

    def check_mm(self, where: object) -> None:
        leave_garbage(*self.product.shape, torch.int32, self.w.device)
        equal((where, self.shape, "mm"), ops.int8_mm(self.a, self.w), self.product)

    def check_scaled_mm(
        self, where: object, bias: torch.dtype | None, out_dtype: torch.dtype
    ) -> None:
        arguments = self.a_scale, self.w_scale, self.bias(bias), out_dtype
        expected = reference.epilogue(self.product, *arguments)
        leave_garbage(*expected.shape, out_dtype, self.w.device)
        got = ops.int8_scaled_mm(self.a, self.w, *arguments)
        equal((where, self.shape, "scaled_mm", bias, out_dtype), got, expected)

    def check_linear(
        self, where: object, x: Tensor, bias: torch.dtype | None, out_dtype: torch.dtype
    ) -> None:
        arguments = self.w, self.w_scale, self.bias(bias), out_dtype
        expected = reference.int8_linear(x, *arguments)
        leave_garbage(*expected.shape, out_dtype, self.w.device)
        got = ops.int8_linear(x, *arguments)
        equal((where, self.shape, "linear", x.dtype, bias, out_dtype), got, expected)

    def check(
        self,
        where: object,
        x_dtype: torch.dtype,
        bias: torch.dtype | None,
        out_dtype: torch.dtype,
    ) -> None:
        """All three ops."""
        m, _, k = self.shape
        self.check_linear(where, hard_rows(m, k, x_dtype, self.g), bias, out_dtype)
        self.check_scaled_mm(where, bias, out_dtype)
        self.check_mm(where)


def skip_long_rows(path: str, k: int) -> None:
    if k > MAX_K.get(path, k):
        pytest.skip("more than the path takes")


def force(
    monkeypatch: pytest.MonkeyPatch,
    path: str,
    tile: int,
    splits: int = 1,
    before: bool = False,
    x: tuple[torch.dtype, int] | None = None,
) -> str:
    """The plan for the calls that follow; `before`: x is quantized in a pass before.

    With `x`, dtype and K of the rows, also where the path does not quantize such rows itself.
    """
    if path == "stationary" and x is not None:
        block_k, cluster = (STATIONARY_TILES[tile][key] for key in ("block_k", "cluster"))
        before |= x[0] == torch.float32 or x[1] > cluster * block_k
    text = f"{path}:{tile}:{splits}" + (":pass" if before else "")
    monkeypatch.setenv(FORCE, text)
    return text


def test_the_reference_is_the_same_here(cuda: torch.device) -> None:
    for i, dtype in enumerate(DTYPES):
        problem = Problem(65, 72, 400, cuda)
        x = torch.cat([hard_rows(65, 400, dtype, problem.g), tie_rows(65, 400, dtype, problem.g)])
        bias = problem.bias((None, *DTYPES)[i])
        arguments = x, problem.w, problem.w_scale, bias, DTYPES[i - 1]
        here = reference.int8_linear(*arguments)
        there = [t.cpu() if isinstance(t, Tensor) else t for t in arguments]
        assert same_bits(here, reference.int8_linear(*there))
        q, scale = reference.quantize_per_token(x)
        expected = reference.quantize_per_token(x.cpu())
        assert same_bits(q, expected[0])
        assert same_bits(scale, expected[1])


# ---- every tile, forced --------------------------------------------------------------------------


@on_hopper
@pytest.mark.parametrize(
    ("path", "tile", "k"),
    [
        *((*which, k) for which in RESIDENT for k in SHORT),
        *((*which, k) for which in STREAM for k in SHORT + LONG),
        *((*which, k) for which in STATIONARY for k in SHORT if k <= MAX_K["stationary"]),
    ],
)
def test_every_shape(
    path: str, tile: int, k: int, cuda: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    for i, (m, n) in enumerate(itertools.product(ROWS, COLUMNS)):
        # Their periods differ, so that all pairs occur; every third case has its pass before.
        x_dtype, out_dtype = DTYPES[i % 3], DTYPES[i // 3 % 3]
        bias = (None, *DTYPES)[i % 4]
        plan = force(monkeypatch, path, tile, before=i % 5 == 4, x=(x_dtype, k))
        Problem(m, n, k, cuda).check(plan, x_dtype, bias, out_dtype)


@on_hopper
@every_tile
@every_dtype
@pytest.mark.parametrize("k", [112, 400, 1024])
@pytest.mark.parametrize("before", [False, True], ids=["inside", "pass"])
def test_every_dtype(
    path: str,
    tile: int,
    dtype: torch.dtype,
    k: int,
    before: bool,
    cuda: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    skip_long_rows(path, k)
    plan = force(monkeypatch, path, tile, before=before, x=(dtype, k))
    problem = Problem(150, 328, k, cuda)
    for bias, out_dtype in itertools.product((None, *DTYPES), DTYPES):
        problem.check(plan, dtype, bias, out_dtype)


@on_hopper
@pytest.mark.parametrize(("path", "tile"), RESIDENT)
@pytest.mark.parametrize("parts", [2, 3, 5, 8, 64])
@pytest.mark.parametrize("before", [False, True], ids=["inside", "pass"])
def test_parts_of_the_columns(
    path: str,
    tile: int,
    parts: int,
    before: bool,
    cuda: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """More parts than column tiles are cut to as many."""
    plan = force(monkeypatch, path, tile, parts, before)
    for i, (m, n, k) in enumerate(
        [(5, 1032, 128), (129, 200, 512), (1000, 1032, 1024), (4133, 520, 256), (64, 8, 48)]
    ):
        Problem(m, n, k, cuda).check(plan, DTYPES[i % 3], (None, *DTYPES)[i % 4], DTYPES[i // 2])


@on_hopper
@every_tile
@pytest.mark.parametrize("before", [False, True], ids=["inside", "pass"])
def test_blocks_take_several_tiles(
    path: str, tile: int, before: bool, cuda: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More rows than all blocks take at once, and a rest; K-blocks fewer than stages, and more."""
    multiprocessors = torch.cuda.get_device_properties(cuda).multi_processor_count
    rows = 128 * multiprocessors * 2 + 77
    for i, (n, k) in enumerate([(264, 144), (72, 1024), (1032, 16), (2056, 512)]):
        if k > MAX_K.get(path, k):
            continue
        x_dtype = (torch.bfloat16, torch.float32, torch.float16, torch.bfloat16)[i]
        plan = force(monkeypatch, path, tile, before=before, x=(x_dtype, k))
        out_dtype = DTYPES[i % 3 - 2]
        Problem(rows, n, k, cuda).check(plan, x_dtype, DTYPES[i % 3], out_dtype)


@on_hopper
@every_tile
@pytest.mark.parametrize("value", [-128, 127])
def test_largest_sums(
    path: str, tile: int, value: int, cuda: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """-128 x -128 and -128 x 127 over the longest K of the path: what int32 holds at most."""
    plan = force(monkeypatch, path, tile)
    k = MAX_K.get(path, reference.MAX_K // 16 * 16)
    a = torch.full((130, k), -128, dtype=torch.int8, device=cuda)
    w = torch.full((72, k), value, dtype=torch.int8, device=cuda)
    equal((plan, k), ops.int8_mm(a, w), reference.int8_mm(a, w))
    scale = torch.full((130, 1), 3e-9, device=cuda), torch.full((72, 1), 0.7, device=cuda)
    for dtype in DTYPES:
        got = ops.int8_scaled_mm(a, w, *scale, None, dtype)
        equal((plan, k, dtype), got, reference.int8_scaled_mm(a, w, *scale, None, dtype))


@on_hopper
@every_tile
@every_dtype
@pytest.mark.parametrize("k", [48, 128, 256, 512, 1024, 2064])
def test_every_quantized_value(
    path: str,
    tile: int,
    dtype: torch.dtype,
    k: int,
    cuda: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Weights of one 1 a column show the int8 values: integers, ties, special and random rows."""
    skip_long_rows(path, k)
    plan = force(monkeypatch, path, tile, x=(dtype, k))
    g = generator(k, cuda)
    w = torch.eye(k, dtype=torch.int8, device=cuda)
    ones = torch.ones((k, 1), device=cuda)
    # Row r: integers up to r + 1, every quotient of them.
    ramp = torch.arange(k, device=cuda)[None] + torch.randint(
        256, (256, 1), generator=g, device=cuda
    )
    limit = torch.arange(1, 257, device=cuda)[:, None]
    ramp = ramp.remainder(2 * limit + 1) - limit
    rows = [ramp.to(dtype), hard_rows(517, k, dtype, g), tie_rows(301, k, dtype, g)]
    for x in (torch.cat(rows), *rows):
        equal(
            (plan, k, dtype),
            ops.int8_linear(x, w, ones, None, torch.float32),
            reference.int8_linear(x, w, ones, None, torch.float32),
        )


@on_hopper
@every_tile
def test_no_rows_and_no_columns(
    path: str, tile: int, cuda: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    force(monkeypatch, path, tile)
    x = torch.randn((0, 64), device=cuda).bfloat16()
    w = torch.ones((24, 64), dtype=torch.int8, device=cuda)
    scale = torch.ones((24, 1), device=cuda)
    assert ops.int8_linear(x, w, scale, None, None).shape == (0, 24)
    x = torch.randn((3, 64), device=cuda).bfloat16()
    assert ops.int8_linear(x, w[:0], scale[:0], None, None).shape == (3, 0)


# ---- a row's bits do not depend on its company ---------------------------------------------------

PARTS = [(0, 1), (5, 1), (63, 2), (100, 28), (127, 2), (128, 64), (300, 129), (699, 1), (1, 698)]


@on_hopper
@every_tile
@every_dtype
@pytest.mark.parametrize("k", [112, 144, 512, 1024])
def test_a_row_is_the_same_in_every_batch(
    path: str,
    tile: int,
    dtype: torch.dtype,
    k: int,
    cuda: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    skip_long_rows(path, k)
    plan = force(monkeypatch, path, tile, x=(dtype, k))
    problem = Problem(700, 264, k, cuda)
    x = hard_rows(700, k, dtype, problem.g)
    arguments = problem.w, problem.w_scale, problem.bias(dtype), None
    whole = ops.int8_linear(x, *arguments)
    for first, count in PARTS:
        part = slice(first, first + count)
        equal((plan, first, count), ops.int8_linear(x[part], *arguments), whole[part])


@every_dtype
@pytest.mark.parametrize(("k", "n"), [(512, 1024), (1024, 136), (2064, 520), (512, 131)])
def test_a_row_is_the_same_on_every_path(
    k: int, n: int, dtype: torch.dtype, cuda: torch.device
) -> None:
    """The heuristics change the path with the number of rows."""
    problem = Problem(4096, n, k, cuda)
    x = hard_rows(4096, k, dtype, problem.g)
    arguments = problem.w, problem.w_scale, problem.bias(dtype), None
    whole = ops.int8_linear(x, *arguments)
    for count in (1, 2, 8, 9, 17, 33, 64, 128, 129, 256, 257, 512, 1000, 2048, 4095):
        for first in (0, (4096 - count) // 16 * 8, 4096 - count):
            part = slice(first, first + count)
            equal((k, n, first, count), ops.int8_linear(x[part], *arguments), whole[part])


# ---- one after the other: dependent launches, graphs, streams ------------------------------------

# Plans of every path, with a shape M, N, K each; a chain below has N for its K as well.
PLANS = {
    "sm80:1:1": (300, 528, 512),
    "skinny:0:1": (8, 528, 1024),
    "skinny:3:1": (16, 528, 1024),
    **{f"resident:{t}:1": (1000, 1008, 512) for _, t in RESIDENT},
    **{f"resident:{t}:3": (300, 528, 1024) for _, t in RESIDENT},
    **{f"stream:{t}:1": (1000, 528, 1024) for _, t in STREAM},
    **{f"stream:{t}:1:pass": (1000, 528, 1024) for _, t in STREAM},
    **{f"stationary:{t}:1": (9000, 112 << t, 128 << t) for _, t in STATIONARY},
    **{f"stationary:{t}:1:pass": (1000, 496, 1024) for _, t in STATIONARY},
    **{f"panel:{t}:1": (77, 496, 512) for t in range(len(BUILD.panel_tiles()))},
}
every_plan = pytest.mark.parametrize(("plan", "shape"), PLANS.items(), ids=list(PLANS))


def skip_where_absent(plan: str) -> None:
    if plan.startswith(("resident", "stream", "stationary", "panel")) and NO_HOPPER:
        pytest.skip(NO_HOPPER)


@every_plan
def test_a_thousand_replays_give_one_result(
    plan: str, shape: tuple[int, int, int], cuda: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    skip_where_absent(plan)
    monkeypatch.setenv(FORCE, plan)
    problem = Problem(*shape, cuda)
    x = hard_rows(shape[0], shape[2], torch.bfloat16, problem.g)
    arguments = problem.w, problem.w_scale, problem.bias(torch.bfloat16), None
    expected = reference.int8_linear(x, *arguments)
    ops.int8_linear(x, *arguments)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = ops.int8_linear(x, *arguments)
    wrong = torch.zeros((), dtype=torch.int64, device=cuda)
    want = expected.nan_to_num(nan=1e30)
    for _ in range(1000):
        result.fill_(-77.0)
        graph.replay()
        wrong += (result.nan_to_num(nan=1e30) != want).any()
    assert wrong.item() == 0
    equal(plan, result, expected)
    # Without a pause between them: one replay's counters and stages are the next one's.
    for _ in range(200):
        graph.replay()
    equal(plan, result, expected)


class Chain:
    """Each call uses what the one before it wrote: weights, scales, rows."""

    def __init__(self, m: int, n: int, k: int, device: torch.device, seed: int = 0) -> None:
        g = generator(seed, device)
        x = torch.randn((m, k), generator=g, device=device).bfloat16()
        there = torch.randn((n, k), generator=g, device=device).bfloat16() * k**-0.5
        back = torch.randn((k, n), generator=g, device=device).bfloat16() * n**-0.5
        self.tensors = x, there, back
        self.expected = self.compute(reference)

    def compute(self, to: object) -> Tensor:
        x, *weights = self.tensors
        for _ in range(2):
            for w_float in weights:
                w, w_scale = to.quantize_per_channel(w_float, 0)
                x = to.int8_linear(x, w, w_scale, None, None)
            # int8 rows that the kernel before made.
            q, scale = to.quantize_per_token(x)
            w, w_scale = to.quantize_per_channel(weights[0], 0)
            y = to.int8_scaled_mm(q, w, scale, w_scale, None, torch.bfloat16)
            w, w_scale = to.quantize_per_channel(weights[1], 0)
            x = to.int8_linear(y, w, w_scale, None, None)
        return x


@every_plan
def test_calls_in_a_row(
    plan: str, shape: tuple[int, int, int], cuda: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    skip_where_absent(plan)
    monkeypatch.setenv(FORCE, plan)
    m, n, k = shape
    chain = Chain(m, n, k, cuda)
    assert chain.expected.isfinite().all()
    assert (chain.expected != 0).float().mean() > 0.5
    results = [chain.compute(ops) for _ in range(30)]
    for result in results:
        equal(plan, result, chain.expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = chain.compute(ops)
    for _ in range(100):
        graph.replay()
    equal((plan, "graph"), captured, chain.expected)


def run_python(code: str, timeout: float, **env: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": path, **env},
        capture_output=True,
        text=True,
        timeout=timeout,
    )


@every_plan
def test_streams_of_two_priorities_finish(plan: str, shape: tuple[int, int, int]) -> None:
    """Kernels whose blocks wait for each other must not wait for blocks that find no place.

    In a process of its own, which can be ended where they do.
    """
    skip_where_absent(plan)
    code = f"""
import torch
import int8_ops
from test_hopper import Chain, equal
device = torch.device("cuda", 0)
m, n, k = {shape}
# As many rows as fill the device, and fewer.
rows = m if {plan!r}.startswith(("skinny", "panel")) else 9000
chains = [Chain(rows if i % 2 else m, n, k, device, seed=i) for i in range(4)]
for chain in chains:
    chain.compute(torch.ops.int8_ops)
torch.cuda.synchronize()
streams = [torch.cuda.Stream(device, priority=priority) for priority in (0, -1, 0, -1)]
results = [[] for _ in chains]
for _ in range(25):
    for chain, stream, kept in zip(chains, streams, results):
        with torch.cuda.stream(stream):
            kept.append(chain.compute(torch.ops.int8_ops))
torch.cuda.synchronize()
for chain, kept in zip(chains, results):
    for result in kept:
        equal("stream", result, chain.expected)
print("equal")
"""
    try:
        run = run_python(code, 120, **{FORCE: plan})
    except subprocess.TimeoutExpired:
        pytest.fail(f"{plan}: the kernels on four streams did not end within two minutes")
    assert run.returncode == 0, run.stdout + run.stderr
    assert "equal" in run.stdout


# ---- what the paths refuse -----------------------------------------------------------------------


def offset_by(t: Tensor, elements: int) -> Tensor:
    """A contiguous copy that starts `elements` into an allocation."""
    flat = torch.empty(t.numel() + elements, dtype=t.dtype, device=t.device)
    view = flat[elements:].view(t.shape)
    view.copy_(t)
    return view


@on_hopper
@every_tile
@pytest.mark.parametrize(
    ("n", "k", "message"),
    [
        (64, 100, "it takes no rows that start unaligned"),
        (64, 1001, "it takes no rows that start unaligned"),
        (63, 64, "it takes N in multiples of 8, and 16-byte aligned tensors"),
        (68, 64, "it takes N in multiples of 8, and 16-byte aligned tensors"),
    ],
)
def test_a_forced_plan_that_cannot_run_is_an_error(
    path: str,
    tile: int,
    n: int,
    k: int,
    message: str,
    cuda: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    force(monkeypatch, path, tile)
    a = torch.ones((16, k), dtype=torch.int8, device=cuda)
    w = torch.ones((n, k), dtype=torch.int8, device=cuda)
    expected = re.escape(f"for M = 16, N = {n}, K = {k}, but {message}")
    with pytest.raises(RuntimeError, match=expected):
        ops.int8_mm(a, w)
    monkeypatch.delenv(FORCE)
    monkeypatch.setenv(PATH, path)
    with pytest.raises(RuntimeError, match=re.escape(f"N = {n}, K = {k}: {message}")):
        ops.int8_mm(a, w)


@on_hopper
@pytest.mark.parametrize(("path", "tile"), RESIDENT + STATIONARY)
def test_long_rows_are_refused(
    path: str, tile: int, cuda: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    force(monkeypatch, path, tile)
    a = torch.ones((16, MAX_K[path] + 16), dtype=torch.int8, device=cuda)
    with pytest.raises(RuntimeError, match=f"but it takes K up to {MAX_K[path]}"):
        ops.int8_mm(a, a)


@on_hopper
@pytest.mark.parametrize(("path", "tile"), STATIONARY)
def test_stationary_says_which_rows_it_does_not_quantize(
    path: str, tile: int, cuda: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    w = torch.ones((24, 1024), dtype=torch.int8, device=cuda)
    scale = torch.ones((24, 1), device=cuda)
    force(monkeypatch, path, tile)
    x = torch.ones((16, 1024), device=cuda)
    with pytest.raises(RuntimeError, match="but it quantizes rows of 16-bit values alone"):
        ops.int8_linear(x, w, scale, None, None)
    longest = STATIONARY_TILES[tile]["cluster"] * STATIONARY_TILES[tile]["block_k"]
    if longest < 1024:
        with pytest.raises(RuntimeError, match=f"quantize K up to {longest}"):
            ops.int8_linear(x.half(), w, scale, None, None)
    force(monkeypatch, path, tile, before=True)
    expected = reference.int8_linear(x, w, scale, None)
    equal(path, ops.int8_linear(x, w, scale, None, None), expected)


@pytest.mark.skipif(not NO_HOPPER, reason="this device has them")
@every_tile
def test_the_paths_want_their_device(
    path: str, tile: int, cuda: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    force(monkeypatch, path, tile)
    a = torch.ones((16, 64), dtype=torch.int8, device=cuda)
    with pytest.raises(RuntimeError, match=r"needs a device of capability 9\.0 and a build for"):
        ops.int8_mm(a, a)


@pytest.mark.parametrize("which", ["x", "w", "w_scale", "bias"])
@pytest.mark.parametrize("elements", [1, 2, 3, 4, 8])
@every_dtype
def test_offset_tensors_are_served(
    which: str, elements: int, dtype: torch.dtype, cuda: torch.device
) -> None:
    """By whatever path takes them, and the same bits."""
    for m, n, k in ((300, 136, 512), (8, 136, 512), (300, 136, 2064)):
        problem = Problem(m, n, k, cuda)
        operands = {
            "x": hard_rows(m, k, dtype, problem.g),
            "w": problem.w,
            "w_scale": problem.w_scale,
            "bias": problem.bias(dtype),
        }
        expected = reference.int8_linear(*operands.values())
        operands[which] = offset_by(operands[which], elements)
        got = ops.int8_linear(*operands.values(), None)
        equal((which, elements, m, n, k), got, expected)


# ---- a sweep over what the heuristics choose -----------------------------------------------------

SWEEPS = 20
CASES_A_SWEEP = 260  # 5,200 in all


def random_size(pick: random.Random, most: int, unit: int) -> int:
    """Evenly in the logarithm; half of them odd, most others a multiple of `unit`."""
    size = min(most, int(2 ** pick.uniform(0, most.bit_length() - 1)) + pick.randrange(2))
    chance = pick.random()
    if chance < 0.4:
        return max(1, size - 1 + size % 2)
    if chance < 0.9:
        return min(most, -(-size // unit) * unit)
    return size


def random_shape(pick: random.Random) -> tuple[int, int, int]:
    m = 0 if pick.random() < 0.01 else random_size(pick, 4096, 1)
    n = random_size(pick, 8192, 8)
    k = random_size(pick, 8192, 16)
    # The largest of all would take most of the time.
    while m * n * k > 2**34:
        m = m // 2 + 1
    return m, n, k


def test_random_shapes_are_of_every_kind() -> None:
    pick = random.Random(0)
    shapes = [random_shape(pick) for _ in range(SWEEPS * CASES_A_SWEEP)]
    assert sum(m * n * k for m, n, k in shapes) / len(shapes) < 2**31
    for i, most in enumerate((4096, 8192, 8192)):
        sizes = [shape[i] for shape in shapes]
        assert max(sizes) > most * 0.9
        assert 0.3 < sum(size % 2 for size in sizes) / len(sizes) < 0.7
    assert min(shape[0] for shape in shapes) == 0
    assert sum(n % 8 == 0 and k % 16 == 0 for _, n, k in shapes) > len(shapes) / 5


@pytest.mark.parametrize("seed", range(SWEEPS))
def test_random_shapes(seed: int, cuda: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every op, dtype, with bias or without, through the automatic choice."""
    monkeypatch.delenv(FORCE, raising=False)
    monkeypatch.delenv(PATH, raising=False)
    pick = random.Random(seed)
    for case in range(CASES_A_SWEEP):
        m, n, k = random_shape(pick)
        where = f"case {case} of seed {seed}"
        problem = Problem(m, n, k, cuda, seed=seed)
        bias = pick.choice((None, *DTYPES))
        out_dtype = pick.choice(DTYPES)
        if pick.random() < 0.06:
            problem.w = offset_by(problem.w, pick.randrange(1, 17))
        match pick.randrange(8):
            case 0:
                problem.check_mm(where)
            case 1 | 2:
                problem.check_scaled_mm(where, bias, out_dtype)
            case _:
                x = hard_rows(m, k, pick.choice(DTYPES), problem.g)
                if pick.random() < 0.06:
                    x = offset_by(x, pick.randrange(1, 9))
                problem.check_linear(where, x, bias, out_dtype)

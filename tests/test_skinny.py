"""The CUDA kernel for few rows bit for bit: every tile, dtype, tail and special value."""

from __future__ import annotations

import functools
import itertools

import pytest
import torch
from cases import DTYPES, same_bits
from torch import Tensor

import int8_ops  # noqa: F401  (registers the ops)
from int8_ops import _extension, reference

BUILD = _extension.build_info.require()
TILES: list[dict] = BUILD.skinny_tiles()
FORCE = "INT8_OPS_GEMM_CONFIG"
PATH = "INT8_OPS_GEMM_PATH"
ops = torch.ops.int8_ops

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        _extension.unavailable_reason("cuda") is not None,
        reason=str(_extension.unavailable_reason("cuda")),
    ),
]
every_tile = pytest.mark.parametrize("tile", range(len(TILES)))
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)

# N, K: tails of columns and of K, K below what the warps share, several tiles a block.
SIZES = [(1, 16), (24, 48), (131, 144), (136, 512), (257, 528), (72, 1040), (40, 4096), (33, 2064)]
ROWS = (1, 2, 3, 5, 7, 8, 9, 15, 16, 17, 24, 31, 32, 33, 47, 63, 64)


@pytest.fixture
def cuda() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())


@functools.cache
def shared_limit() -> int:
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return properties.shared_memory_per_block_optin


def fits(tile: int, m: int, k: int) -> bool:
    return BUILD.skinny_tiles(m=m, k=k)[tile]["shared_bytes"] <= shared_limit()


def equal(what: object, got: Tensor, expected: Tensor) -> None:
    assert same_bits(got, expected), f"{what}: got\n{got}\nexpected\n{expected}"


@functools.cache
def weights(n: int, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """w, w_scale, float32 bias; one column is NaN."""
    g = torch.Generator().manual_seed(n * 31 + k)
    w = torch.randint(-128, 128, (n, k), generator=g, dtype=torch.int8)
    w_scale = torch.rand((n, 1), generator=g) * 0.02 + 1e-4
    if n > 1:
        w_scale[n // 2] = torch.nan
    return w, w_scale, torch.randn(n, generator=g)


@functools.cache
def given(m: int, k: int) -> tuple[Tensor, Tensor]:
    """a and a_scale; one row is NaN."""
    g = torch.Generator().manual_seed(m * 17 + k)
    a_scale = torch.rand((m, 1), generator=g) * 0.1 + 1e-3
    if m > 1:
        a_scale[m // 2] = torch.nan
    return torch.randint(-128, 128, (m, k), generator=g, dtype=torch.int8), a_scale


@functools.cache
def rows_of(m: int, k: int, dtype: torch.dtype) -> Tensor:
    """Rows of many magnitudes; every eleventh holds one of the values that need care."""
    g = torch.Generator().manual_seed(m * 13 + k)
    size = torch.tensor([1.0, 1e-3, 30.0, 1e-6])[torch.randint(4, (m, 1), generator=g)]
    x = (torch.randn((m, k), generator=g) * size).to(dtype)
    first = int(torch.randint(11, (1,), generator=g))
    for row in range(m):
        column = int(torch.randint(k, (1,), generator=g))
        match (first + row) % 11:
            case 0:
                x[row, column] = torch.nan
            case 1:
                x[row, column] = torch.inf
            case 2:
                x[row, column] = -torch.inf
            case 3:
                x[row] = 0.0
            case 4:
                x[row] = -0.0
            case 5:
                x[row] = torch.finfo(dtype).tiny
            case 6:
                x[row, column] = torch.finfo(dtype).max
            case 7:
                # Multiples of a half with the largest at 127: x / scale lands on ties exactly.
                x[row] = torch.randint(-253, 254, (k,), generator=g).to(dtype) / 2
                x[row, column] = 127.0
    return x


def check(
    where: object,
    m: int,
    n: int,
    k: int,
    cuda: torch.device,
    x_dtype: torch.dtype,
    bias_dtype: torch.dtype | None,
    out_dtype: torch.dtype,
) -> None:
    """int8_linear, int8_scaled_mm and int8_mm."""
    where = (where, m, n, k, x_dtype, bias_dtype, out_dtype)
    w, w_scale, bias32 = weights(n, k)
    bias = None if bias_dtype is None else bias32.to(bias_dtype)
    there = w.to(cuda), w_scale.to(cuda), None if bias is None else bias.to(cuda)
    x = rows_of(m, k, x_dtype)
    got = ops.int8_linear(x.to(cuda), *there, out_dtype)
    equal((*where, "linear"), got, reference.int8_linear(x, w, w_scale, bias, out_dtype))
    a, a_scale = given(m, k)
    got = ops.int8_scaled_mm(a.to(cuda), there[0], a_scale.to(cuda), *there[1:], out_dtype)
    expected = reference.int8_scaled_mm(a, w, a_scale, w_scale, bias, out_dtype)
    equal((*where, "scaled_mm"), got, expected)
    equal((*where, "mm"), ops.int8_mm(a.to(cuda), there[0]), reference.int8_mm(a, w))


@every_tile
@pytest.mark.parametrize(("n", "k"), SIZES)
def test_every_count_of_rows(
    tile: int, n: int, k: int, cuda: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(FORCE, f"skinny:{tile}:1")
    for i, m in enumerate(ROWS):
        if fits(tile, m, k):
            bias = (None, *DTYPES)[i % 4]
            check(tile, m, n, k, cuda, DTYPES[i % 3], bias, DTYPES[(i + k // 16) % 3])


@every_tile
@every_dtype
@pytest.mark.parametrize("n", [136, 131], ids=["vector", "scalar"])
def test_every_dtype(
    tile: int, dtype: torch.dtype, n: int, cuda: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(FORCE, f"skinny:{tile}:1")
    for bias, out in itertools.product((None, *DTYPES), DTYPES):
        check(tile, 11, n, 1040, cuda, dtype, bias, out)


@every_tile
@every_dtype
@pytest.mark.parametrize("m", [1, 13, 64])
def test_a_pass_before(
    tile: int, dtype: torch.dtype, m: int, cuda: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """x is quantized by a kernel of its own, and the rows are given."""
    monkeypatch.setenv(FORCE, f"skinny:{tile}:1:pass")
    for n, k in SIZES:
        if fits(tile, m, k):
            check(tile, m, n, k, cuda, dtype, dtype, dtype)


@every_tile
@every_dtype
@pytest.mark.parametrize(("m", "k"), [(1, 14336), (8, 14336), (16, 4096), (32, 4096), (64, 1024)])
def test_rows_in_several_batches(
    tile: int,
    dtype: torch.dtype,
    m: int,
    k: int,
    cuda: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """More of x than a block holds in registers: it is read twice."""
    if not fits(tile, m, k):
        pytest.skip("more shared memory than a block has on this device")
    monkeypatch.setenv(FORCE, f"skinny:{tile}:1")
    check(tile, m, 48, k, cuda, dtype, None, dtype)


@pytest.mark.parametrize("m", [65, 130, 255, 256])
@every_tile
def test_rows_up_to_the_most_there_may_be(
    tile: int, m: int, cuda: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(FORCE, f"skinny:{tile}:1")
    for i, (n, k) in enumerate(SIZES):
        if fits(tile, m, k):
            check(tile, m, n, k, cuda, DTYPES[i % 3], None, DTYPES[(i + 1) % 3])


def test_more_rows_are_refused(cuda: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FORCE, "skinny:0:1")
    a = torch.ones((257, 64), dtype=torch.int8, device=cuda)
    with pytest.raises(RuntimeError, match="M = 257, N = 257, K = 64, but it takes M up to 256"):
        ops.int8_mm(a, a)


@pytest.mark.parametrize("m", [1, 7, 16, 33, 200])
def test_columns_that_no_eight_divides(
    m: int, cuda: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The heuristics among this path's tiles."""
    monkeypatch.setenv(PATH, "skinny")
    for n, k in SIZES:
        check("chosen", m, n + n % 2 + 1, k, cuda, torch.bfloat16, torch.float16, torch.bfloat16)


@every_tile
@pytest.mark.parametrize("m", [1, 13, 64])
def test_blocks_take_several_tiles(
    tile: int, m: int, cuda: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More tiles of columns than blocks that are resident, and a rest."""
    monkeypatch.setenv(FORCE, f"skinny:{tile}:1")
    columns = 16 * TILES[tile]["warps_n"]
    sms = torch.cuda.get_device_properties(cuda).multi_processor_count
    n = 3 * 4 * sms * columns // (1 if m == 1 else 4) + 5
    check(tile, m, n, 144, cuda, torch.bfloat16, torch.bfloat16, torch.bfloat16)


@every_tile
@pytest.mark.parametrize("value", [-128, 127])
def test_largest_sums(
    tile: int, value: int, cuda: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """-128 x -128 and -128 x 127 over the longest K that fits, up to what int32 holds."""
    k = reference.MAX_K // 16 * 16
    while not fits(tile, 1, k):
        k -= 4096
    monkeypatch.setenv(FORCE, f"skinny:{tile}:1")
    a = torch.full((1, k), -128, dtype=torch.int8)
    w = torch.full((9, k), value, dtype=torch.int8)
    equal((tile, k), ops.int8_mm(a.to(cuda), w.to(cuda)), reference.int8_mm(a, w))


@every_tile
def test_a_row_is_the_same_in_every_batch(
    tile: int, cuda: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(FORCE, f"skinny:{tile}:1")
    w, w_scale, _ = (t.to(cuda) for t in weights(136, 1040))
    x = rows_of(64, 1040, torch.bfloat16).to(cuda)
    whole = ops.int8_linear(x, w, w_scale, None, None)
    for first, count in [(0, 1), (5, 1), (7, 9), (31, 33), (63, 1)]:
        part = ops.int8_linear(x[first : first + count], w, w_scale, None, None)
        equal((tile, first, count), part, whole[first : first + count].cpu())


@every_tile
@pytest.mark.parametrize("m", [1, 16])
def test_calls_in_a_row(
    tile: int, m: int, cuda: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each reads what the one before wrote: eagerly, and replayed from a graph."""
    monkeypatch.setenv(FORCE, f"skinny:{tile}:1")
    g = torch.Generator().manual_seed(5)
    w = torch.randint(-127, 128, (512, 512), generator=g, dtype=torch.int8)
    w_scale = torch.rand((512, 1), generator=g) * 1e-3
    x = torch.randn((m, 512), generator=g).bfloat16()
    expected = x
    for _ in range(6):
        expected = reference.int8_linear(expected, w, w_scale)
    here = w.to(cuda), w_scale.to(cuda), None, None
    start = x.to(cuda)

    def run() -> Tensor:
        y = start
        for _ in range(6):
            y = ops.int8_linear(y, *here)
        return y

    for _ in range(20):
        equal((tile, m), run(), expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = run()
    for _ in range(100):
        graph.replay()
    equal((tile, m, "graph"), result, expected)


@pytest.mark.parametrize("offset", [1, 2, 4, 8])
@pytest.mark.parametrize("which", ["x", "w"])
def test_unaligned_operands_are_served(offset: int, which: str, cuda: torch.device) -> None:
    """By another path: this one wants rows that start 16-byte aligned."""
    w, w_scale, _ = weights(136, 512)
    x = rows_of(4, 512, torch.bfloat16)
    operands = {"x": x, "w": w}
    source = operands[which]
    flat = torch.empty(source.numel() + offset, dtype=source.dtype, device=cuda)
    moved = flat[offset:].view(source.shape)
    moved.copy_(source)
    there = {name: t.to(cuda) for name, t in operands.items()} | {which: moved}
    got = ops.int8_linear(there["x"], there["w"], w_scale.to(cuda), None, None)
    equal((which, offset), got, reference.int8_linear(x, w, w_scale))

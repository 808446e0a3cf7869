"""The Hopper kernel for few rows and short K bit for bit: tiles, dtypes, tails, special values."""

from __future__ import annotations

import itertools
import re

import pytest
import torch
from cases import DTYPES
from test_hopper import (
    NO_HOPPER,
    Problem,
    equal,
    generator,
    hard_rows,
    positive,
    tie_rows,
    why_no_cuda,
)

import int8_ops  # noqa: F401  (registers the ops)
from int8_ops import _extension, reference

BUILD = _extension.build_info.require()
TILES: list[dict] = BUILD.panel_tiles()
MAX_K: int = TILES[0]["max_k"]
MAX_ROWS: int = TILES[0]["max_rows"]
FORCE = "INT8_OPS_GEMM_CONFIG"
PATH = "INT8_OPS_GEMM_PATH"
ops = torch.ops.int8_ops

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(bool(why_no_cuda()), reason=why_no_cuda() or "-"),
]
on_hopper = pytest.mark.skipif(bool(NO_HOPPER), reason=NO_HOPPER or "-")
every_tile = pytest.mark.parametrize("tile", range(len(TILES)))
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)

# N, K: one column, rests of a block's columns, odd N, every rest of the K-blocks, the longest K.
SIZES = [(1, 16), (24, 48), (131, 144), (136, 512), (257, 496), (72, 272), (520, 400), (63, 256)]
ROWS = (1, 2, 3, 7, 8, 9, 15, 16, 17, 24, 31, 32, 33, 47, 63, 64, 65, 77, 100, 127, 128)


@pytest.fixture
def cuda() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())


@on_hopper
@every_tile
@pytest.mark.parametrize(("n", "k"), SIZES)
def test_every_count_of_rows(
    tile: int, n: int, k: int, cuda: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(FORCE, f"panel:{tile}:1")
    for i, m in enumerate(ROWS):
        bias = (None, *DTYPES)[i % 4]
        Problem(m, n, k, cuda).check(tile, DTYPES[i % 3], bias, DTYPES[(i + k // 16) % 3])


@on_hopper
@every_tile
@every_dtype
@pytest.mark.parametrize("n", [136, 131], ids=["vector", "scalar"])
@pytest.mark.parametrize("before", ["", ":pass"], ids=["inside", "pass"])
def test_every_dtype(
    tile: int,
    dtype: torch.dtype,
    n: int,
    before: str,
    cuda: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(FORCE, f"panel:{tile}:1{before}")
    problem = Problem(45, n, 464, cuda)
    for bias, out_dtype in itertools.product((None, *DTYPES), DTYPES):
        problem.check((tile, before), dtype, bias, out_dtype)


@on_hopper
@every_tile
@pytest.mark.parametrize("m", [129, 255, MAX_ROWS - 1, MAX_ROWS])
def test_rows_up_to_the_most_there_may_be(
    tile: int, m: int, cuda: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(FORCE, f"panel:{tile}:1")
    for i, (n, k) in enumerate(SIZES):
        Problem(m, n, k, cuda).check(tile, DTYPES[i % 3], None, DTYPES[(i + 1) % 3])


@on_hopper
@every_tile
def test_more_blocks_than_run_at_once(
    tile: int, cuda: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(FORCE, f"panel:{tile}:1")
    sms = torch.cuda.get_device_properties(cuda).multi_processor_count
    n = 3 * 2 * sms * TILES[tile]["cols"] + 5
    Problem(5, n, 112, cuda).check(tile, torch.bfloat16, torch.bfloat16, torch.bfloat16)


@on_hopper
@every_tile
@every_dtype
@pytest.mark.parametrize("k", [48, 128, 256, MAX_K])
def test_every_quantized_value(
    tile: int, dtype: torch.dtype, k: int, cuda: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights of one 1 a column show the int8 values: integers, ties, special and random rows."""
    monkeypatch.setenv(FORCE, f"panel:{tile}:1")
    g = generator(k, cuda)
    w = torch.eye(k, dtype=torch.int8, device=cuda)
    ones = torch.ones((k, 1), device=cuda)
    # Row r: integers up to r + 1, every quotient of them.
    limit = torch.arange(1, 257, device=cuda)[:, None]
    ramp = torch.arange(k, device=cuda)[None] + torch.randint(
        256, (256, 1), generator=g, device=cuda
    )
    ramp = ramp.remainder(2 * limit + 1) - limit
    many = [hard_rows(MAX_ROWS, k, dtype, g) for _ in range(8)]
    for x in (ramp.to(dtype), tie_rows(301, k, dtype, g), *many):
        equal(
            (tile, k, dtype),
            ops.int8_linear(x, w, ones, None, torch.float32),
            reference.int8_linear(x, w, ones, None, torch.float32),
        )


@on_hopper
@every_tile
@pytest.mark.parametrize("value", [-128, 127])
def test_largest_sums(
    tile: int, value: int, cuda: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(FORCE, f"panel:{tile}:1")
    a = torch.full((70, MAX_K), -128, dtype=torch.int8, device=cuda)
    w = torch.full((72, MAX_K), value, dtype=torch.int8, device=cuda)
    equal(tile, ops.int8_mm(a, w), reference.int8_mm(a, w))
    scale = torch.full((70, 1), 3e-9, device=cuda), torch.full((72, 1), 0.7, device=cuda)
    for dtype in DTYPES:
        got = ops.int8_scaled_mm(a, w, *scale, None, dtype)
        equal((tile, dtype), got, reference.int8_scaled_mm(a, w, *scale, None, dtype))


@on_hopper
@every_tile
def test_a_sum_of_minus_zero_stays(
    tile: int, cuda: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a bias nothing is added: 0 times a negative scale is -0."""
    monkeypatch.setenv(FORCE, f"panel:{tile}:1")
    a = torch.zeros((9, 64), dtype=torch.int8, device=cuda)
    scale = -positive(9, generator(1, cuda), 1.0), positive(9, generator(2, cuda), 1.0)
    for dtype in DTYPES:
        got = ops.int8_scaled_mm(a, a, *scale, None, dtype)
        assert torch.signbit(got).all()
        equal((tile, dtype), got, reference.int8_scaled_mm(a, a, *scale, None, dtype))


@on_hopper
@every_tile
@every_dtype
def test_a_row_is_the_same_in_every_batch(
    tile: int, dtype: torch.dtype, cuda: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(FORCE, f"panel:{tile}:1")
    problem = Problem(MAX_ROWS, 264, 496, cuda)
    x = hard_rows(MAX_ROWS, 496, dtype, problem.g)
    arguments = problem.w, problem.w_scale, problem.bias(dtype), None
    whole = ops.int8_linear(x, *arguments)
    for first, count in [(0, 1), (5, 1), (7, 9), (31, 33), (63, 1), (100, 128), (300, 200)]:
        part = slice(first, first + count)
        equal((tile, first, count), ops.int8_linear(x[part], *arguments), whole[part])


@on_hopper
@every_tile
@every_dtype
@pytest.mark.parametrize("which", ["w_scale", "bias"])
def test_factors_that_start_anywhere(
    tile: int,
    dtype: torch.dtype,
    which: str,
    cuda: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(FORCE, f"panel:{tile}:1")
    problem = Problem(33, 136, 512, cuda)
    x = hard_rows(33, 512, dtype, problem.g)
    factors = {"w_scale": problem.w_scale, "bias": problem.bias(dtype)}
    expected = reference.int8_linear(x, problem.w, *factors.values(), None)
    flat = torch.empty(136 + 1, dtype=factors[which].dtype, device=cuda)
    moved = flat[1:].view(factors[which].shape)
    moved.copy_(factors[which])
    factors[which] = moved
    equal((tile, which), ops.int8_linear(x, problem.w, *factors.values(), None), expected)


@on_hopper
@every_tile
def test_what_it_does_not_take(
    tile: int, cuda: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(FORCE, f"panel:{tile}:1")
    for m, k, message in (
        (MAX_ROWS + 1, 64, f"it takes M up to {MAX_ROWS}"),
        (16, MAX_K + 16, f"it takes K up to {MAX_K}"),
        (16, 100, "it takes no rows that start unaligned"),
    ):
        a = torch.ones((m, k), dtype=torch.int8, device=cuda)
        expected = f"for M = {m}, N = {m}, K = {k}, but {message}"
        with pytest.raises(RuntimeError, match=re.escape(expected)):
            ops.int8_mm(a, a)


@pytest.mark.skipif(not NO_HOPPER, reason="this device has it")
@every_tile
def test_the_path_wants_its_device(
    tile: int, cuda: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(FORCE, f"panel:{tile}:1")
    a = torch.ones((16, 64), dtype=torch.int8, device=cuda)
    with pytest.raises(RuntimeError, match=r"needs a device of capability 9\.0 and a build for"):
        ops.int8_mm(a, a)


@on_hopper
@every_tile
def test_no_rows_and_no_columns(
    tile: int, cuda: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(FORCE, f"panel:{tile}:1")
    x = torch.randn((3, 64), device=cuda).bfloat16()
    w = torch.ones((24, 64), dtype=torch.int8, device=cuda)
    scale = torch.ones((24, 1), device=cuda)
    assert ops.int8_linear(x[:0], w, scale, None, None).shape == (0, 24)
    assert ops.int8_linear(x, w[:0], scale[:0], None, None).shape == (3, 0)


@on_hopper
@pytest.mark.parametrize("m", [1, 7, 16, 33, 200])
def test_the_heuristics_among_its_tiles(
    m: int, cuda: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(PATH, "panel")
    for n, k in SIZES:
        Problem(m, n, k, cuda).check("chosen", torch.bfloat16, torch.float16, torch.bfloat16)

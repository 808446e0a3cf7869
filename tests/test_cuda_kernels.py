"""The CUDA kernels bit for bit: every tile, split, width and alignment; streams, graphs, threads.

test_backends.py tries the ops as the heuristics run them; here each tile of the path sm80 is
forced. test_skinny.py, test_hopper.py and test_panel.py force those of the other paths.
"""

from __future__ import annotations

import functools
import itertools
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from cases import DTYPES, same_bits
from torch import Tensor

import int8_ops  # noqa: F401  (registers the ops)
from int8_ops import _extension, reference

ROOT = Path(__file__).resolve().parents[1]
TILES: list[dict] = _extension.build_info.require().gemm_tiles()
SPLITS = (1, 2, 3, 8)
FORCE = "INT8_OPS_GEMM_CONFIG"
PATH = "INT8_OPS_GEMM_PATH"
PATHS: list[str] = _extension.build_info.require().gemm_paths()
ops = torch.ops.int8_ops

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        _extension.unavailable_reason("cuda") is not None,
        reason=str(_extension.unavailable_reason("cuda")),
    ),
]
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@pytest.fixture
def cuda() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())


def equal(what: object, got: Tensor, expected: Tensor) -> None:
    assert same_bits(got, expected), (
        f"{what}: got {tuple(got.shape)} {got.dtype}\n{got}\n"
        f"expected {tuple(expected.shape)} {expected.dtype}\n{expected}"
    )


# ---- GEMM: every tile and split ------------------------------------------------------------------

# M, N, K. Shapes of a model's layers; rest rows, columns and K-blocks of every tile; few rows.
ALIGNED = {
    "regular": [(128, 256, 512), (256, 512, 1024), (64, 192, 4096)],
    "tails": [(1, 1, 16), (65, 129, 144), (129, 257, 272), (33, 40, 2064), (250, 90, 1040)],
    "small_m": [(1, 512, 4096), (2, 8, 8192), (15, 33, 528), (16, 96, 1040), (17, 64, 512)],
}
UNALIGNED = {
    "tails": [(1, 1, 1), (2, 3, 1), (5, 1, 3), (7, 33, 31), (65, 129, 127), (130, 65, 1041)],
    "small_m": [(1, 256, 4095), (9, 5, 2049), (16, 31, 1001), (17, 72, 8191)],
}


@functools.cache
def integers(m: int, n: int, k: int, values: str = "random") -> tuple[Tensor, Tensor, Tensor]:
    """a, w, and their exact product."""
    if values == "random":
        g = torch.Generator().manual_seed(m * 31 + n * 17 + k)
        a = torch.randint(-128, 128, (m, k), generator=g, dtype=torch.int8)
        w = torch.randint(-128, 128, (n, k), generator=g, dtype=torch.int8)
    else:
        a = torch.full((m, k), -128, dtype=torch.int8)
        w = torch.full((n, k), -128 if values == "high" else 127, dtype=torch.int8)
    return a, w, reference.int8_mm(a, w)


@functools.cache
def factors(m: int, n: int) -> tuple[Tensor, Tensor, Tensor]:
    """a_scale, w_scale, float32 bias; one row and one column are NaN."""
    g = torch.Generator().manual_seed(m + n)
    a_scale = torch.rand((m, 1), generator=g) * 0.1 + 1e-3
    w_scale = torch.rand((n, 1), generator=g) * 0.1 + 1e-3
    a_scale[m // 2] = torch.nan if m > 1 else 0.5
    w_scale[n // 2] = torch.nan if n > 1 else 0.25
    return a_scale, w_scale, torch.randn(n, generator=g)


def check_gemm(
    where: object,
    m: int,
    n: int,
    k: int,
    cuda: torch.device,
    epilogues: list[tuple[torch.dtype, torch.dtype | None]],
    values: str = "random",
) -> None:
    """int8_mm, and int8_scaled_mm for each (out dtype, bias dtype)."""
    a, w, product = integers(m, n, k, values)
    here = a.to(cuda), w.to(cuda)
    equal((where, m, n, k), ops.int8_mm(*here), product)
    a_scale, w_scale, bias32 = factors(m, n)
    for out_dtype, bias_dtype in epilogues:
        bias = None if bias_dtype is None else bias32.to(bias_dtype)
        got = ops.int8_scaled_mm(
            *here,
            a_scale.to(cuda),
            w_scale.to(cuda),
            None if bias is None else bias.to(cuda),
            out_dtype,
        )
        expected = reference.epilogue(product, a_scale, w_scale, bias, out_dtype)
        equal((where, m, n, k, out_dtype, bias_dtype), got, expected)


ALL_EPILOGUES = list(itertools.product(DTYPES, (None, *DTYPES)))
SOME_EPILOGUES = [
    (torch.float16, torch.float16),
    (torch.bfloat16, None),
    (torch.float32, torch.bfloat16),
]
every_tile = pytest.mark.parametrize("tile", range(len(TILES)))
every_split = pytest.mark.parametrize("splits", SPLITS)


def takes_unaligned(tile: int) -> bool:
    return TILES[tile]["serves_unaligned"]


def fits(tile: int) -> bool:
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return TILES[tile]["shared_bytes"] <= properties.shared_memory_per_block_optin


def skip_unless_it_fits(tile: int) -> None:
    if not fits(tile):
        pytest.skip(f"tile {tile} needs more shared memory than a block has on this device")


@every_tile
@every_split
@pytest.mark.parametrize("name", ALIGNED)
def test_gemm_of_aligned_rows(
    tile: int, splits: int, name: str, cuda: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    skip_unless_it_fits(tile)
    monkeypatch.setenv(FORCE, f"sm80:{tile}:{splits}")
    for i, shape in enumerate(ALIGNED[name]):
        check_gemm(f"tile {tile} split {splits}", *shape, cuda, [SOME_EPILOGUES[i % 3]])


@every_tile
@every_split
@pytest.mark.parametrize("name", UNALIGNED)
def test_gemm_of_unaligned_rows(
    tile: int, splits: int, name: str, cuda: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    skip_unless_it_fits(tile)
    monkeypatch.setenv(FORCE, f"sm80:{tile}:{splits}")
    if not takes_unaligned(tile):
        a, w, _ = integers(*UNALIGNED[name][-1])
        with pytest.raises(
            RuntimeError, match=r"K = \d+, but it takes no rows that start unaligned"
        ):
            ops.int8_mm(a.to(cuda), w.to(cuda))
        return
    for i, shape in enumerate(UNALIGNED[name]):
        check_gemm(f"tile {tile} split {splits}", *shape, cuda, [SOME_EPILOGUES[i % 3]])


@every_tile
@pytest.mark.parametrize("splits", [1, 8])
@pytest.mark.parametrize("n", [136, 131], ids=["vector", "scalar"])
def test_every_epilogue(
    tile: int, splits: int, n: int, cuda: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    skip_unless_it_fits(tile)
    monkeypatch.setenv(FORCE, f"sm80:{tile}:{splits}")
    check_gemm(f"tile {tile} split {splits}", 70, n, 4096, cuda, ALL_EPILOGUES)


@every_tile
@every_split
@pytest.mark.parametrize("values", ["high", "low"])
def test_largest_sums(
    tile: int, splits: int, values: str, cuda: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """-128 x -128 and -128 x 127 over the longest K: the last sum that int32 holds."""
    skip_unless_it_fits(tile)
    monkeypatch.setenv(FORCE, f"sm80:{tile}:{splits}")
    lengths = [reference.MAX_K // 16 * 16]
    if takes_unaligned(tile):
        lengths.append(reference.MAX_K)
    for k in lengths:
        check_gemm(f"tile {tile} split {splits}", 3, 9, k, cuda, SOME_EPILOGUES[:1], values)


@every_tile
@pytest.mark.parametrize("k", [144, 272])
def test_blocks_take_several_tiles(
    tile: int, k: int, cuda: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More output tiles than blocks that are resident, with rests on both edges."""
    skip_unless_it_fits(tile)
    monkeypatch.setenv(FORCE, f"sm80:{tile}:{1 if k == 144 else 2}")
    # At most three blocks a multiprocessor: more than two tiles each, where the cap allows.
    side = int((7 * torch.cuda.get_device_properties(cuda).multi_processor_count) ** 0.5) + 1
    m = min(side * TILES[tile]["block_m"] - 5, 2043)
    n = min(side * TILES[tile]["block_n"] - 8, 5368)
    check_gemm(f"tile {tile}", m, n, k, cuda, SOME_EPILOGUES[:1])


def test_more_splits_than_k_blocks(cuda: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    for tile in filter(fits, range(len(TILES))):
        monkeypatch.setenv(FORCE, f"sm80:{tile}:64")
        check_gemm(f"tile {tile} split 64", 20, 40, 1040, cuda, SOME_EPILOGUES[:1])


def test_forced_plan_is_the_one_that_runs() -> None:
    plans = [(tile, splits) for tile in filter(fits, range(len(TILES))) for splits in (1, 2)]
    code = f"""
import os, torch, int8_ops
a = torch.ones((16, 4096), dtype=torch.int8, device="cuda")
for tile, splits in {plans}:
    os.environ[{FORCE!r}] = f"sm80:{{tile}}:{{splits}}"
    torch.ops.int8_ops.int8_mm(a, a)
torch.cuda.synchronize()
"""
    run = run_python(["-c", code], INT8_OPS_PRINT_CONFIG="1")
    lines = re.findall(r"^int8_ops: gemm m 16 n 16 k 4096: (.+)$", run.stderr, re.M)
    assert len(lines) == len(plans), run.stderr
    for (index, splits), line in zip(plans, lines, strict=True):
        tile = TILES[index]
        assert line.startswith(f"sm80 {tile['block_m']}x{tile['block_n']}x{tile['block_k']} ")
        assert line.endswith(f"stages {tile['stages']} split {splits}")


def run_python(arguments: list[str], **env: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    run = subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, "PYTHONPATH": path, **env},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    return run


def has_hopper() -> bool:
    """Whether this device and this build have the paths for Hopper."""
    archs = set(_extension.build_info.require().info()["cuda_archs"].split(";"))
    return bool({"9.0a", "9.0a+PTX"} & archs) and torch.cuda.get_device_capability() == (9, 0)


def serving_tile(path: str, m: int, n: int, k: int, x_bytes: int) -> int:
    """The cheapest of the path's tiles that take rows of `x_bytes` as they are, on this device."""
    device = torch.cuda.get_device_properties(torch.cuda.current_device())
    plans = _extension.build_info.require().rank_gemm_plans(
        m,
        n,
        k,
        2,
        device.multi_processor_count,
        device.shared_memory_per_block_optin,
        sm90=has_hopper(),
        x_bytes=x_bytes,
    )
    # The path sm80 has a pass before each of its tiles.
    return next(p["tile"] for p in plans if p["path"] == path and p["pass"] == (path == "sm80"))


@pytest.mark.parametrize("path", PATHS)
def test_a_path_by_its_name(path: str) -> None:
    """The heuristics choose within it; a pass is printed, and forced where a plan asks for it."""
    if path in ("resident", "stream", "stationary", "panel") and not has_hopper():
        pytest.skip("needs capability 9.0 and a build for 9.0a")
    tile = serving_tile(path, 16, 16, 512, x_bytes=2)
    code = f"""
import os, torch, int8_ops
a = torch.ones((16, 512), dtype=torch.int8, device="cuda")
scale = torch.ones((16, 1), device="cuda")
ops = torch.ops.int8_ops
ops.int8_mm(a, a)
ops.int8_linear(a.half(), a, scale, None, None)
os.environ[{FORCE!r}] = "{path}:{tile}:1"
ops.int8_linear(a.half(), a, scale, None, None)
os.environ[{FORCE!r}] = "{path}:{tile}:1:pass"
ops.int8_linear(a.half(), a, scale, None, None)
ops.int8_mm(a, a)
torch.cuda.synchronize()
"""
    run = run_python(["-c", code], INT8_OPS_PRINT_CONFIG="1", **{PATH: path})
    lines = re.findall(r"^int8_ops: gemm m 16 n 16 k 512: (.+)$", run.stderr, re.M)
    assert len(lines) == 5, run.stderr
    assert all(line.startswith(f"{path} ") for line in lines), lines
    after = [line.endswith(" after quantize") for line in lines]
    assert not after[0]
    assert after[2:] == [path == "sm80", True, False], lines


BAD_PLANS = {
    # What it says after the variable's name.
    "3": "form",
    "x": "form",
    ":": "form",
    "3:1": "form",
    "sm80": "form",
    "sm80:0": "form",
    "sm80:0:0": "form",
    "sm80:0:-2": "form",
    "sm80:1:x": "form",
    "sm80:1:1x": "form",
    "sm80:1:1:": "form",
    "sm80:1:1:passes": "form",
    f"sm80:{len(TILES)}:1": "tile",
    "sm80:-1:1": "tile",
    "sm90:0:1": "path",
    ":0:1": "path",
    "SM80:0:1": "path",
}


@pytest.mark.parametrize(("text", "wrong"), BAD_PLANS.items())
def test_bad_forced_plan(
    text: str, wrong: str, cuda: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(FORCE, text)
    a = torch.ones((16, 64), dtype=torch.int8, device=cuda)
    known = ", ".join(PATHS)
    expected = {
        "form": f'must be "path:tile:splits" or "path:tile:splits:pass", got "{text}"',
        "tile": f'must name a tile of 0..{len(TILES) - 1}, got "{text}"',
        "path": f'names the path "{text.split(":")[0]}"; known are {known}',
    }[wrong]
    with pytest.raises(RuntimeError, match=re.escape(f"int8_ops: {FORCE} {expected}")):
        ops.int8_mm(a, a)


def test_bad_path(cuda: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PATH, "sm90")
    a = torch.ones((16, 64), dtype=torch.int8, device=cuda)
    expected = f'int8_ops: {PATH} names the path "sm90"; known are {", ".join(PATHS)}'
    with pytest.raises(RuntimeError, match=re.escape(expected)):
        ops.int8_mm(a, a)


def test_a_path_that_takes_no_such_problem(
    cuda: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(PATH, "skinny")
    a = torch.ones((257, 64), dtype=torch.int8, device=cuda)
    expected = f"{PATH}=skinny takes no problem of M = 257, N = 257, K = 64: it takes M up to 256"
    with pytest.raises(RuntimeError, match=re.escape(expected)):
        ops.int8_mm(a, a)
    monkeypatch.setenv(PATH, "")
    equal("any path", ops.int8_mm(a, a), reference.int8_mm(a.cpu(), a.cpu()))


def test_heuristics_choose_without_a_forced_plan(
    cuda: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    for forced in (None, ""):
        if forced is None:
            monkeypatch.delenv(FORCE, raising=False)
        else:
            monkeypatch.setenv(FORCE, forced)
        for table in (ALIGNED, UNALIGNED):
            for shape in itertools.chain(*table.values()):
                check_gemm("heuristics", *shape, cuda, SOME_EPILOGUES)


# ---- base pointers -------------------------------------------------------------------------------


def offset_by(t: Tensor, elements: int, device: torch.device) -> Tensor:
    """A contiguous copy that starts `elements` into an allocation, which is 256-byte aligned."""
    flat = torch.empty(t.numel() + elements, dtype=t.dtype, device=device)
    view = flat[elements:].view(t.shape)
    view.copy_(t)
    assert view.data_ptr() % 256 == elements * t.element_size() % 256
    return view


@pytest.mark.parametrize("a_offset", [0, 1, 2, 4, 8, 15, 16])
@pytest.mark.parametrize("w_offset", [0, 1, 3, 8, 16])
def test_gemm_of_offset_operands(a_offset: int, w_offset: int, cuda: torch.device) -> None:
    for m, n, k in ((33, 72, 256), (1, 64, 4096)):
        a, w, product = integers(m, n, k)
        got = ops.int8_mm(offset_by(a, a_offset, cuda), offset_by(w, w_offset, cuda))
        equal((m, n, k), got, product)


@pytest.mark.parametrize("offset", [1, 2, 3, 4])
@pytest.mark.parametrize("splits", [1, 2])
@every_dtype
def test_offset_scales_and_bias(
    offset: int,
    splits: int,
    dtype: torch.dtype,
    cuda: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(FORCE, f"sm80:3:{splits}")
    a, w, product = integers(65, 136, 512)
    a_scale, w_scale, bias = factors(65, 136)
    bias = bias.to(dtype)
    expected = reference.epilogue(product, a_scale, w_scale, bias, dtype)
    # Each alone: one unaligned pointer must be enough to leave the vector path.
    for which in itertools.product((0, offset), repeat=3):
        got = ops.int8_scaled_mm(
            a.to(cuda),
            w.to(cuda),
            offset_by(a_scale, which[0], cuda),
            offset_by(w_scale, which[1], cuda),
            offset_by(bias, which[2], cuda),
            dtype,
        )
        equal(which, got, expected)


# ---- quantize ------------------------------------------------------------------------------------

# Both sides of every width at which rows.cu changes its kernel, and widths nothing divides.
WIDTHS = (8, 16, 56, 64, 72, 120, 128, 136, 256, 264, 512, 520, 1024, 1032, 2048, 2056, 4096, 4104)
WIDTHS += (8192, 8200, 16384, 16392)
ODD_WIDTHS = (1, 2, 3, 7, 9, 31, 65, 255, 257, 1041, 4099, 16385)


def special_rows(cols: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Ordinary rows among the ends of every range."""
    g = torch.Generator().manual_seed(cols + seed)
    info = torch.finfo(dtype)
    x = torch.randn((41, cols), generator=g).to(dtype)
    last = cols - 1
    x[1] = 0.0
    x[2] = -0.0
    x[3, last] = torch.nan
    x[4, 0] = torch.inf
    x[5, cols // 2] = -torch.inf
    x[6, 0], x[6, last] = torch.nan, torch.inf
    x[7] = info.max
    x[8] = -info.max
    x[9] = info.tiny
    x[10] = info.smallest_normal * info.eps
    x[11] = 0.0
    x[11, last] = info.tiny
    # Halves with the largest at 127: x / scale lies on ties exactly.
    ties = torch.randint(-253, 254, (9, cols), generator=g) / 2
    ties[:, last] = 127.0
    x[12:21] = ties.to(dtype)
    # The same, scaled: near ties, where x * (1 / scale) may round elsewhere than x / scale.
    x[21:30] = (ties * torch.rand((9, 1), generator=g)).to(dtype)
    x[30:33] = (x[30:33].float() * 1e-30).to(dtype)
    x[33:36] = (x[33:36].float() * 1e30).clamp(-info.max, info.max).to(dtype)
    return x


def check_rows(x: Tensor, here: Tensor) -> None:
    expected = reference.quantize_per_token(x)
    got = ops.quantize_per_token(here)
    where = (tuple(x.shape), x.dtype)
    equal(("scale", *where), got[1], expected[1])
    equal(("q", *where), got[0], expected[0])


@every_dtype
@pytest.mark.parametrize("cols", [*WIDTHS, *ODD_WIDTHS])
def test_quantize_rows(cols: int, dtype: torch.dtype, cuda: torch.device) -> None:
    x = special_rows(cols, dtype)
    check_rows(x, x.to(cuda))
    for rows in (1, 2, 40):
        check_rows(x[-rows:], x[-rows:].to(cuda))
    expected = reference.quantize_per_channel(x, 0)
    for got, want in zip(ops.quantize_per_channel(x.to(cuda), 0), expected, strict=True):
        equal(("per channel", cols, dtype), got, want)


@pytest.mark.parametrize(
    ("dtype", "exponent"),
    [
        *((torch.float16, exponent) for exponent in (-20, -9, 0, 5)),
        # The last usable amax, amax that is scaled up before it is divided, the largest.
        *((torch.bfloat16, exponent) for exponent in (-118, -61, -59, 0, 5, 128)),
    ],
    ids=str,
)
def test_every_quotient_of_16_bit_rows(
    dtype: torch.dtype, exponent: int, cuda: torch.device
) -> None:
    """Every significand of amax, and under it every one of x, down to where all round to 0.

    The kernels take one product a value where the reference divides: see row_math.cuh.
    """
    ones = 1 << (11 if dtype == torch.float16 else 8)
    significands = torch.arange(ones // 2, ones, device=cuda, dtype=torch.float32)
    scales = 2.0 ** torch.arange(0, -9, -1, device=cuda, dtype=torch.float32)
    x = (significands[None] * scales[:, None]).flatten().expand(len(significands), -1)
    x = torch.where(x <= significands[:, None], x, significands[:, None]) * 2.0 ** (
        exponent - ones.bit_length() + 1
    )
    # Signs in turn, so that both sides of every tie are met.
    signs = 1 - 2 * (torch.arange(x.shape[1], device=cuda) % 2)
    for sign in (1, -1):
        rows = (x * signs * sign).to(dtype)
        q, scale = ops.quantize_per_token(rows)
        expected_q, expected_scale = reference.quantize_per_token(rows)
        assert torch.equal(scale, expected_scale)
        assert torch.equal(q, expected_q), (q != expected_q).nonzero()[:4].tolist()


@every_dtype
@pytest.mark.parametrize("cols", [64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384])
def test_blocks_take_several_rows(cols: int, dtype: torch.dtype, cuda: torch.device) -> None:
    """Rows enough that the resident blocks take at least two each, some one more."""
    # 2,048 threads of a multiprocessor hold fewer than 64 K values, whatever the kernel.
    multiprocessors = torch.cuda.get_device_properties(cuda).multi_processor_count
    rows = multiprocessors * 2 * 65_536 // cols + 37
    x = torch.randn((rows, cols)).to(dtype)
    special = special_rows(cols, dtype)
    for first in range(0, rows - len(special), max(rows // 13, len(special))):
        x[first : first + len(special)] = special
    check_rows(x, x.to(cuda))


def test_fifty_thousand_short_rows(cuda: torch.device) -> None:
    x = torch.randn(50_000, 64).bfloat16()
    x[::1001, 5] = torch.nan
    x[7::997] = 0.0
    check_rows(x, x.to(cuda))


@every_dtype
@pytest.mark.parametrize("offset", [1, 2, 3, 4, 8])
def test_quantize_offset_rows(offset: int, dtype: torch.dtype, cuda: torch.device) -> None:
    for cols in (8, 64, 1024, 4096):
        x = special_rows(cols, dtype)
        check_rows(x, offset_by(x, offset, cuda))
        expected = reference.quantize_per_channel(x, 1)
        got = ops.quantize_per_channel(offset_by(x, offset, cuda), 1)
        equal(("q", cols), got[0], expected[0])
        equal(("scale", cols), got[1], expected[1])


@every_dtype
@pytest.mark.parametrize("rows", [1, 63, 64, 65, 300])
@pytest.mark.parametrize("cols", [1, 7, 8, 31, 32, 33, 40, 41, 256])
def test_quantize_columns(rows: int, cols: int, dtype: torch.dtype, cuda: torch.device) -> None:
    special = special_rows(rows, dtype, seed=cols).t()  # the ends of every range in each column
    x = special.repeat(1, -(-cols // special.shape[1]))[:, :cols].contiguous()
    expected = reference.quantize_per_channel(x, 1)
    got = ops.quantize_per_channel(x.to(cuda), 1)
    equal(("scale", rows, cols), got[1], expected[1])
    equal(("q", rows, cols), got[0], expected[0])


# ---- dequantize ----------------------------------------------------------------------------------


@every_dtype
@pytest.mark.parametrize("per_column", [False, True], ids=["per row", "per column"])
@pytest.mark.parametrize("cols", [1, 7, 8, 9, 64, 1000, 1001, 4096])
def test_dequantize(cols: int, per_column: bool, dtype: torch.dtype, cuda: torch.device) -> None:
    g = torch.Generator().manual_seed(cols)
    q = torch.randint(-128, 128, (67, cols), generator=g, dtype=torch.int8)
    scale = torch.rand((1, cols) if per_column else (67, 1), generator=g) * 3
    scale.view(-1)[0] = torch.nan
    scale.view(-1)[-1] = torch.finfo(torch.float32).max
    expected = reference.dequantize(q, scale, dtype)
    equal(cols, ops.dequantize(q.to(cuda), scale.to(cuda), dtype), expected)
    for offset in (1, 8):
        got = ops.dequantize(offset_by(q, offset, cuda), offset_by(scale, offset, cuda), dtype)
        equal((cols, offset), got, expected)


# ---- a row's bits do not depend on its company ---------------------------------------------------


@every_dtype
@pytest.mark.parametrize(("k", "n"), [(512, 1024), (4096, 96), (1041, 65)])
def test_batch_invariance(k: int, n: int, dtype: torch.dtype, cuda: torch.device) -> None:
    g = torch.Generator().manual_seed(k)
    x = torch.randn((700, k), generator=g).to(dtype).to(cuda)
    w = torch.randint(-127, 128, (n, k), generator=g, dtype=torch.int8).to(cuda)
    w_scale = (torch.rand((n, 1), generator=g) * 0.01).to(cuda)
    bias = torch.randn(n, generator=g).to(dtype).to(cuda)
    whole = ops.int8_linear(x, w, w_scale, bias)
    for rows in (1, 2, 16, 17, 32, 33, 64, 128, 256, 699):
        for first in (0, 700 - rows):
            part = ops.int8_linear(x[first : first + rows], w, w_scale, bias)
            assert torch.equal(part, whole[first : first + rows]), (rows, first)


# ---- streams, graphs, threads --------------------------------------------------------------------


class Chain:
    """Calls that use each other's results, on every kernel: a write that comes late shows."""

    def __init__(self, m: int, k: int, n: int, device: torch.device, seed: int = 0) -> None:
        g = torch.Generator().manual_seed(seed)
        x = torch.randn((m, k), generator=g).half()
        w = torch.randint(-127, 128, (n, k), generator=g, dtype=torch.int8)
        back = torch.randint(-127, 128, (k, n), generator=g, dtype=torch.int8)
        w_scale = torch.rand((n, 1), generator=g) * 1e-3
        back_scale = torch.rand((k, 1), generator=g) * 1e-3
        tensors = (x, w, w_scale, back, back_scale)
        self.expected = self.compute(reference, *tensors)
        self.tensors = [t.to(device) for t in tensors]

    @staticmethod
    def compute(
        to: object, x: Tensor, w: Tensor, w_scale: Tensor, back: Tensor, back_scale: Tensor
    ) -> Tensor:
        for _ in range(3):
            y = to.int8_linear(x, w, w_scale, None)
            q, scale = to.quantize_per_token(y)
            y = to.dequantize(q, scale, torch.float16)
            x = to.int8_linear(y, back, back_scale, None)
        return x

    def run(self) -> Tensor:
        return self.compute(ops, *self.tensors)

    def check(self, *results: Tensor) -> None:
        for result in results:
            equal("chain", result, self.expected)


# Prefill; decode with splits; K that leaves rows unaligned.
CHAINS = [(300, 512, 1024), (1, 4096, 512), (4, 1001, 136)]


def test_chain_is_finite() -> None:
    for shape in CHAINS:
        expected = Chain(*shape, torch.device("cpu")).expected
        assert expected.isfinite().all()
        assert (expected != 0).float().mean() > 0.9


@pytest.mark.parametrize("shape", CHAINS, ids=str)
def test_calls_in_a_row(shape: tuple[int, int, int], cuda: torch.device) -> None:
    """Back to back, with scratch memory that the allocator hands on from call to call."""
    chain = Chain(*shape, cuda)
    chain.check(*[chain.run() for _ in range(40)])


@pytest.mark.parametrize("shape", CHAINS, ids=str)
def test_graph_replays(shape: tuple[int, int, int], cuda: torch.device) -> None:
    chain = Chain(*shape, cuda)
    other = Chain(*shape, cuda, seed=1)
    chain.run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = chain.run()
    expected = chain.expected.to(cuda)
    for _ in range(200):
        result.fill_(torch.nan)
        graph.replay()
        assert torch.equal(result, expected)
    # Replays without a pause, and with another input.
    for _ in range(200):
        graph.replay()
    chain.check(result)
    for to, source in zip(chain.tensors, other.tensors, strict=True):
        to.copy_(source)
    graph.replay()
    other.check(result)


def test_two_streams_at_once(cuda: torch.device) -> None:
    chains = [Chain(*shape, cuda, seed) for seed, shape in enumerate(CHAINS)]
    streams = [torch.cuda.Stream(cuda) for _ in chains]
    torch.cuda.synchronize()
    results: list[list[Tensor]] = [[] for _ in chains]
    for _ in range(30):
        for chain, stream, kept in zip(chains, streams, results, strict=True):
            with torch.cuda.stream(stream):
                kept.append(chain.run())
    torch.cuda.synchronize()
    for chain, kept in zip(chains, results, strict=True):
        chain.check(*kept)


def test_runs_on_the_current_stream(cuda: torch.device) -> None:
    """Behind work that is slow to finish, on a side stream: the default stream must not be used."""
    a, w, product = integers(128, 256, 512)
    source = a.to(cuda)
    w = w.to(cuda)
    late = torch.zeros_like(source)
    ops.int8_mm(late, w)
    stream = torch.cuda.Stream(cuda)
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)
        late.copy_(source)
        got = ops.int8_mm(late, w)
    stream.synchronize()
    equal("side stream", got, product)


def test_threads_at_once(cuda: torch.device) -> None:
    chains = [Chain(*shape, cuda, seed) for seed, shape in enumerate(CHAINS * 2)]
    torch.cuda.synchronize()
    results: list[list[Tensor]] = [[] for _ in chains]

    def work(index: int) -> None:
        with torch.cuda.device(cuda), torch.cuda.stream(torch.cuda.Stream(cuda)):
            results[index] += [chains[index].run() for _ in range(20)]
            torch.cuda.current_stream().synchronize()

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(chains))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for chain, kept in zip(chains, results, strict=True):
        assert len(kept) == 20
        chain.check(*kept)


@pytest.mark.parametrize("shape", CHAINS, ids=str)
def test_no_call_waits_for_the_device(shape: tuple[int, int, int], cuda: torch.device) -> None:
    chain = Chain(*shape, cuda)
    # Warm: loading a module, and memory that is new to the allocator, may wait.
    w_float = torch.randn((64, 64), device=cuda)
    for _ in range(2):
        chain.run()
        ops.quantize_per_channel(w_float, 0)
        ops.quantize_per_channel(w_float, 1)
        torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.cuda._sleep(2_000_000_000)  # about a second
        result = chain.run()
        ops.quantize_per_channel(w_float, 0)
        ops.quantize_per_channel(w_float, 1)
        assert not torch.cuda.current_stream().query(), "a call waited for the device"
    finally:
        torch.cuda.set_sync_debug_mode("default")
    chain.check(result)


def test_on_a_device_that_is_not_current() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    with torch.cuda.device(0):
        for shape in CHAINS:
            chain = Chain(*shape, torch.device("cuda", 1))
            result = chain.run()
            assert result.device.index == 1
            chain.check(result)
            assert torch.cuda.current_device() == 0


# ---- other builds of the same kernels ------------------------------------------------------------


def test_every_kernel_in_a_process_of_its_own() -> None:
    run = run_python([str(ROOT / "scripts" / "sanitizer_cases.py")])
    assert re.search(r"^\d+ cases, all equal to the reference$", run.stdout, re.M), run.stdout


@pytest.fixture
def ptx_only() -> dict[str, str]:
    """The environment of a process that runs what a device newer than the machine code would run.

    Torch's own kernels have no such PTX: nothing but copies may stand beside ours. On a device of
    capability 9.0 the PTX has nothing for the paths resident and stream, which it would be asked
    for there: the path is named.
    """
    archs = _extension.build_info.require().info()["cuda_archs"]
    if "+PTX" not in archs:
        pytest.skip(f"built for {archs}: no PTX")
    return {"CUDA_FORCE_PTX_JIT": "1", PATH: "sm80"}


def test_ptx_gives_the_same_bits(ptx_only: dict[str, str]) -> None:
    run = run_python([str(ROOT / "scripts" / "sanitizer_cases.py")], **ptx_only)
    assert re.search(r"^\d+ cases, all equal to the reference$", run.stdout, re.M), run.stdout


def test_ptx_calls_in_a_row(ptx_only: dict[str, str]) -> None:
    """A kernel compiled for 8.0 cannot wait for the one before it: the launch has to."""
    code = f"""
import sys
sys.path.insert(0, {str(ROOT / "tests")!r})
import torch
from test_cuda_kernels import CHAINS, Chain
for shape in CHAINS:
    chain = Chain(*shape, torch.device("cuda", 0))
    chain.check(*[chain.run() for _ in range(100)])
print("equal")
"""
    assert "equal" in run_python(["-c", code], **ptx_only).stdout

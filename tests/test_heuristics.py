"""The CUDA GEMM's heuristics and the list of compiled architectures, asked on the host: no GPU."""

from __future__ import annotations

import functools
import itertools
import re
from pathlib import Path

import pytest

from int8_ops import _extension
from int8_ops._bench.shapes import LLAMA

ROOT = Path(__file__).resolve().parents[1]
BUILD = _extension.build_info.require()
TILES: list[dict] = BUILD.gemm_tiles()

# Multiprocessors, and the shared memory that a block may opt into.
H200 = (132, 232_448)
DEVICES = {"H200": H200, "A100": (108, 166_912), "L4": (58, 101_376), "RTX 4090": (128, 101_376)}

# The benchmark's suite llama, M, K, N, with the tile and the split an H200 gets. A change of the
# cost model that changes one of these must be a measured one.
GOLDEN = {
    (32768, 128, 1024): "128x128x128 warps 2x2x1 stages 3 split 1",
    (32768, 256, 1024): "128x128x128 warps 2x2x1 stages 3 split 1",
    (32768, 512, 1024): "128x128x128 warps 2x2x1 stages 3 split 1",
    (32768, 1024, 1024): "128x256x128 warps 2x4x1 stages 3 split 1",
    (32768, 256, 4096): "128x128x128 warps 2x2x1 stages 3 split 1",
    (32768, 512, 4096): "128x128x128 warps 2x2x1 stages 3 split 1",
    (32768, 1024, 4096): "128x256x128 warps 2x4x1 stages 3 split 1",
    (1, 512, 1024): "16x32x512 warps 1x1x4 stages 4 split 1",
    (128, 512, 4096): "64x64x128 warps 2x2x1 stages 4 split 1",
    (1, 4096, 14336): "16x64x256 warps 1x2x2 stages 4 split 1",
    (256, 4096, 4096): "64x128x256 warps 2x2x2 stages 3 split 1",
    (8192, 4096, 14336): "128x256x128 warps 2x4x1 stages 3 split 1",
    (8192, 14336, 4096): "128x256x128 warps 2x4x1 stages 3 split 1",
}

SWEEP_M = (1, 2, 7, 15, 16, 17, 31, 32, 33, 64, 65, 128, 129, 256, 1000, 4096, 32768)
SWEEP_NK = (16, 64, 144, 512, 1040, 2048, 4096, 16384)
UNALIGNED_NK = (1, 17, 100, 1041, 4095, 16383)


def rank(
    m: int, n: int, k: int, device: tuple[int, int], aligned: bool = True, out_bytes: int = 2
) -> list[dict]:
    return BUILD.rank_gemm_plans(m, n, k, out_bytes, *device, aligned)


@functools.cache
def sweep(device: str, aligned: bool) -> list[tuple[tuple[int, int, int], list[dict]]]:
    sizes = SWEEP_NK if aligned else (*SWEEP_NK, *UNALIGNED_NK)
    problems = itertools.product(SWEEP_M, SWEEP_NK, sizes)
    return [((m, n, k), rank(m, n, k, DEVICES[device], aligned)) for m, n, k in problems]


on_devices = pytest.mark.parametrize("device", DEVICES)
aligned_or_not = pytest.mark.parametrize("aligned", [True, False], ids=["aligned", "unaligned"])


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


@pytest.mark.parametrize(("shape", "text"), GOLDEN.items(), ids=str)
def test_golden_choice(shape: tuple[int, int, int], text: str) -> None:
    m, k, n = shape
    assert rank(m, n, k, H200)[0]["text"] == text


def test_golden_shapes_are_the_benchmarks() -> None:
    assert list(LLAMA) == list(GOLDEN)


def test_every_tile_has_one_instantiation() -> None:
    folder = ROOT / "csrc" / "cuda" / "sm80" / "instantiations"
    found = {}
    for path in sorted(folder.iterdir()):
        found[path.name] = [
            int(index)
            for index in re.findall(r"template void launch_gemm<(\d+)>", path.read_text())
        ]
    assert found == {f"gemm_tile_{i}.cu": [i] for i in range(len(TILES))}
    dispatch = (ROOT / "csrc" / "cuda" / "sm80" / "gemm.cu").read_text()
    declared = [int(i) for i in re.findall(r"^INT8_OPS_EXTERN_TILE\((\d+)\);", dispatch, re.M)]
    assert declared == list(range(len(TILES)))


@pytest.mark.parametrize("tile", TILES, ids=lambda t: f"{t['block_m']}x{t['block_n']}")
def test_tile_geometry(tile: dict) -> None:
    assert tile["block_m"] % 16 == 0
    assert tile["block_n"] % 32 == 0
    assert tile["block_k"] % 128 == 0
    assert tile["threads"] % 32 == 0
    assert 32 <= tile["threads"] <= 1024
    stages = tile["stages"] * (tile["block_m"] + tile["block_n"]) * tile["block_k"]
    assert stages < tile["shared_bytes"] <= H200[1]


def test_tiles_differ() -> None:
    assert len({tuple(tile.items()) for tile in TILES}) == len(TILES)


@on_devices
@aligned_or_not
def test_every_plan_can_run(device: str, aligned: bool) -> None:
    for problem, plans in sweep(device, aligned):
        assert plans, problem
        for plan in plans:
            where = f"{problem} on {device}: {plan}"
            assert 0 <= plan["tile"] < len(TILES), where
            tile = TILES[plan["tile"]]
            assert tile["shared_bytes"] <= DEVICES[device][1], where
            assert aligned or tile["serves_unaligned"], where


@on_devices
@aligned_or_not
def test_no_split_is_empty(device: str, aligned: bool) -> None:
    seen = set()
    for (m, n, k), plans in sweep(device, aligned):
        for plan in plans:
            k_blocks = ceil_div(k, TILES[plan["tile"]]["block_k"])
            each = ceil_div(k_blocks, plan["splits"])
            assert plan["splits"] >= 1
            assert (plan["splits"] - 1) * each < k_blocks, f"{(m, n, k)}: {plan}"
            seen.add(plan["splits"])
    assert {1, 2, 4, 8} <= seen


@on_devices
@aligned_or_not
def test_plans_are_sorted_and_distinct(device: str, aligned: bool) -> None:
    for problem, plans in sweep(device, aligned):
        costs = [plan["cost"] for plan in plans]
        assert costs == sorted(costs), problem
        assert all(0 < cost < float("inf") for cost in costs), problem
        assert len({(plan["tile"], plan["splits"]) for plan in plans}) == len(plans), problem


def test_text_names_the_plan() -> None:
    for _, plans in sweep("H200", True)[::17]:
        for plan in plans:
            tile = TILES[plan["tile"]]
            block = f"{tile['block_m']}x{tile['block_n']}x{tile['block_k']}"
            assert plan["text"].startswith(f"{block} warps ")
            assert plan["text"].endswith(f" stages {tile['stages']} split {plan['splits']}")


def test_every_tile_is_reachable() -> None:
    chosen = {plans[0]["tile"] for _, plans in sweep("H200", True)}
    assert chosen == set(range(len(TILES)))
    unaligned = {plans[0]["tile"] for _, plans in sweep("H200", False)}
    assert unaligned == {i for i, tile in enumerate(TILES) if tile["serves_unaligned"]}


def test_splits_where_few_tiles_meet_a_long_k() -> None:
    assert rank(1, 64, 16384, H200)[0]["splits"] > 1
    assert rank(8192, 4096, 16384, H200)[0]["splits"] == 1


def test_a_tile_is_not_far_taller_than_the_problem() -> None:
    for (m, n, k), plans in sweep("H200", True):
        for plan in plans:
            block_m = TILES[plan["tile"]]["block_m"]
            assert block_m <= max(16, 2 * m - 1), f"{(m, n, k)}: {plan}"


@pytest.mark.parametrize("shared_bytes", [10_240, 65_536])
def test_error_where_no_tile_fits(shared_bytes: int) -> None:
    assert shared_bytes < min(tile["shared_bytes"] for tile in TILES)
    with pytest.raises(
        RuntimeError,
        match=f"int8_ops: no GEMM tile fits the {shared_bytes} bytes of shared memory",
    ):
        rank(64, 64, 64, (40, shared_bytes))


@pytest.mark.parametrize("m", [1, 4096])
def test_some_tile_fits_every_device_of_8_0_and_up(m: int) -> None:
    # 99 KiB is the least that any device of capability 8.0 or newer offers.
    assert rank(m, 512, 512, (16, 101_376), aligned=False)


ARCH_TABLE = [
    # archs, capability, runs
    ("8.0", (8, 0), True),
    ("8.0", (8, 6), True),  # machine code serves higher minors
    ("8.0", (8, 9), True),
    ("8.6", (8, 0), False),  # but no lower one
    ("8.0", (9, 0), False),  # and no other major
    ("9.0", (8, 0), False),
    ("8.0+PTX", (8, 6), True),
    ("8.0+PTX", (9, 0), True),  # PTX serves everything newer
    ("8.0+PTX", (12, 0), True),
    ("8.6+PTX", (8, 0), False),
    ("9.0+PTX", (8, 9), False),
    ("9.0a", (9, 0), True),  # an "a" architecture: itself alone
    ("9.0a", (9, 1), False),
    ("9.0a", (10, 0), False),
    ("9.0a+PTX", (10, 0), False),
    ("10.0a", (10, 3), False),
    ("12.0", (12, 1), True),
    ("12.0", (1, 2), False),
    ("8.0+PTX;9.0a", (8, 0), True),
    ("8.0+PTX;9.0a", (9, 0), True),
    ("8.0+PTX;9.0a", (10, 0), True),
    ("8.0+PTX;9.0a", (7, 5), False),
    ("9.0a;8.6", (8, 6), True),
    ("8.0;8.6", (8, 9), True),
    ("", (9, 0), False),
]


@pytest.mark.parametrize(("archs", "capability", "runs"), ARCH_TABLE)
def test_which_devices_run_what_was_compiled(
    archs: str, capability: tuple[int, int], runs: bool
) -> None:
    major, minor = capability
    why = f"built for {archs}; this device is {major}.{minor}"
    if major < 8:
        why += ", and the kernels need 8.0 or newer"
    else:
        why += f": rebuild with TORCH_CUDA_ARCH_LIST={major}.{minor}"
    assert BUILD.why_not_runnable(archs, major, minor) == ("" if runs else why)


def test_the_default_list_covers_8_0_and_up() -> None:
    source = (ROOT / "setup.py").read_text()
    archs = re.search(r'^DEFAULT_ARCHS = "(.+)"$', source, re.M).group(1)
    for capability in ((8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (10, 3), (12, 0)):
        assert BUILD.why_not_runnable(archs, *capability) == "", capability


def test_a_problem_of_no_size_is_refused() -> None:
    with pytest.raises(ValueError, match="must be at least 1"):
        BUILD.rank_gemm_plans(1, 1, 1, 2, 0, 232448)

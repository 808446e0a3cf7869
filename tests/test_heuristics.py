"""The CUDA matmul's heuristics and the list of compiled architectures, asked on the host: no GPU.

python tests/test_heuristics.py --golden    prints GOLDEN as the cost model has it now
"""

from __future__ import annotations

import itertools
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from int8_ops import _extension
from int8_ops._bench.shapes import LLAMA, SMALL_M, SWEEP_K

ROOT = Path(__file__).resolve().parents[1]
CUDA = ROOT / "csrc" / "cuda"
BUILD = _extension.build_info.require()
PATHS: list[str] = BUILD.gemm_paths()
TILES: list[dict] = BUILD.gemm_tiles()
NUM_TILES = {
    "sm80": len(TILES),
    "skinny": len(BUILD.skinny_tiles()),
    "resident": len(BUILD.resident_tiles()),
    "stream": len(BUILD.stream_tiles()),
    "stationary": len(BUILD.stationary_tiles()),
    "panel": len(BUILD.panel_tiles()),
}
HOPPER = ("resident", "stream", "stationary", "panel")
STATIONARY_TILES = BUILD.stationary_tiles()
MAX_STATIONARY_K = STATIONARY_TILES[0]["max_k"]
MAX_RESIDENT_K = 1024
MAX_SKINNY_ROWS = 256
PANEL_TILES = BUILD.panel_tiles()
MAX_PANEL_K = PANEL_TILES[0]["max_k"]
MAX_PANEL_ROWS = PANEL_TILES[0]["max_rows"]
X_BYTES = (0, 2, 4)

# Multiprocessors, the shared memory that a block may opt into, and capability 9.0. An H200 is the
# same to the cost model.
DEVICES = {
    "H100": (132, 232_448, True),
    "A100": (108, 166_912, False),
    "L4": (58, 101_376, False),
    "RTX 4090": (128, 101_376, False),
}

# The benchmark's shapes, M, K, N.
GOLDEN_SHAPES = list(dict.fromkeys(tuple(shape) for shape in (*LLAMA, *SMALL_M, *SWEEP_K)))

# What an H100 runs for 16-bit results, from x of 16 bits (2) and from int8 rows (0). A change of
# the cost model that changes one of these must be a measured one; --golden prints the table.
GOLDEN: dict[int, dict[tuple[int, int, int], str]] = {
    2: {
        (32768, 128, 1024): "stationary cluster 2",
        (32768, 256, 1024): "stationary cluster 2",
        (32768, 512, 1024): "stationary cluster 4",
        (32768, 1024, 1024): "stationary cluster 8",
        (32768, 256, 4096): "stationary cluster 8",
        (32768, 512, 4096): "stationary cluster 1 after quantize",
        (32768, 1024, 4096): "stationary cluster 1 after quantize",
        (1, 512, 1024): "panel 8x32 cluster 1",
        (128, 512, 4096): "panel 32x128 cluster 2",
        (1, 4096, 14336): "skinny 8x16 warps 1x4 steps 8",
        (256, 4096, 4096): "stream 128x64x128 cluster 2x1 after quantize",
        (8192, 4096, 14336): "stream 128x256x128 cluster 2x1",
        (8192, 14336, 4096): "stream 128x256x128 cluster 2x1 after quantize",
        (2, 512, 1024): "panel 8x32 cluster 1",
        (4, 512, 1024): "panel 8x32 cluster 1",
        (8, 512, 1024): "panel 8x32 cluster 1",
        (16, 512, 1024): "panel 8x32 cluster 1",
        (32, 512, 1024): "panel 8x32 cluster 1",
        (64, 512, 1024): "panel 8x64 cluster 2",
        (1, 512, 4096): "panel 8x32 cluster 1",
        (2, 512, 4096): "panel 8x32 cluster 1",
        (4, 512, 4096): "panel 8x32 cluster 1",
        (8, 512, 4096): "panel 8x32 cluster 1",
        (16, 512, 4096): "panel 8x64 cluster 2",
        (32, 512, 4096): "panel 16x64 cluster 2",
        (64, 512, 4096): "panel 16x64 cluster 2",
        (1, 4096, 4096): "skinny 8x16 warps 1x4 steps 8",
        (2, 4096, 4096): "skinny 8x16 warps 1x8 steps 8",
        (4, 4096, 4096): "skinny 8x16 warps 1x8 steps 8",
        (8, 4096, 4096): "skinny 8x32 warps 2x8 steps 8",
        (16, 4096, 4096): "sm80 16x32x512 warps 1x1x4 stages 4 split 1 after quantize",
        (32, 4096, 4096): "sm80 16x64x256 warps 1x2x2 stages 4 split 1 after quantize",
        (64, 4096, 4096): "sm80 32x64x256 warps 1x2x2 stages 3 split 1 after quantize",
        (2, 4096, 14336): "skinny 8x16 warps 1x4 steps 8",
        (4, 4096, 14336): "skinny 8x16 warps 1x8 steps 8",
        (8, 4096, 14336): "skinny 8x32 warps 2x8 steps 8",
        (16, 4096, 14336): "sm80 16x64x256 warps 1x2x2 stages 4 split 1 after quantize",
        (32, 4096, 14336): "sm80 32x64x256 warps 1x2x2 stages 3 split 1 after quantize",
        (64, 4096, 14336): "sm80 64x128x256 warps 2x2x2 stages 3 split 1 after quantize",
        (32768, 64, 4096): "stationary cluster 8",
        (32768, 128, 4096): "stationary cluster 8",
        (32768, 192, 4096): "stationary cluster 8",
        (32768, 384, 4096): "resident 128x128 staged 128 parts 1",
        (32768, 768, 4096): "stream 128x256x128 cluster 2x1",
        (32768, 1536, 4096): "stream 128x256x128 cluster 2x1",
        (32768, 2048, 4096): "stream 128x256x128 cluster 2x1 after quantize",
        (32768, 3072, 4096): "stream 128x256x128 cluster 2x1 after quantize",
        (32768, 4096, 4096): "stream 128x256x128 cluster 2x1 after quantize",
        (32768, 8192, 4096): "stream 128x256x128 cluster 2x1 after quantize",
    },
    0: {
        (32768, 128, 1024): "stationary cluster 2",
        (32768, 256, 1024): "stationary cluster 1",
        (32768, 512, 1024): "stationary cluster 1",
        (32768, 1024, 1024): "stationary cluster 1",
        (32768, 256, 4096): "stationary cluster 1",
        (32768, 512, 4096): "stationary cluster 1",
        (32768, 1024, 4096): "stationary cluster 1",
        (1, 512, 1024): "panel 8x32 cluster 1",
        (128, 512, 4096): "panel 32x128 cluster 2",
        (1, 4096, 14336): "sm80 16x64x256 warps 1x2x2 stages 4 split 1",
        (256, 4096, 4096): "stream 128x64x128 cluster 2x1",
        (8192, 4096, 14336): "stream 128x256x128 cluster 2x1",
        (8192, 14336, 4096): "stream 128x256x128 cluster 2x1",
        (2, 512, 1024): "panel 8x32 cluster 1",
        (4, 512, 1024): "panel 8x32 cluster 1",
        (8, 512, 1024): "panel 8x32 cluster 1",
        (16, 512, 1024): "panel 8x32 cluster 1",
        (32, 512, 1024): "panel 8x32 cluster 1",
        (64, 512, 1024): "panel 16x64 cluster 2",
        (1, 512, 4096): "panel 8x32 cluster 1",
        (2, 512, 4096): "panel 8x32 cluster 1",
        (4, 512, 4096): "panel 16x64 cluster 2",
        (8, 512, 4096): "panel 16x64 cluster 2",
        (16, 512, 4096): "panel 16x64 cluster 2",
        (32, 512, 4096): "panel 16x64 cluster 2",
        (64, 512, 4096): "panel 16x64 cluster 2",
        (1, 4096, 4096): "sm80 16x32x512 warps 1x1x4 stages 4 split 1",
        (2, 4096, 4096): "sm80 16x32x512 warps 1x1x4 stages 4 split 1",
        (4, 4096, 4096): "sm80 16x32x512 warps 1x1x4 stages 4 split 1",
        (8, 4096, 4096): "sm80 16x32x512 warps 1x1x4 stages 4 split 1",
        (16, 4096, 4096): "sm80 16x32x512 warps 1x1x4 stages 4 split 1",
        (32, 4096, 4096): "sm80 16x64x256 warps 1x2x2 stages 4 split 1",
        (64, 4096, 4096): "sm80 32x64x256 warps 1x2x2 stages 3 split 1",
        (2, 4096, 14336): "sm80 16x64x256 warps 1x2x2 stages 4 split 1",
        (4, 4096, 14336): "sm80 16x64x256 warps 1x2x2 stages 4 split 1",
        (8, 4096, 14336): "sm80 16x64x256 warps 1x2x2 stages 4 split 1",
        (16, 4096, 14336): "sm80 16x64x256 warps 1x2x2 stages 4 split 1",
        (32, 4096, 14336): "sm80 32x64x256 warps 1x2x2 stages 3 split 1",
        (64, 4096, 14336): "sm80 64x128x256 warps 2x2x2 stages 3 split 1",
        (32768, 64, 4096): "stationary cluster 1",
        (32768, 128, 4096): "stationary cluster 1",
        (32768, 192, 4096): "stationary cluster 1",
        (32768, 384, 4096): "resident 128x128 staged 128 parts 1",
        (32768, 768, 4096): "stationary cluster 1",
        (32768, 1536, 4096): "stream 128x256x128 cluster 2x1",
        (32768, 2048, 4096): "stream 128x256x128 cluster 2x1",
        (32768, 3072, 4096): "stream 128x256x128 cluster 2x1",
        (32768, 4096, 4096): "stream 128x256x128 cluster 2x1",
        (32768, 8192, 4096): "stream 128x256x128 cluster 2x1",
    },
}

SWEEP_M = (1, 2, 7, 8, 9, 15, 16, 17, 24, 31, 32, 33, 64, 65, 128, 129, 256, 257, 1000, 4096, 32768)
SWEEP_NK = (16, 64, 144, 512, 1024, 1040, 2048, 4096, 16384)
NARROW_N = (1, 17, 100, 1041, 4095, 16383)
UNALIGNED_K = (1, 17, 100, 1041, 4095, 16383)

Problem = tuple[int, int, int]


def rank(
    m: int,
    n: int,
    k: int,
    device: str = "H100",
    aligned: bool = True,
    wide: bool = True,
    x_bytes: int = 0,
    out_bytes: int = 2,
) -> list[dict]:
    sm_count, shared_bytes, sm90 = DEVICES[device]
    return BUILD.rank_gemm_plans(
        m,
        n,
        k,
        out_bytes,
        sm_count,
        shared_bytes,
        aligned=aligned,
        wide=wide,
        sm90=sm90,
        x_bytes=x_bytes,
    )


def best(plans: list[dict], path: str) -> dict:
    return next(plan for plan in plans if plan["path"] == path)


KINDS = {"aligned": (True, True), "narrow": (True, False), "unaligned": (False, False)}


def sweep(device: str, kind: str, x_bytes: int = 0) -> Iterator[tuple[Problem, list[dict]]]:
    aligned, wide = KINDS[kind]
    columns = SWEEP_NK if wide else NARROW_N
    lengths = SWEEP_NK if aligned else UNALIGNED_K
    for m, n, k in itertools.product(SWEEP_M, columns, lengths):
        yield (m, n, k), rank(m, n, k, device, aligned, wide, x_bytes)


on_devices = pytest.mark.parametrize("device", DEVICES)
every_kind = pytest.mark.parametrize("kind", KINDS)
every_source = pytest.mark.parametrize("x_bytes", X_BYTES)


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


# ---- the choice ----------------------------------------------------------------------------------


@pytest.mark.parametrize("x_bytes", [2, 0], ids=["x of 16 bits", "int8 rows"])
@pytest.mark.parametrize("shape", GOLDEN_SHAPES, ids=str)
def test_golden_choice(shape: Problem, x_bytes: int) -> None:
    m, k, n = shape
    assert rank(m, n, k, x_bytes=x_bytes)[0]["text"] == GOLDEN[x_bytes][shape]


def test_the_golden_table_holds_the_golden_shapes() -> None:
    assert {x_bytes: set(table) for x_bytes, table in GOLDEN.items()} == {
        x_bytes: set(GOLDEN_SHAPES) for x_bytes in (2, 0)
    }


def test_every_tile_of_every_path_is_reachable() -> None:
    """As the first choice for some problem: on an H100, or on a device without wgmma."""
    chosen = {
        (plans[0]["path"], plans[0]["tile"])
        for device, kind, x_bytes in itertools.product(("H100", "A100"), KINDS, X_BYTES)
        for _, plans in sweep(device, kind, x_bytes)
    }
    assert chosen == {(path, tile) for path in PATHS for tile in range(NUM_TILES[path])}


def test_every_tile_for_unaligned_rows_is_reachable() -> None:
    chosen = {plans[0]["tile"] for _, plans in sweep("H100", "unaligned")}
    assert chosen == {i for i, tile in enumerate(TILES) if tile["serves_unaligned"]}


def stationary_clusters(tile: dict, device: str) -> int:
    """How many are there at once: those of four leave some multiprocessors idle."""
    return (DEVICES[device][0] - (4 if tile["cluster"] > 2 else 0)) // tile["cluster"]


@on_devices
@every_kind
@every_source
def test_every_plan_can_run(device: str, kind: str, x_bytes: int) -> None:
    aligned, wide = KINDS[kind]
    _, shared_limit, sm90 = DEVICES[device]
    for problem, plans in sweep(device, kind, x_bytes):
        m, n, k = problem
        assert plans, problem
        for plan in plans:
            where = f"{problem} on {device}: {plan}"
            path, tile = plan["path"], plan["tile"]
            assert 0 <= tile < NUM_TILES[path], where
            assert plan["splits"] >= 1, where
            if path == "sm80":
                assert TILES[tile]["shared_bytes"] <= shared_limit, where
                assert aligned or TILES[tile]["serves_unaligned"], where
                # A kernel that takes int8 alone.
                assert plan["pass"] == (x_bytes > 0), where
                continue
            assert aligned, where
            assert x_bytes > 0 or not plan["pass"], where
            if path == "skinny":
                assert m <= MAX_SKINNY_ROWS, where
                needed = BUILD.skinny_tiles(m=m, k=k)[tile]["shared_bytes"]
                assert needed <= shared_limit, where
            else:
                assert sm90, where
                assert wide or path == "panel", where
            if path == "panel":
                assert m <= MAX_PANEL_ROWS, where
                assert k <= MAX_PANEL_K, where
                assert not plan["pass"], where
            if path == "resident":
                assert k <= MAX_RESIDENT_K, where
                assert not plan["pass"], where
                assert plan["splits"] <= ceil_div(n, BUILD.resident_tiles()[tile]["block_n"]), where
            else:
                assert plan["splits"] == 1, where
            if path == "stationary":
                t = BUILD.stationary_tiles(n=n, k=k)[tile]
                assert k <= MAX_STATIONARY_K, where
                assert t["parts"] <= stationary_clusters(t, device), where
                # What is quantized on the way lies in registers: 16-bit rows, shared by a cluster.
                quantizes = x_bytes > 0 and not plan["pass"]
                assert not quantizes or x_bytes == 2, where
                assert not quantizes or t["cluster"] * t["block_k"] >= k, where


@on_devices
@every_kind
@every_source
def test_every_path_that_can_run_is_offered(device: str, kind: str, x_bytes: int) -> None:
    aligned, wide = KINDS[kind]
    for (m, n, k), plans in sweep(device, kind, x_bytes):
        expected = {"sm80"}
        fits = min(t["shared_bytes"] for t in BUILD.skinny_tiles(m=m, k=k)) <= DEVICES[device][1]
        if aligned and m <= MAX_SKINNY_ROWS and fits:
            expected.add("skinny")
        if aligned and DEVICES[device][2] and m <= MAX_PANEL_ROWS and k <= MAX_PANEL_K:
            expected.add("panel")
        if aligned and wide and DEVICES[device][2]:
            expected.add("stream")
            if k <= MAX_RESIDENT_K:
                expected.add("resident")
            if k <= MAX_STATIONARY_K and any(
                t["parts"] <= stationary_clusters(t, device)
                for t in BUILD.stationary_tiles(n=n, k=k)
            ):
                expected.add("stationary")
        assert {plan["path"] for plan in plans} == expected, (m, k)


@pytest.mark.parametrize(
    ("path", "longest", "most_rows"),
    [
        ("resident", MAX_RESIDENT_K, max(SWEEP_M)),
        ("stationary", MAX_STATIONARY_K, max(SWEEP_M)),
        ("panel", MAX_PANEL_K, MAX_PANEL_ROWS),
    ],
)
def test_a_path_stops_at_its_longest_rows(path: str, longest: int, most_rows: int) -> None:
    for m in (m for m in SWEEP_M if m <= most_rows):
        paths = [
            {plan["path"] for plan in rank(m, 4096, k, x_bytes=2)} for k in (longest, longest + 16)
        ]
        assert path in paths[0]
        assert path not in paths[1]


@on_devices
@every_kind
def test_no_split_of_k_is_empty(device: str, kind: str) -> None:
    seen = set()
    for (m, n, k), plans in sweep(device, kind):
        for plan in plans:
            if plan["path"] != "sm80":
                continue
            k_blocks = ceil_div(k, TILES[plan["tile"]]["block_k"])
            each = ceil_div(k_blocks, plan["splits"])
            assert (plan["splits"] - 1) * each < k_blocks, f"{(m, n, k)}: {plan}"
            seen.add(plan["splits"])
    assert {1, 2, 4, 8} <= seen


@on_devices
@every_kind
@every_source
def test_plans_are_sorted_and_distinct(device: str, kind: str, x_bytes: int) -> None:
    for problem, plans in sweep(device, kind, x_bytes):
        costs = [plan["cost"] for plan in plans]
        assert costs == sorted(costs), problem
        assert all(0 < cost < float("inf") for cost in costs), problem
        kinds = {(plan["path"], plan["tile"], plan["splits"], plan["pass"]) for plan in plans}
        assert len(kinds) == len(plans), problem


@every_source
def test_text_names_the_plan(x_bytes: int) -> None:
    skinny, resident, stream = BUILD.skinny_tiles(), BUILD.resident_tiles(), BUILD.stream_tiles()
    for _, plans in itertools.islice(sweep("H100", "aligned", x_bytes), 0, None, 17):
        for plan in plans:
            index = plan["tile"]
            match plan["path"]:
                case "sm80":
                    t = TILES[index]
                    block = f"{t['block_m']}x{t['block_n']}x{t['block_k']}"
                    pattern = rf"{block} warps \d+x\d+x\d+ stages {t['stages']} "
                    pattern += f"split {plan['splits']}"
                case "skinny":
                    t = skinny[index]
                    pattern = f"{t['rows']}x{t['cols']} warps {t['warps_n']}x{t['warps_k']} "
                    pattern += f"steps {t['steps']}"
                case "resident":
                    t = resident[index]
                    pattern = f"{t['block_m']}x{t['block_n']} staged {t['staged_cols']} "
                    pattern += f"parts {plan['splits']}"
                case "stream":
                    t = stream[index]
                    pattern = f"{t['block_m']}x{t['block_n']}x{t['block_k']} "
                    pattern += f"cluster {t['cluster_m']}x{t['cluster_n']}"
                case "panel":
                    t = PANEL_TILES[index]
                    pattern = f"{t['rows']}x{t['cols']} cluster {t['cluster']}"
                case "stationary":
                    pattern = f"cluster {BUILD.stationary_tiles()[index]['cluster']}"
            suffix = " after quantize" if plan["pass"] else ""
            assert re.fullmatch(f"{plan['path']} {pattern}{suffix}", plan["text"]), plan


def test_splits_where_few_tiles_meet_a_long_k() -> None:
    assert best(rank(1, 64, 16384), "sm80")["splits"] > 1
    assert best(rank(8192, 4096, 16384), "sm80")["splits"] == 1


def test_an_sm80_tile_is_not_far_taller_than_the_problem() -> None:
    for (m, n, k), plans in sweep("H100", "aligned"):
        for plan in plans:
            if plan["path"] == "sm80":
                block_m = TILES[plan["tile"]]["block_m"]
                assert block_m <= max(16, 2 * m - 1), f"{(m, n, k)}: {plan}"


@pytest.mark.parametrize("shared_bytes", [10_240, 65_536])
def test_error_where_no_tile_fits(shared_bytes: int) -> None:
    assert shared_bytes < min(tile["shared_bytes"] for tile in TILES)
    with pytest.raises(
        RuntimeError,
        match=f"int8_ops: no GEMM tile fits the {shared_bytes} bytes of shared memory",
    ):
        BUILD.rank_gemm_plans(MAX_SKINNY_ROWS + 1, 64, 64, 2, 40, shared_bytes)


@pytest.mark.parametrize("m", [1, 4096])
def test_some_tile_fits_every_device_of_8_0_and_up(m: int) -> None:
    # 99 KiB is the least that any device of capability 8.0 or newer offers.
    assert BUILD.rank_gemm_plans(m, 512, 512, 2, 16, 101_376, aligned=False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sm_count": 0}, "must be at least 1"),
        ({"m": 0}, "must be at least 1"),
        ({"k": -1}, "must be at least 1"),
        ({"x_bytes": 1}, "x_bytes must be 2 or 4"),
    ],
    ids=str,
)
def test_a_problem_that_makes_no_sense_is_refused(change: dict, message: str) -> None:
    problem = {"m": 1, "n": 1, "k": 1, "out_bytes": 2, "sm_count": 132, "shared_bytes": 232_448}
    assert BUILD.rank_gemm_plans(**problem)
    with pytest.raises(ValueError, match=message):
        BUILD.rank_gemm_plans(**{**problem, **change})


# ---- the tiles -----------------------------------------------------------------------------------


def test_paths_are_known() -> None:
    assert list(NUM_TILES) == PATHS
    assert all(NUM_TILES.values())


def test_tiles_of_a_path_differ() -> None:
    named = [getattr(BUILD, f"{path}_tiles")() for path in ("skinny", *HOPPER)]
    for tiles in (TILES, *named):
        assert len({tuple(tile.items()) for tile in tiles}) == len(tiles)


def test_every_sm80_tile_has_one_instantiation() -> None:
    found = {}
    for path in sorted((CUDA / "sm80" / "instantiations").iterdir()):
        found[path.name] = [
            int(index)
            for index in re.findall(r"template void launch_gemm<(\d+)>", path.read_text())
        ]
    assert found == {f"gemm_tile_{i}.cu": [i] for i in range(len(TILES))}
    dispatch = (CUDA / "sm80" / "gemm.cu").read_text()
    declared = [int(i) for i in re.findall(r"^INT8_OPS_EXTERN_TILE\((\d+)\);", dispatch, re.M)]
    assert declared == list(range(len(TILES)))


def test_every_hopper_tile_has_one_instantiation_a_source() -> None:
    arguments = (CUDA / "sm90" / "gemm_args.cuh").read_text()
    sources = re.findall(r"\bk\w+", re.search(r"enum class Source \{(.+?)\}", arguments).group(1))
    assert len(sources) == 4
    found = []
    for path in sorted((CUDA / "sm90" / "instantiations").iterdir()):
        if path.name.startswith("stationary_"):
            continue
        name = re.match(r"(resident|stream)_tile_(\d+)\b.*\.cu$", path.name)
        assert name, f"{path.name} names no tile"
        pattern = r"^INT8_OPS_(RESIDENT|STREAM)_TILE\((\d+), Source::(\w+)\);$"
        inside = [
            (kind.lower(), int(tile), source)
            for kind, tile, source in re.findall(pattern, path.read_text(), re.M)
        ]
        assert inside, f"{path.name} instantiates nothing"
        assert {entry[:2] for entry in inside} == {(name.group(1), int(name.group(2)))}
        found += inside
    assert sorted(found) == sorted(
        (path, tile, source)
        for path in ("resident", "stream")
        for tile in range(NUM_TILES[path])
        for source in sources
    )


def test_every_stationary_kernel_has_one_instantiation() -> None:
    """For every power of two K-blocks; clusters of every size have it, float32 rows a pass."""
    folder = CUDA / "sm90" / "instantiations"
    held = [1, 2, 4, 8]
    assert held[-1] * STATIONARY_TILES[0]["block_k"] == MAX_STATIONARY_K
    assert sorted(path.name for path in folder.glob("stationary_*")) == [
        f"stationary_{k_blocks}.cu" for k_blocks in held
    ]
    for k_blocks in held:
        text = (folder / f"stationary_{k_blocks}.cu").read_text()
        found = re.findall(r"^INT8_OPS_STATIONARY\((\d+), Source::(\w+)\);$", text, re.M)
        sources = ("kInt8", "kFloat16", "kBFloat16")
        assert found == [(str(k_blocks), source) for source in sources]


@pytest.mark.parametrize("tile", TILES, ids=lambda t: f"{t['block_m']}x{t['block_n']}")
def test_sm80_tile_geometry(tile: dict) -> None:
    assert tile["block_m"] % 16 == 0
    assert tile["block_n"] % 32 == 0
    assert tile["block_k"] % 128 == 0
    assert tile["threads"] % 32 == 0
    assert 32 <= tile["threads"] <= 1024
    stages = tile["stages"] * (tile["block_m"] + tile["block_n"]) * tile["block_k"]
    assert stages < tile["shared_bytes"] <= DEVICES["H100"][1]


@pytest.mark.parametrize("tile", range(NUM_TILES["skinny"]))
def test_skinny_tile_geometry(tile: int) -> None:
    for m, k in itertools.product((1, 8, 9, 64, 256), (16, 144, 1024, 4096, 14336)):
        t = BUILD.skinny_tiles(m=m, k=k)[tile]
        assert t["rows"] == 8 or t["rows"] % 16 == 0
        assert t["cols"] == 16 * t["warps_n"]
        assert t["threads"] == 32 * t["warps_n"] * t["warps_k"] <= 1024
        # One thread a group of eight columns of a row, one a column, one a row.
        assert t["rows"] * t["cols"] // 8 <= t["threads"]
        assert max(t["cols"], t["rows"]) <= t["threads"]
        rows = min(m, t["rows"])
        assert t["shared_bytes"] >= t["fixed_bytes"] + rows * k
        assert t["shared_bytes"] < t["fixed_bytes"] + rows * (k + 3 * 64)
    # A row of the longest K in use fits every tile.
    assert BUILD.skinny_tiles(m=1, k=14336)[tile]["shared_bytes"] <= DEVICES["H100"][1]


def test_some_skinny_tile_takes_eight_long_rows() -> None:
    needed = [t["shared_bytes"] for t in BUILD.skinny_tiles(m=8, k=14336)]
    assert min(needed) <= DEVICES["H100"][1]


@pytest.mark.parametrize("tile", range(NUM_TILES["resident"]))
@pytest.mark.parametrize("buffers", [1, 2])
def test_resident_tile_fits(tile: int, buffers: int) -> None:
    for k in range(16, MAX_RESIDENT_K + 1, 16):
        t = BUILD.resident_tiles(k=k, buffers=buffers)[tile]
        assert t["block_n"] % t["staged_cols"] == 0
        assert t["staged_cols"] % 64 == 0
        if buffers == 2 and t["stages"] == 0:
            continue  # then one set is used
        # What is started before the tile before it is stored holds its stages.
        assert t["stages"] >= max(2, min(t["ahead"], ceil_div(k, t["block_k"]))), (k, t)
        check_shared(t, k, buffers * t["block_m"])


@pytest.mark.parametrize("tile", range(NUM_TILES["stream"]))
def test_stream_tile_fits(tile: int) -> None:
    for k in (*range(16, 2049, 16), *range(2048, 131_072, 1008), 131_056):
        t = BUILD.stream_tiles(k=k)[tile]
        assert t["block_n"] % t["staged_cols"] == 0
        assert t["staged_cols"] % 64 == 0
        assert t["cluster_m"] * t["cluster_n"] <= 8  # what every device can place
        # Each block loads its share, in the eight rows that the swizzle repeats after.
        assert t["block_m"] % (8 * t["cluster_n"]) == 0
        assert t["block_n"] % (8 * t["cluster_m"]) == 0
        assert t["stages"] >= 2, (k, t)
        check_shared(t, k, 0, stage_rows=t["block_m"])


@pytest.mark.parametrize("tile", range(NUM_TILES["stationary"]))
def test_stationary_tile_fits(tile: int) -> None:
    limit = DEVICES["H100"][1]
    for k in range(16, MAX_STATIONARY_K + 1, 16):
        for n in (8, 256, 264, 1024, 4096, 4104, 14336):
            t = BUILD.stationary_tiles(n=n, k=k)[tile]
            columns = t["units"] * t["unit_columns"]
            assert t["parts"] * t["cluster"] * columns >= n, (n, k, t)
            # No cluster of the parts is without columns.
            assert (t["parts"] - 1) * t["cluster"] * columns < n, (n, k, t)
            assert t["block_m"] % (8 * t["cluster"]) == 0  # a block's share: whole groups of rows
            row_bytes = ceil_div(k, t["block_k"]) * t["block_k"]
            # What a thread holds: 64 columns a warpgroup and unit, 128 threads.
            assert columns // 2 * row_bytes <= 128 * 4 * 128, (n, k, t)
            # On its way there it passes through the buffers of rows.
            buffers = t["row_buffers"] * t["block_m"] * row_bytes
            assert t["row_buffers"] >= 2, (n, k, t)
            assert columns * row_bytes <= buffers, (n, k, t)
            scales = t["row_buffers"] * t["block_m"] * 2 * 4
            assert buffers + scales + columns * 8 < t["shared_bytes"] <= limit, (n, k, t)


@pytest.mark.parametrize("t", PANEL_TILES, ids=lambda t: f"{t['rows']}x{t['cols']}")
def test_panel_tile_geometry(t: dict) -> None:
    warps = t["threads"] // 32
    assert t["rows"] in (8, 16, 32)  # the n of a wgmma
    assert t["rows"] % warps == 0
    assert t["cols"] % 16 == 0
    assert t["cols"] // 16 <= warps
    assert t["cols"] // t["cluster"] % warps == 0
    # All of the rows and of w, and as many blocks a multiprocessor as the tile says.
    assert t["shared_bytes"] > (t["rows"] + t["cols"]) * t["max_k"]
    assert t["blocks_per_sm"] * (t["shared_bytes"] + 1024) <= DEVICES["H100"][1] + 1024


def check_shared(t: dict, k: int, resident_rows: int, stage_rows: int = 0) -> None:
    """Room for all there is, within the limit, and with a stage more it would not fit."""
    limit = DEVICES["H100"][1]
    assert t["shared_bytes"] <= limit, (k, t)
    k_blocks = ceil_div(k, t["block_k"])
    stage = (stage_rows + t["block_n"]) * t["block_k"]
    slot = t["block_n"] * 8 + t["block_m"] * 4
    fixed = t["shared_bytes"] - t["stages"] * stage - t["factor_slots"] * slot
    rows = resident_rows * k_blocks * t["block_k"]
    staging = t["block_m"] * t["staged_cols"] * 2
    assert rows + staging < fixed <= rows + staging + 1024, (k, t)
    # The producer runs `stages` K-blocks ahead of a tile that is still to be stored.
    assert t["factor_slots"] == t["stages"] // k_blocks + 1, (k, t)
    more = t["stages"] + 1
    if t["stages"] < 12:
        assert fixed + more * stage + (more // k_blocks + 1) * slot > limit, (k, t)


def test_a_tile_for_no_rows_or_columns_is_refused() -> None:
    for call in (
        BUILD.skinny_tiles,
        BUILD.resident_tiles,
        BUILD.stream_tiles,
        BUILD.stationary_tiles,
    ):
        for k in (0, -1, 131_072):
            with pytest.raises(ValueError, match="k at least 1"):
                call(k=k)
    assert all(tile["stages"] == 0 for tile in BUILD.resident_tiles(k=16_384))


# ---- architectures -------------------------------------------------------------------------------


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


def print_golden() -> None:
    """GOLDEN, as the heuristics choose now."""
    print("GOLDEN: dict[int, dict[tuple[int, int, int], str]] = {")
    for x_bytes in (2, 0):
        print(f"    {x_bytes}: {{")
        for m, k, n in GOLDEN_SHAPES:
            text = rank(m, n, k, x_bytes=x_bytes)[0]["text"]
            print(f'        ({m}, {k}, {n}): "{text}",')
        print("    },")
    print("}")


if __name__ == "__main__":
    if sys.argv[1:] != ["--golden"]:
        sys.exit(__doc__)
    print_golden()

"""Every CUDA kernel of this library once, small: what compute-sanitizer is pointed at.

compute-sanitizer --tool memcheck python3 scripts/sanitizer_cases.py
    (racecheck and synccheck likewise; initcheck with --without-hopper; `make sanitize` runs all)

Inputs are made on the CPU and copied, results copied back and compared there with the reference:
no kernel of torch runs on the device, so a finding is ours. Exit status 1 if a result differs.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

# A true cudaMalloc a tensor: an access past a tensor's end, or a read of what was never written,
# is then seen as one, and not hidden in a block that the caching allocator hands around.
os.environ.setdefault("PYTORCH_NO_CUDA_MEMORY_CACHING", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor

from int8_ops import _extension, reference

FORCE = "INT8_OPS_GEMM_CONFIG"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
DEVICE = torch.device("cuda")
BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32}
ops = torch.ops.int8_ops

# One result of a case: what, got, expected.
Outcome = tuple[str, Tensor, Tensor]


def same_bits(got: Tensor, expected: Tensor) -> bool:
    """Shape, dtype and every bit; NaNs count as one value."""
    got = got.cpu()
    if got.shape != expected.shape or got.dtype != expected.dtype:
        return False
    if got.is_floating_point():
        nan = got.isnan()
        if not torch.equal(nan, expected.isnan()):
            return False
        got, expected = got.masked_fill(nan, 0), expected.masked_fill(nan, 0)
    bits = BITS[got.element_size()]
    return torch.equal(got.view(bits), expected.view(bits))


def integers(rows: int, cols: int) -> Tensor:
    """Random int8 over the whole range."""
    return torch.randint(-128, 128, (rows, cols), dtype=torch.int8)


def offset_copy(t: Tensor, elements: int) -> Tensor:
    """On the device, from `elements` into an allocation of its own: no 16-byte alignment."""
    flat = torch.zeros(t.numel() + elements, dtype=t.dtype)
    flat[elements:] = t.reshape(-1)
    return flat.to(DEVICE)[elements:].view(t.shape)


def gemm(tile: int, splits: int, m: int, n: int, k: int, offset: int = 0) -> Iterator[Outcome]:
    """int8_mm and int8_scaled_mm through one sm80 tile, [m, k] times [n, k] transposed."""
    os.environ[FORCE] = f"sm80:{tile}:{splits}"
    a, w = integers(m, k), integers(n, k)
    a_scale, w_scale = torch.rand(m, 1) + 0.1, torch.rand(n, 1) + 0.1
    dtype = DTYPES[(tile + splits) % 3]
    bias = torch.randn(n).to(DTYPES[(tile + splits + 1) % 3])
    product = reference.int8_mm(a, w)
    where = f"tile {tile} split {splits} [{m}, {n}, {k}] offset {offset}"
    here = offset_copy(a, offset), offset_copy(w, offset)
    yield f"int8_mm {where}", ops.int8_mm(*here), product
    scaled = ops.int8_scaled_mm(
        *here, a_scale.to(DEVICE), w_scale.to(DEVICE), bias.to(DEVICE), dtype
    )
    expected = reference.epilogue(product, a_scale, w_scale, bias, dtype)
    yield f"int8_scaled_mm {where} {dtype}", scaled, expected
    del os.environ[FORCE]


def gemm_cases() -> Iterator[Outcome]:
    """Every sm80 tile: aligned or not, split or not, a tile a block or several."""
    properties = torch.cuda.get_device_properties(DEVICE)
    for index, tile in enumerate(_extension.build_info.require().gemm_tiles()):
        if tile["shared_bytes"] > properties.shared_memory_per_block_optin:
            print(f"left out: tile {index} needs more shared memory than this device has")
            continue
        rows, cols, block_k = tile["block_m"], tile["block_n"], tile["block_k"]
        for splits in (1, 3):
            # Vector stores and K-blocks beyond the stages; then rests on all sides.
            yield from gemm(index, splits, rows + 8, cols + 8, 6 * block_k)
            yield from gemm(index, splits, rows - 3, cols - 5, 2 * block_k + 48)
            if tile["serves_unaligned"]:
                yield from gemm(index, splits, rows + 1, cols + 3, 5 * block_k + 13)
                yield from gemm(index, splits, 3, cols, 64, offset=1)
        # At most three blocks a multiprocessor: each then has a second tile.
        side = int((4 * properties.multi_processor_count) ** 0.5) + 1
        yield from gemm(index, 1, rows * side, cols * side, 32)


def special(rows: int, cols: int, dtype: torch.dtype) -> Tensor:
    """Ordinary rows, and one each of zeros, NaN, Inf, the largest and the smallest value."""
    x = torch.randn(rows, cols).to(dtype)
    for row, value in enumerate((0.0, torch.nan, torch.inf, torch.finfo(dtype).max)):
        if row < rows:
            x[row, -1 if row in (1, 2) else slice(None)] = value
    if rows > 4:
        x[4] = torch.finfo(dtype).tiny
    return x


def quantize(x: Tensor, axis: int, offset: int = 0) -> Iterator[Outcome]:
    """A scale a row (axis 0) or a column."""
    q, scale = reference.quantize_per_channel(x, axis)
    got_q, got_scale = ops.quantize_per_channel(offset_copy(x, offset), axis)
    where = f"quantize axis {axis} {tuple(x.shape)} {x.dtype} offset {offset}"
    yield f"{where} q", got_q, q
    yield f"{where} scale", got_scale, scale


def quantize_cases() -> Iterator[Outcome]:
    """Every width at which the row kernel changes, rows enough for several turns, columns."""
    multiprocessors = torch.cuda.get_device_properties(DEVICE).multi_processor_count
    for dtype in DTYPES:
        for cols in (8, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 16392, 1, 77, 1041):
            yield from quantize(special(7, cols, dtype), 0)
        yield from quantize(special(7, 64, dtype), 0, offset=1)
        for rows, cols in ((1, 8), (70, 64), (130, 77), (65, 33)):
            yield from quantize(special(rows, cols, dtype), 1)
        yield from quantize(special(70, 64, dtype), 1, offset=1)
    # A third turn of the resident blocks; the rows are at least as many as a multiprocessor holds.
    for cols, resident_rows in ((16, 512), (2048, 24), (8192, 6)):
        rows = multiprocessors * resident_rows * 2 + 3
        yield from quantize(special(rows, cols, torch.float16), 0)


def dequantize_cases() -> Iterator[Outcome]:
    """Vector and scalar, a scale a row and a scale a column."""
    for dtype in DTYPES:
        for cols, offset in ((64, 0), (1000, 8), (77, 0), (64, 1)):
            q = integers(33, cols)
            for scale in (torch.rand(33, 1), torch.rand(1, cols)):
                got = ops.dequantize(offset_copy(q, offset), scale.to(DEVICE), dtype)
                where = f"dequantize {tuple(q.shape)} offset {offset} {dtype}"
                yield where, got, reference.dequantize(q, scale, dtype)


def append_cases() -> Iterator[Outcome]:
    """latent_append: rests of a warp's rounds, int4 beside int8, tensors that begin anywhere."""
    slots = torch.tensor([4, 0, 2])
    parts = {"k": ((8, 77), (4, 602), (8, 8)), "v": ((4, 2), (8, 256))}
    bits = [[bit for bit, _ in stream] for stream in parts.values()]
    for index, dtype in enumerate(DTYPES):
        dtypes = dtype, DTYPES[(index + 1) % 3]
        latents = [
            special(12, sum(rank for _, rank in stream), of).view(2, 2, 3, -1)
            for stream, of in zip(parts.values(), dtypes, strict=True)
        ]
        widths = [rank * bit // 8 for stream in parts.values() for bit, rank in stream]
        made = [
            *(torch.full((2, 2, 5, width), 7, dtype=torch.int8) for width in widths),
            *(torch.full((2, 2, 5), -7.0) for _ in widths),
        ]
        there = [offset_copy(t, 1) for t in made]
        moved = [offset_copy(x, 1) for x in latents]
        for (k, v), at, buffers in (
            (latents, slots, made),
            (moved, slots.to(DEVICE), there),
        ):
            q, scale = buffers[:5], buffers[5:]
            ops.latent_append(k, v, at, *bits, q[:3], scale[:3], q[3:], scale[3:])
        for i, (got, expected) in enumerate(zip(there, made, strict=True)):
            yield f"latent_append {dtypes} buffer {i}", got, expected


def forced(
    plan: str, m: int, n: int, k: int, x_dtype: torch.dtype | None, variant: int
) -> Iterator[Outcome]:
    """int8_linear of x through a plan; without a dtype int8_scaled_mm, and int8_mm."""
    w, w_scale = integers(n, k), torch.rand(n, 1) * 0.01 + 0.001
    out_dtype = DTYPES[variant % 3]
    bias = None if variant % 4 == 0 else torch.randn(n).to(DTYPES[variant % 4 - 1])
    epilogue = w_scale.to(DEVICE), None if bias is None else bias.to(DEVICE), out_dtype
    where = f"{plan} [{m}, {n}, {k}] {x_dtype} to {out_dtype}"
    os.environ[FORCE] = plan
    if x_dtype is None:
        a, a_scale = integers(m, k), torch.rand(m, 1) + 0.1
        here = a.to(DEVICE), w.to(DEVICE)
        product = reference.int8_mm(a, w)
        yield f"int8_mm {where}", ops.int8_mm(*here), product
        expected = reference.epilogue(product, a_scale, w_scale, bias, out_dtype)
        got = ops.int8_scaled_mm(*here, a_scale.to(DEVICE), *epilogue)
        yield f"int8_scaled_mm {where}", got, expected
    else:
        x = special(m, k, x_dtype)
        got = ops.int8_linear(x.to(DEVICE), w.to(DEVICE), *epilogue)
        yield f"int8_linear {where}", got, reference.int8_linear(x, w, w_scale, bias, out_dtype)
    del os.environ[FORCE]


SOURCES = (None, *DTYPES)


def skinny_cases() -> Iterator[Outcome]:
    """Every tile and source of rows: rests on all sides, several tiles a block, a pass before."""
    properties = torch.cuda.get_device_properties(DEVICE)
    limit = properties.shared_memory_per_block_optin
    # Two batches of x a row; and few enough bytes for every tile of any device.
    for index, tile in enumerate(_extension.build_info.require().skinny_tiles(m=64, k=1040)):
        if tile["shared_bytes"] > limit:
            print(f"left out: skinny tile {index} needs more shared memory than this device has")
            continue
        plan = f"skinny:{index}:1"
        rows, cols = tile["rows"], tile["cols"]
        for variant, source in enumerate(SOURCES):
            yield from forced(plan, rows + 3, 2 * cols + 3, 1040, source, variant)
            yield from forced(plan, rows, cols + 8, 144, source, variant + index)
        yield from forced(f"{plan}:pass", 3, cols, 208, torch.bfloat16, index)
        blocks = tile["blocks_per_sm"] * properties.multi_processor_count
        yield from forced(plan, 1, (blocks + 2) * cols + 8, 16, torch.float16, index)


def why_no_hopper() -> str:
    """Why this process can't run the paths for Hopper, or an empty text."""
    archs = _extension.build_info.require().info()["cuda_archs"].split(";")
    if not {"9.0a", "9.0a+PTX"} & set(archs):
        return "the build has no code for 9.0a"
    if torch.cuda.get_device_capability(DEVICE) != (9, 0):
        return "this device is not of capability 9.0"
    if os.environ.get("CUDA_FORCE_PTX_JIT", "0") != "0":
        return "CUDA_FORCE_PTX_JIT leaves out the code for 9.0a"
    return ""


def hopper_cases() -> Iterator[Outcome]:
    """Every tile and source of rows, a pass before or not; the ring of stages goes round."""
    if why_no_hopper():
        print(f"left out: the paths for Hopper; {why_no_hopper()}")
        return
    build = _extension.build_info.require()
    multiprocessors = torch.cuda.get_device_properties(DEVICE).multi_processor_count
    for index, tile in enumerate(build.resident_tiles()):
        cols = tile["block_n"]
        for variant, source in enumerate(SOURCES):
            yield from forced(f"resident:{index}:1", 133, 4 * cols + 8, 528, source, variant)
            yield from forced(f"resident:{index}:3", 70, 2 * cols + 24, 1024, source, variant + 1)
            yield from forced(f"resident:{index}:1", 5, 72, 144, source, variant + 2)
        yield from forced(f"resident:{index}:1:pass", 133, cols + 8, 528, torch.bfloat16, 1)
        # A second set of rows for some blocks.
        rows = 128 * multiprocessors + 133
        for source in (None, torch.bfloat16):
            yield from forced(f"resident:{index}:1", rows, 24, 16, source, 2)
    for index, tile in enumerate(build.stream_tiles()):
        cols = tile["block_n"] * tile["cluster_n"]
        for variant, source in enumerate(SOURCES):
            yield from forced(f"stream:{index}:1", 133, cols + 8, 2064, source, variant)
            yield from forced(f"stream:{index}:1", 300, 72, 528, source, variant + 1)
            yield from forced(f"stream:{index}:1", 5, 24, 144, source, variant + 2)
            if source is not None:
                yield from forced(f"stream:{index}:1:pass", 133, cols + 8, 1040, source, variant)
        rows = 128 * multiprocessors + 133
        for source in (None, torch.bfloat16):
            yield from forced(f"stream:{index}:1", rows, 2 * cols + 8, 16, source, 2)
    for index, tile in enumerate(build.stationary_tiles()):
        # Several tiles of rows a block, more columns than a cluster holds, blocks without any.
        rows = 64 * multiprocessors // tile["cluster"] * 2 + 77
        for variant, source in enumerate(SOURCES):
            k = 128 * tile["cluster"]
            plan = f"stationary:{index}:1" + (":pass" if source == torch.float32 else "")
            yield from forced(plan, 133, 4104, k, source, variant)
            yield from forced(plan, 300, 264, k - 16, source, variant + 1)
            if source != torch.float32:
                yield from forced(plan, rows, 24, 16, source, variant + 2)
        # Every buffer is used again, and what passes through L2 on its way there.
        rows = 64 * multiprocessors // tile["cluster"] * 5
        for source in (None, torch.half):
            yield from forced(f"stationary:{index}:1", rows, 24, 128 * tile["cluster"], source, 1)
    for index, tile in enumerate(build.panel_tiles()):
        # Blocks without rows, columns that are not there, more blocks than run at once.
        rows, cols = tile["rows"], tile["cols"]
        for variant, source in enumerate(SOURCES):
            yield from forced(f"panel:{index}:1", rows + 3, 2 * cols + 3, 496, source, variant)
            yield from forced(f"panel:{index}:1", 77, cols + 8, 144, source, variant + 1)
        columns = (2 * multiprocessors + 3) * cols
        yield from forced(f"panel:{index}:1", 1, columns, 512, torch.bfloat16, index)


def linear_cases() -> Iterator[Outcome]:
    """int8_linear as the heuristics run it: few rows, a split, many rows, unaligned rows."""
    for dtype in DTYPES:
        for m, n, k in ((1, 64, 2048), (17, 96, 1040), (150, 264, 512), (5, 33, 77)):
            x = special(m, k, dtype)
            w, w_scale, bias = integers(n, k), torch.rand(n, 1), torch.randn(n).to(dtype)
            got = ops.int8_linear(
                x.to(DEVICE), w.to(DEVICE), w_scale.to(DEVICE), bias.to(DEVICE), None
            )
            expected = reference.int8_linear(x, w, w_scale, bias)
            yield f"int8_linear [{m}, {n}, {k}] {dtype}", got, expected


def latents(
    batch: int, tokens: int, out: int, bits: int, rank: int, pairs: int | None
) -> list[Tensor]:
    """A slice of one group: latents, their scales, A, its scales.

    ``pairs``: the size of heads whose RoPE pairs share A's scales, which keys' have to.
    """
    q = integers(batch * tokens, rank * bits // 8).view(batch, 1, tokens, -1)
    scale = (torch.rand(batch, 1, tokens) + 0.1) / (2 ** (bits - 1) * rank**0.5)
    a_scale = (torch.rand(1, out, 1) + 0.2) / 64
    if pairs is not None:
        halves = a_scale.view(-1, 2, pairs // 2)
        halves[:, 1] = halves[:, 0]
    return [q, scale, integers(out, rank)[None], a_scale]


def attention(
    size: int, tokens: int, repeats: int, q_len: int, k: list[tuple[int, int]],
    v: list[tuple[int, int]], dtype: torch.dtype, bias: bool = False,
) -> Iterator[Outcome]:  # fmt: skip
    """latent_attention_decode of two rows and two KV heads, all of which a query sees.

    Floats are summed: what is compared is whether the error is one of rounding.
    """
    heads = 2
    streams = []
    for slices, pairs in ((k, size), (v, None)):
        parts = [latents(2, tokens, heads * size, bits, rank, pairs) for bits, rank in slices]
        own = torch.randn(heads * size) if bias else None
        streams.append(reference.LatentStream(*map(list, zip(*parts, strict=True)), own))
    q = torch.randn(2, heads * repeats, q_len, size).to(dtype)
    start = torch.tensor([0, 3], dtype=torch.int32)
    length = torch.tensor([tokens, tokens - 2], dtype=torch.int32)
    inv_freq = 10000.0 ** (-torch.arange(0, size, 2) / size)
    arguments = (inv_freq, start, length)
    expected = reference.latent_attention_decode(q, *streams, *arguments, size**-0.5)
    here = [[[t.to(DEVICE) for t in part] for part in s[:4]] for s in streams]
    biases = [None if s.bias is None else s.bias.to(DEVICE) for s in streams]
    flat = (*here[0], biases[0], *here[1], biases[1])
    moved = [t.to(DEVICE) for t in arguments]
    got = ops.latent_attention_decode(
        q.to(DEVICE), *flat, *moved, None, size**-0.5, 1.0, None
    ).cpu()
    error = (got.double() - expected).norm() / expected.norm()
    near = torch.tensor(bool(error < 8 * torch.finfo(dtype).eps))
    where = f"latent_attention_decode {size} {tokens} {k} {v} {dtype}: error {error:.1e}"
    yield where, near, torch.tensor(True)


def attention_cases() -> Iterator[Outcome]:
    """Every kernel of the general path and of the second half, with rests on all sides."""
    for dtype in DTYPES:
        # Latents in registers, for one, four and eight query rows; one kernel folds and projects.
        for repeats, q_len in ((1, 1), (3, 1), (3, 3)):
            yield from attention(64, 300, repeats, q_len, [(8, 96)], [(8, 160)], dtype)
        # Read again: by bytes, packed, in slices, of large ranks; odd pairs.
        for repeats, q_len in ((1, 1), (2, 2), (3, 2)):
            yield from attention(6, 40, repeats, q_len, [(8, 7)], [(8, 9)], dtype, bias=True)
            yield from attention(
                32, 70, repeats, q_len, [(8, 320), (4, 64)], [(4, 96), (8, 24)], dtype
            )
    # Two kernels, for few rows and for many.
    yield from attention(64, 9000, 1, 1, [(8, 32)], [(8, 64)], torch.float16)
    yield from attention(64, 9000, 8, 16, [(8, 32)], [(8, 320)], torch.float16)


def main(arguments: list[str]) -> int:
    """Run all; the number of cases, or what differed.

    ``--without-hopper`` leaves out the paths for Hopper, for initcheck: it does not see
    what the bulk copy engine writes, and takes their outputs for uninitialised.
    """
    if arguments not in ([], ["--without-hopper"]):
        print(f"usage: sanitizer_cases.py [--without-hopper], got {arguments}", file=sys.stderr)
        return 2
    _extension.core.require()
    _extension.cuda.require()
    if not torch.cuda.is_available():
        print("sanitizer_cases: torch sees no CUDA device", file=sys.stderr)
        return 2
    torch.manual_seed(0)
    os.environ.pop(FORCE, None)
    cases = 0
    wrong = 0
    groups = (
        quantize_cases,
        dequantize_cases,
        append_cases,
        gemm_cases,
        skinny_cases,
        hopper_cases,
        linear_cases,
        attention_cases,
    )
    if arguments:
        groups = tuple(group for group in groups if group is not hopper_cases)
        os.environ["INT8_OPS_GEMM_PATH"] = "sm80"
    for group in groups:
        for what, got, expected in group():
            cases += 1
            if not same_bits(got, expected):
                wrong += 1
                print(f"differs: {what}")
    if wrong:
        print(f"{cases} cases, {wrong} differ from the reference")
        return 1
    print(f"{cases} cases, all equal to the reference")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

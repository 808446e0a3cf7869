"""The Triton kernels: quantize rows, long rows and columns; int8 matmul with its epilogue.

Imported only when Triton is there. Every kernel also runs under Triton's interpreter.
Sizes are in elements; all tensors are contiguous and row-major.
"""

# Triton's decorators and tensors carry no types that a checker could follow.
# mypy: ignore-errors

import triton
import triton.language as tl

# The bit patterns of non-negative floats order as the floats do, and infinity and the NaNs are
# the largest of them: one integer maximum finds |x|'s maximum and whether anything was not finite.
_ABS_MASK = tl.constexpr(0x7FFFFFFF)
_INF_BITS = tl.constexpr(0x7F800000)

_MIN_NORMAL_SCALE = tl.constexpr(1.1754943508222875e-38)

# v + 1.5 * 2^23 lies where floats stand one apart, so the sum is rint(v), halves to even, and its
# low byte is that integer in two's complement. |v| < 127.5 here, so no clamp is needed.
_ROUND_TO_INT = tl.constexpr(12582912.0)

# Note [Division by a row's scale]
# x / scale must be correctly rounded, and a division an element costs more than the memory traffic
# of a quantize. So: y = RN(1 / scale) once a row, and two Newton steps an element,
#   v0 = RN(x * y)                       within 1.5 ulp of x / scale
#   v1 = RN(v0 + RN(x - v0 * scale) * y) within 1 ulp
#   v  = RN(v1 + (x - v1 * scale) * y)   = RN(x / scale)
# The last line is Markstein's theorem (IBM J. Res. Dev. 34, 1990): y correctly rounded, v1 within
# 1 ulp and a residual x - v1 * scale that is exact (one FMA). The residual is a multiple of
# ulp(v1) * ulp(scale); where |v1| >= 1/4 (a smaller one rounds to q = 0 anyhow) that is at least
# 2^-25 * 2^(e - 23) for a scale in [2^e, 2^(e + 1)), representable while e >= -101. Rows of a
# smaller scale are multiplied by 2^64 first, which is exact on both sides of the division.
_TINY_SCALE = tl.constexpr(2.0**-100)
_BOOST = tl.constexpr(2.0**64)


@triton.jit
def _to_float32(x):
    """Exact. bfloat16 by its bits: the interpreter's own conversion gets subnormals wrong."""
    if x.dtype == tl.bfloat16:
        return (x.to(tl.int16, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        return x.to(tl.float32)


@triton.jit
def _round_to(y, dtype: tl.constexpr, NATIVE_BFLOAT16: tl.constexpr):
    """float32 -> dtype, to nearest even. The interpreter truncates to bfloat16, a GPU does not."""
    if dtype == tl.bfloat16 and not NATIVE_BFLOAT16:
        bits = y.to(tl.int32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        rounded = tl.where((bits & _ABS_MASK) > _INF_BITS, 0x7FC0, rounded)
        return rounded.to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        return y.to(dtype)


@triton.jit
def _magnitude_bits(x):
    return x.to(tl.int32, bitcast=True) & _ABS_MASK


@triton.jit
def _scale_of(amax_bits):
    """Bits of a line's largest magnitude -> its scale, and whether its values are to be used."""
    finite = amax_bits < _INF_BITS
    scale = tl.div_rn(amax_bits.to(tl.float32, bitcast=True), 127.0)
    usable = finite & (scale >= _MIN_NORMAL_SCALE)
    scale = tl.where(usable, scale, tl.where(finite, 1.0, float("nan")))
    return scale, usable


@triton.jit
def _quantize(x, scale, usable, FMA_DIVISION: tl.constexpr):
    """RN(x / scale) to the nearest integer, halves to even; 0 where the line is not usable."""
    scale = tl.where(usable, scale, 1.0)
    if FMA_DIVISION:
        boost = tl.where(scale < _TINY_SCALE, _BOOST, 1.0)
        scale = scale * boost
        y = tl.div_rn(1.0, scale)
        x = x * boost
        scale = tl.broadcast_to(scale, x.shape)
        y = tl.broadcast_to(y, x.shape)
        v = x * y
        v = tl.fma(tl.fma(-v, scale, x), y, v)
        v = tl.fma(tl.fma(-v, scale, x), y, v)
    else:
        v = tl.div_rn(x, tl.broadcast_to(scale, x.shape))
    q = (v + _ROUND_TO_INT).to(tl.int32, bitcast=True).to(tl.int8)
    return tl.where(usable, q, 0)


# The number of rows changes from call to call and no address depends on what divides it: one
# compiled kernel serves them all.
@triton.jit(do_not_specialize=["rows"])
def quantize_rows_kernel(
    x_ptr,
    q_ptr,
    scale_ptr,
    rows,
    cols,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    FMA_DIVISION: tl.constexpr,
):
    """A program quantizes BLOCK_ROWS whole rows, held in registers; cols <= BLOCK_COLS."""
    first_row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS
    row = tl.arange(0, BLOCK_ROWS)[:, None]
    col = tl.arange(0, BLOCK_COLS)[None, :]
    offset = row * cols + col
    row_mask = row < rows - first_row
    mask = row_mask & (col < cols)

    x = _to_float32(tl.load(x_ptr + first_row * cols + offset, mask=mask, other=0.0))
    scale, usable = _scale_of(tl.max(_magnitude_bits(x), axis=1, keep_dims=True))
    q = _quantize(x, scale, usable, FMA_DIVISION)
    tl.store(q_ptr + first_row * cols + offset, q, mask=mask)
    tl.store(scale_ptr + first_row + row, scale, mask=row_mask)


@triton.jit
def quantize_long_rows_kernel(
    x_ptr, q_ptr, scale_ptr, cols, BLOCK_COLS: tl.constexpr, FMA_DIVISION: tl.constexpr
):
    """A program quantizes one row in two passes; the second one finds the row in L2."""
    row = tl.program_id(0).to(tl.int64)
    col = tl.arange(0, BLOCK_COLS)
    x_row = x_ptr + row * cols
    q_row = q_ptr + row * cols

    bits = tl.zeros((BLOCK_COLS,), dtype=tl.int32)
    for start in range(0, cols, BLOCK_COLS):
        x = _to_float32(tl.load(x_row + start + col, mask=col < cols - start, other=0.0))
        bits = tl.maximum(bits, _magnitude_bits(x))
    scale, usable = _scale_of(tl.max(bits, axis=0))
    tl.store(scale_ptr + row, scale)

    for start in range(0, cols, BLOCK_COLS):
        mask = col < cols - start
        x = _to_float32(tl.load(x_row + start + col, mask=mask, other=0.0))
        tl.store(q_row + start + col, _quantize(x, scale, usable, FMA_DIVISION), mask=mask)


@triton.jit
def quantize_columns_kernel(
    x_ptr,
    q_ptr,
    scale_ptr,
    rows,
    cols,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    FMA_DIVISION: tl.constexpr,
):
    """A program quantizes BLOCK_COLS columns in two passes over their rows, without a transpose."""
    row = tl.arange(0, BLOCK_ROWS)[:, None]
    col = tl.program_id(0) * BLOCK_COLS + tl.arange(0, BLOCK_COLS)[None, :]
    col_mask = col < cols
    offset = tl.full((), 1, tl.int64) * row * cols + col
    # In int64: rows * cols may pass 2^31 even where a tile does not.
    step = tl.full((), BLOCK_ROWS, tl.int64) * cols

    x_tile = x_ptr + offset
    bits = tl.zeros((BLOCK_ROWS, BLOCK_COLS), dtype=tl.int32)
    for start in range(0, rows, BLOCK_ROWS):
        mask = (row < rows - start) & col_mask
        x = _to_float32(tl.load(x_tile, mask=mask, other=0.0))
        bits = tl.maximum(bits, _magnitude_bits(x))
        x_tile += step
    scale, usable = _scale_of(tl.max(bits, axis=0, keep_dims=True))
    tl.store(scale_ptr + col, scale, mask=col_mask)

    x_tile = x_ptr + offset
    q_tile = q_ptr + offset
    for start in range(0, rows, BLOCK_ROWS):
        mask = (row < rows - start) & col_mask
        x = _to_float32(tl.load(x_tile, mask=mask, other=0.0))
        tl.store(q_tile, _quantize(x, scale, usable, FMA_DIVISION), mask=mask)
        x_tile += step
        q_tile += step


@triton.jit(do_not_specialize=["m"])
def matmul_kernel(
    a_ptr,
    w_ptr,
    out_ptr,
    a_scale_ptr,
    w_scale_ptr,
    bias_ptr,
    m,
    n,
    k,
    EVEN_K: tl.constexpr,
    NATIVE_BFLOAT16: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """``a [m, k]`` times ``w [n, k]`` transposed, int8, to a BLOCK_M x BLOCK_N tile of out.

    Without ``a_scale_ptr`` the tile is the exact int32 sums. With it, the epilogue
    ``(float(acc) * a_scale) * w_scale + bias``; launch with ``enable_fp_fusion=False``, so that
    each operation rounds once.
    """
    # Grouped rasterisation: programs that run together share rows of a and rows of w in L2.
    pid = tl.program_id(0)
    m_blocks = tl.cdiv(m, BLOCK_M)
    n_blocks = tl.cdiv(n, BLOCK_N)
    group_blocks = GROUP_M * n_blocks
    first_m_block = (pid // group_blocks) * GROUP_M
    group_m = tl.minimum(m_blocks - first_m_block, GROUP_M)
    m_start = (first_m_block + (pid % group_blocks) % group_m) * BLOCK_M
    n_start = ((pid % group_blocks) // group_m) * BLOCK_N

    # The tile's corner in int64, offsets within the tile in int32: BLOCK_M * k stays below 2^31.
    # Rows past the end read the last row again (never stored) instead of carrying a mask.
    m_local = tl.arange(0, BLOCK_M)
    n_local = tl.arange(0, BLOCK_N)
    k_local = tl.arange(0, BLOCK_K)
    a_row = tl.minimum(m_local, m - 1 - m_start)
    w_row = tl.minimum(n_local, n - 1 - n_start)
    a_tile = a_ptr + m_start.to(tl.int64) * k + (a_row[:, None] * k + k_local[None, :])
    w_tile = w_ptr + n_start.to(tl.int64) * k + (w_row[:, None] * k + k_local[None, :])

    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.int32)
    for k_start in range(0, k, BLOCK_K):
        if EVEN_K:
            a = tl.load(a_tile)
            w = tl.load(w_tile)
        else:
            k_mask = (k_local < k - k_start)[None, :]
            a = tl.load(a_tile, mask=k_mask, other=0)
            w = tl.load(w_tile, mask=k_mask, other=0)
        # Both operands K-major in shared memory: what the int8 tensor cores read without a copy.
        acc = tl.dot(a, tl.trans(w), acc, out_dtype=tl.int32)
        a_tile += BLOCK_K
        w_tile += BLOCK_K

    row = m_start.to(tl.int64) + m_local
    col = n_start + n_local
    row_mask = row < m
    col_mask = col < n
    out_tile = out_ptr + row[:, None] * n + col[None, :]
    mask = row_mask[:, None] & col_mask[None, :]
    if a_scale_ptr is None:
        tl.store(out_tile, acc, mask=mask)
    else:
        a_scale = tl.load(a_scale_ptr + row, mask=row_mask, other=0.0)
        w_scale = tl.load(w_scale_ptr + col, mask=col_mask, other=0.0)
        y = (acc.to(tl.float32) * a_scale[:, None]) * w_scale[None, :]
        if bias_ptr is not None:
            bias = _to_float32(tl.load(bias_ptr + col, mask=col_mask, other=0.0))
            y = y + bias[None, :]
        tl.store(out_tile, _round_to(y, out_ptr.dtype.element_ty, NATIVE_BFLOAT16), mask=mask)

"""The Triton kernels of ``latent_attention_decode``: scores, weighted sums of latents, combination.

Imported only when Triton is there; they run under its interpreter as well. Scores go to memory (a
few numbers a token and head), so that a pass over the values' latents serves all heads of a group.
Every grid covers the cache's capacity and programs beyond a row's length leave at once: lengths are
read on the device, and one captured graph serves every step.

A slice of a latent is a launch. Of int4 slices byte j holds values j and j + rank/2: what int8 does
in one product of all of a rank, they do in two of a half.

Note [A row alone]
A query's bits depend on its row alone. Tiles and splits are counted from the row's first token and
folded in order. How many rows and queries there are must change no float operation either:
  - The kernels are launched with ``enable_fp_fusion=False``. Which products a compiler fuses with a
    sum is its choice, and another one where a size happens to be 1 or a multiple of 16.
  - Counts are not specialised: one kernel serves them all. What divides strides, widths and ranks
    is, for wide loads; it decides where a number is held, and all numbers of a loop are added where
    they are held. What is left to add after it is added in an order that the source gives
    (``_sum_of_columns``), or depends on a slice's rank alone (the combination).
  - BLOCK_M, which grows with the rows, is at most 32: a product is made of the same instructions
    then, mma.sync or FMAs, each of which adds to an element its next terms along K. From 64 rows on
    it would be wgmma.
"""

# Triton's decorators and tensors carry no types that a checker could follow.
# mypy: ignore-errors

import triton
import triton.language as tl

from .kernels import _ABS_MASK, _INF_BITS, _round_to, _to_float32

_TWO_PI = tl.constexpr(6.283185307179586)
_LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _row(start_ptr, length_ptr, b, capacity):
    """The first token of a row and the end of its tokens."""
    begin = tl.maximum(tl.load(start_ptr + b), 0)
    end = tl.minimum(tl.load(length_ptr + b), capacity)
    return begin, end


@triton.jit
def _round_to_tf32(x):
    """To the nearest number of 11 significant bits, float16's count, with float32's range."""
    bits = x.to(tl.int32, bitcast=True)
    rounded = (bits + 0x1000) & -0x2000
    # Of a NaN whose bits are all ones the sum would be a zero.
    rounded = tl.where((bits & _ABS_MASK) > _INF_BITS, bits, rounded)
    return rounded.to(tl.float32, bitcast=True)


@triton.jit
def _dot(a, b, acc, BFLOAT16: tl.constexpr, PRECISION: tl.constexpr, NATIVE_BFLOAT16: tl.constexpr):
    """float32 a times b on top of acc, the factors rounded to what q's dtype has of digits.

    bfloat16: rounded to it. The interpreter multiplies bfloat16 as if its bits were integers: there
    the rounded values are made float32 again, whose products are the same.
    float16, as PRECISION "tf32": rounded to tf32, which has float16's digits without its range. The
    tensor cores would cut off digits instead, and the errors of a sum would not cancel.
    float32, as PRECISION "ieee": not rounded; FMAs.
    Sums are float32.
    """
    if BFLOAT16:
        a = _round_to(a, tl.bfloat16, NATIVE_BFLOAT16)
        b = _round_to(b, tl.bfloat16, NATIVE_BFLOAT16)
        if not NATIVE_BFLOAT16:
            a = _to_float32(a)
            b = _to_float32(b)
        return tl.dot(a, b, acc)
    else:
        if PRECISION == "tf32":
            a = _round_to_tf32(a)
            b = _round_to_tf32(b)
        return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def _sum_of_columns(x):
    """``x [M, N]`` -> ``[M]``, from the first column to the last wherever they are held."""
    ones = tl.full((x.shape[1], 16), 1.0, dtype=tl.float32)
    # Sixteen equal columns, the fewest that a product has: the largest is any of them.
    return tl.max(tl.dot(x, ones, input_precision="ieee"), axis=1)


@triton.jit
def _reduced(position, inv_freq):
    """position * inv_freq in [0, 2 pi). In float32 a position of 100,000 would leave two digits."""
    angle = position.to(tl.float64) * inv_freq.to(tl.float64)
    return (angle - tl.floor(angle / _TWO_PI) * _TWO_PI).to(tl.float32)


@triton.jit
def offsets_kernel(inv_freq_ptr, cos_ptr, sin_ptr, BLOCK_T: tl.constexpr, HALF: tl.constexpr):
    """Cosines and sines ``[HALF, BLOCK_T]`` of the positions 0..BLOCK_T - 1, a program a row."""
    j = tl.program_id(0)
    t = tl.arange(0, BLOCK_T)
    angle = _reduced(t, tl.load(inv_freq_ptr + j))
    tl.store(cos_ptr + j * BLOCK_T + t, tl.cos(angle))
    tl.store(sin_ptr + j * BLOCK_T + t, tl.sin(angle))


@triton.jit
def _product(
    a_ptr,
    latent_ptr,
    token_stride,
    a_row_stride,
    a_first,
    a_half,
    width,
    token_mask,
    HALF: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PACKED: tl.constexpr,
):
    """Rows [0, HALF) of A from ``a_first`` on times a tile of latents: exact int32 [HALF, BLOCK_T].

    ``a_half`` is where a packed byte's upper value stands in a row of A.
    """
    t = tl.arange(0, BLOCK_T)
    r = tl.arange(0, BLOCK_K)
    row = tl.arange(0, HALF)
    acc = tl.zeros((HALF, BLOCK_T), dtype=tl.int32)
    for k in range(0, width, BLOCK_K):
        inside = r < width - k
        latent = tl.load(
            latent_ptr + t.to(tl.int64)[:, None] * token_stride + (k + r)[None, :],
            mask=token_mask[:, None] & inside[None, :],
            other=0,
        )
        a_tile = a_ptr + (a_first + row)[:, None] * a_row_stride + (k + r)[None, :]
        a = tl.load(a_tile, mask=inside[None, :], other=0)
        if PACKED:
            low = (latent << 4) >> 4
            high = latent >> 4
            a_high = tl.load(a_tile + a_half, mask=inside[None, :], other=0)
            acc = tl.dot(a, tl.trans(low), acc, out_dtype=tl.int32)
            acc = tl.dot(a_high, tl.trans(high), acc, out_dtype=tl.int32)
        else:
            acc = tl.dot(a, tl.trans(latent), acc, out_dtype=tl.int32)
    return acc


# Of no weight for a wide access: see Note [A row alone].
_COUNTS = [
    *("window", "q_batch_stride", "q_head_stride", "q_token_stride", "capacity", "kv_heads"),
    *("groups", "repeats", "q_len", "group_rows", "splits"),
]


@triton.jit(do_not_specialize=_COUNTS)
def scores_kernel(
    q_ptr,
    latent_ptr,
    scale_ptr,
    a_ptr,
    a_scale_ptr,
    bias_ptr,
    inv_freq_ptr,
    cos_ptr,
    sin_ptr,
    start_ptr,
    length_ptr,
    origin_ptr,
    scores_ptr,
    scaling,
    window,
    q_batch_stride,
    q_head_stride,
    q_token_stride,
    latent_batch_stride,
    latent_group_stride,
    latent_token_stride,
    scale_batch_stride,
    scale_group_stride,
    capacity,
    kv_heads,
    groups,
    repeats,
    q_len,
    rank,
    width,
    tokens_padded,
    ADD: tl.constexpr,
    PACKED: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BFLOAT16: tl.constexpr,
    PRECISION: tl.constexpr,
    NATIVE_BFLOAT16: tl.constexpr,
):
    """One slice's part of the scores of a KV head's queries against a tile of tokens.

    Programs: (tile, row of the batch times KV head, block of queries). With ADD on top of what an
    earlier slice left. ``scores [B, KV heads, repeats * q_len, tokens_padded]``, float32.
    """
    tile = tl.program_id(0)
    b = tl.program_id(1) // kv_heads
    head = tl.program_id(1) % kv_heads
    begin, end = _row(start_ptr, length_ptr, b, capacity)
    first = begin + tile * BLOCK_T
    seen_from = begin
    if window > 0:
        seen_from = tl.maximum(begin, end - q_len - window + 1)
    if (first >= end) | (first + BLOCK_T <= seen_from):
        return
    t = tl.arange(0, BLOCK_T)
    token_mask = t < end - first
    group = head // (kv_heads // groups)
    rows = repeats * q_len

    # The queries, turned by -(the position of the tile's first token).
    j = tl.arange(0, HALF)
    position = first - begin
    if origin_ptr is not None:
        position = first + tl.load(origin_ptr + b)
    angle = _reduced(position, tl.load(inv_freq_ptr + j))
    base_cos = tl.cos(angle)[None, :]
    base_sin = tl.sin(angle)[None, :]
    m = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
    m_mask = m < rows
    q_row = (
        b.to(tl.int64) * q_batch_stride
        + (head * repeats + m // q_len).to(tl.int64) * q_head_stride
        + (m % q_len).to(tl.int64) * q_token_stride
    )
    q_tile = q_ptr + q_row[:, None] + j[None, :]
    one = _to_float32(tl.load(q_tile, mask=m_mask[:, None], other=0.0)) * scaling
    two = _to_float32(tl.load(q_tile + HALF, mask=m_mask[:, None], other=0.0)) * scaling
    turned_one = one * base_cos + two * base_sin
    turned_two = two * base_cos - one * base_sin

    # The keys of the tile, turned by their offsets.
    latents = (
        latent_ptr
        + b.to(tl.int64) * latent_batch_stride
        + group.to(tl.int64) * latent_group_stride
        + first.to(tl.int64) * latent_token_stride
    )
    a_first = head * 2 * HALF
    a_head = a_ptr + a_first.to(tl.int64) * rank
    k_one = _product(
        a_head, latents, latent_token_stride, rank, 0, width, width, token_mask,
        HALF, BLOCK_T, BLOCK_K, PACKED,
    ).to(tl.float32)  # fmt: skip
    k_two = _product(
        a_head, latents, latent_token_stride, rank, HALF, width, width, token_mask,
        HALF, BLOCK_T, BLOCK_K, PACKED,
    ).to(tl.float32)  # fmt: skip
    offsets = j[:, None] * BLOCK_T + t[None, :]
    c = tl.load(cos_ptr + offsets)
    s = tl.load(sin_ptr + offsets)
    rotated_one = k_one * c - k_two * s
    rotated_two = k_two * c + k_one * s

    # Integers are rotated before their scales apply: the two of a pair must be one.
    a_scale = tl.load(a_scale_ptr + a_first + j)
    same = a_scale == tl.load(a_scale_ptr + a_first + HALF + j)
    a_scale = tl.where(same, a_scale, float("nan"))[None, :]
    folded_one = turned_one * a_scale
    folded_two = turned_two * a_scale
    score = tl.zeros((BLOCK_M, BLOCK_T), dtype=tl.float32)
    score = _dot(folded_one, rotated_one, score, BFLOAT16, PRECISION, NATIVE_BFLOAT16)
    score = _dot(folded_two, rotated_two, score, BFLOAT16, PRECISION, NATIVE_BFLOAT16)
    token_scale = tl.load(
        scale_ptr
        + b.to(tl.int64) * scale_batch_stride
        + group.to(tl.int64) * scale_group_stride
        + first
        + t,
        mask=token_mask,
        other=0.0,
    )
    score = score * token_scale[None, :]
    if bias_ptr is not None:
        bias_one = _to_float32(tl.load(bias_ptr + a_first + j))[None, :]
        bias_two = _to_float32(tl.load(bias_ptr + a_first + HALF + j))[None, :]
        with_cos = turned_one * bias_one + turned_two * bias_two
        with_sin = turned_two * bias_one - turned_one * bias_two
        score = tl.dot(with_cos, c, score, input_precision="ieee")
        score = tl.dot(with_sin, s, score, input_precision="ieee")
    out = (
        scores_ptr
        + (tl.program_id(1).to(tl.int64) * rows + m)[:, None] * tokens_padded
        + (tile * BLOCK_T + t)[None, :]
    )
    mask = m_mask[:, None] & token_mask[None, :]
    if ADD:
        score = score + tl.load(out, mask=mask, other=0.0)
    tl.store(out, score, mask=mask)


@triton.jit
def _load_scores(scores_ptr, row, row_mask, tokens_padded, first, begin, own, window, t):
    """Scores of a block of query rows against tokens, -inf for what a query doesn't see."""
    token = first + t
    seen = row_mask[:, None] & (token[None, :] >= begin) & (token[None, :] <= own[:, None])
    if window > 0:
        seen = seen & (token[None, :] > own[:, None] - window)
    score = tl.load(
        scores_ptr + row.to(tl.int64)[:, None] * tokens_padded + (token - begin)[None, :],
        mask=seen,
        other=float("-inf"),
    )
    return score, seen


@triton.jit(do_not_specialize=_COUNTS)
def sums_kernel(
    scores_ptr,
    latent_ptr,
    scale_ptr,
    start_ptr,
    length_ptr,
    sums_ptr,
    most_ptr,
    total_ptr,
    window,
    latent_batch_stride,
    latent_group_stride,
    latent_token_stride,
    scale_batch_stride,
    scale_group_stride,
    capacity,
    groups,
    group_rows,
    q_len,
    width,
    tokens_padded,
    splits,
    columns,
    column,
    PACKED: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BFLOAT16: tl.constexpr,
    PRECISION: tl.constexpr,
    NATIVE_BFLOAT16: tl.constexpr,
):
    """Exponentials against a split's own maximum, times one slice's latents, summed over the split.

    Programs: (split, row of the batch times group times block of queries, block of the latent).
    ``sums [B * groups, splits, group_rows, columns]``: this slice's start at ``column``.
    """
    split = tl.program_id(0)
    row_blocks = tl.cdiv(group_rows, BLOCK_M)
    bg = tl.program_id(1) // row_blocks
    b = bg // groups
    begin, end = _row(start_ptr, length_ptr, b, capacity)
    first = begin + split * SPLIT
    if first >= end:
        return
    last = tl.minimum(first + SPLIT, end)
    m = (tl.program_id(1) % row_blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
    m_mask = m < group_rows
    own = end - q_len + m % q_len
    row = bg * group_rows + m
    t = tl.arange(0, BLOCK_T)
    # Loops carry a number an element and reduce it at their end: a reduction that a loop carries,
    # used in two places after it, does not compile in Triton 3.6.
    most = tl.full((BLOCK_M, BLOCK_T), float("-inf"), dtype=tl.float32)
    for at in range(0, SPLIT, BLOCK_T):
        score, _ = _load_scores(
            scores_ptr, row, m_mask, tokens_padded, first + at, begin, own, window, t
        )
        most = tl.maximum(most, score)
    most = tl.max(most, axis=1)
    # Finite, so that a query which sees nothing here has exp(-inf) = 0 and no NaN.
    base = tl.where(most == float("-inf"), 0.0, most)

    r = tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R)
    r_mask = r < width
    latents = (
        latent_ptr
        + b.to(tl.int64) * latent_batch_stride
        + (bg % groups).to(tl.int64) * latent_group_stride
    )
    scales = (
        scale_ptr
        + b.to(tl.int64) * scale_batch_stride
        + (bg % groups).to(tl.int64) * scale_group_stride
    )
    acc = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
    acc_high = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
    total = tl.zeros((BLOCK_M, BLOCK_T), dtype=tl.float32)
    for at in range(0, SPLIT, BLOCK_T):
        token = first + at + t
        token_mask = token < last
        score, seen = _load_scores(
            scores_ptr, row, m_mask, tokens_padded, first + at, begin, own, window, t
        )
        weight = tl.exp2((score - base[:, None]) * _LOG2_E)
        total += weight
        token_scale = tl.load(scales + token, mask=token_mask, other=0.0)
        # Chosen, not multiplied by 0: the scale of what isn't seen may be NaN.
        weight = tl.where(seen, weight * token_scale[None, :], 0.0)
        latent = tl.load(
            latents + token.to(tl.int64)[:, None] * latent_token_stride + r[None, :],
            mask=token_mask[:, None] & r_mask[None, :],
            other=0,
        )
        if PACKED:
            high = (latent >> 4).to(tl.float32)
            low = ((latent << 4) >> 4).to(tl.float32)
        else:
            low = latent.to(tl.float32)
        acc = _dot(weight, low, acc, BFLOAT16, PRECISION, NATIVE_BFLOAT16)
        if PACKED:
            acc_high = _dot(weight, high, acc_high, BFLOAT16, PRECISION, NATIVE_BFLOAT16)
    out_row = (bg * splits + split).to(tl.int64) * group_rows + m
    out = sums_ptr + out_row[:, None] * columns + (column + r)[None, :]
    mask = m_mask[:, None] & r_mask[None, :]
    tl.store(out, acc, mask=mask)
    if PACKED:
        tl.store(out + width, acc_high, mask=mask)
    if (tl.program_id(2) == 0) & (column == 0):
        tl.store(most_ptr + out_row, most, mask=m_mask)
        tl.store(total_ptr + out_row, _sum_of_columns(total), mask=m_mask)


@triton.jit(do_not_specialize=_COUNTS)
def combine_kernel(
    sums_ptr,
    most_ptr,
    total_ptr,
    a_ptr,
    a_scale_ptr,
    bias_ptr,
    start_ptr,
    length_ptr,
    y_ptr,
    out_ptr,
    capacity,
    kv_heads,
    groups,
    repeats,
    q_len,
    rank,
    splits,
    columns,
    column,
    ADD: tl.constexpr,
    LAST: tl.constexpr,
    SPLIT: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    NATIVE_BFLOAT16: tl.constexpr,
):
    """Folds a query's splits in order and applies one slice of the values' A.

    Programs: (row of the batch times KV head, query of the head). Parts of all slices but the last
    wait in ``y``, float32 of out's shape ``[B, q_len, heads, SIZE]``.
    """
    b = tl.program_id(0) // kv_heads
    head = tl.program_id(0) % kv_heads
    row = tl.program_id(1)
    group_heads = kv_heads // groups
    group_rows = group_heads * repeats * q_len
    group = b * groups + head // group_heads
    group_row = (head % group_heads) * repeats * q_len + row
    begin, end = _row(start_ptr, length_ptr, b, capacity)
    used = tl.cdiv(tl.maximum(end - begin, 0), SPLIT)
    at = group.to(tl.int64) * splits * group_rows + group_row
    most = tl.full((), float("-inf"), dtype=tl.float32)
    for i in range(used):
        most = tl.maximum(most, tl.load(most_ptr + at + i * group_rows))
    base = tl.where(most == float("-inf"), 0.0, most)
    n = tl.arange(0, SIZE)
    r = tl.arange(0, BLOCK_R)
    products = tl.zeros((SIZE, BLOCK_R), dtype=tl.float32)
    total = tl.zeros((), dtype=tl.float32)
    for i in range(used):
        factor = tl.exp2((tl.load(most_ptr + at + i * group_rows) - base) * _LOG2_E)
        total += factor * tl.load(total_ptr + at + i * group_rows)
    for k in range(0, rank, BLOCK_R):
        r_mask = r < rank - k
        acc = tl.zeros((BLOCK_R,), dtype=tl.float32)
        for i in range(used):
            factor = tl.exp2((tl.load(most_ptr + at + i * group_rows) - base) * _LOG2_E)
            part = sums_ptr + (at + i * group_rows) * columns + column + k + r
            acc += factor * tl.load(part, mask=r_mask, other=0.0)
        a = tl.load(
            a_ptr + (head * SIZE + n).to(tl.int64)[:, None] * rank + (k + r)[None, :],
            mask=r_mask[None, :],
            other=0,
        )
        products += a.to(tl.float32) * acc[None, :]
    y = tl.sum(products, axis=1) * tl.load(a_scale_ptr + head * SIZE + n)
    # NaN is not 0: it passes through the division.
    y = tl.where(total == 0.0, 0.0, y / tl.where(total == 0.0, 1.0, total))
    heads = kv_heads * repeats
    out_row = (b * q_len + row % q_len) * heads + head * repeats + row // q_len
    out = out_row.to(tl.int64) * SIZE + n
    if ADD:
        y = y + tl.load(y_ptr + out)
    if LAST:
        if bias_ptr is not None:
            bias = _to_float32(tl.load(bias_ptr + head * SIZE + n))
            y = tl.where(total == 0.0, y, y + bias)
        tl.store(out_ptr + out, _round_to(y, out_ptr.dtype.element_ty, NATIVE_BFLOAT16))
    else:
        tl.store(y_ptr + out, y)

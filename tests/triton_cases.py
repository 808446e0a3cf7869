"""The cases of the Triton backend, for a CUDA device and for Triton's interpreter alike.

The interpreter has to be chosen before Triton is imported, so test_triton.py runs this file in a
process of its own: ``TRITON_INTERPRET=1 python triton_cases.py CASE``. With a GPU it calls the same
functions on CUDA tensors. Every comparison is for equal bits, all NaNs being one value.
"""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from torch import Tensor

from int8_ops import reference
from int8_ops.backends import triton as backend
from int8_ops.backends.triton import configs

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
INT_VIEW = {torch.float32: torch.int32, torch.float16: torch.int16, torch.bfloat16: torch.int16}


def assert_same(got: Tensor, want: Tensor, what: object = "") -> None:
    """Equal dtype, shape and bits, but for the payload of NaNs."""
    assert got.dtype == want.dtype, (what, got.dtype, want.dtype)
    assert got.shape == want.shape, (what, got.shape, want.shape)
    if got.dtype in FLOATS:
        assert torch.equal(got.isnan(), want.isnan()), f"{what}: NaNs elsewhere"
        got, want = (t.masked_fill(t.isnan(), 0).view(INT_VIEW[t.dtype]) for t in (got, want))
    differ = got != want
    count = int(differ.sum())
    assert count == 0, f"{what}: {count} of {got.numel()} differ, first {differ.nonzero()[0]}"


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def int8(shape: tuple[int, ...], rng: torch.Generator, device: torch.device) -> Tensor:
    """All int8 values, -128 included."""
    return torch.randint(-128, 128, shape, generator=rng, dtype=torch.int8).to(device)


def check_quantize(x: Tensor) -> None:
    for got, want in zip(
        backend.quantize_per_token(x), reference.quantize_per_token(x), strict=True
    ):
        assert_same(got, want, ("per token", x.shape, x.dtype))
    if x.dim() == 2:
        for axis in (0, 1, -1, -2):
            for got, want in zip(
                backend.quantize_per_channel(x, axis),
                reference.quantize_per_channel(x, axis),
                strict=True,
            ):
                assert_same(got, want, ("per channel", axis, x.shape, x.dtype))


def check_matmul(
    lead: tuple[int, ...],
    n: int,
    k: int,
    seed: int,
    device: torch.device,
    out_dtype: torch.dtype = torch.bfloat16,
    bias_dtype: torch.dtype | None = torch.float32,
) -> None:
    rng = generator(seed)
    what = (lead, n, k, out_dtype, bias_dtype)
    a = int8((*lead, k), rng, device)
    w = int8((n, k), rng, device)
    a_scale = (torch.rand((*lead, 1), generator=rng) * 0.1).to(device)
    w_scale = (torch.rand((n, 1), generator=rng) * 0.1).to(device)
    bias = None
    if bias_dtype is not None:
        bias = torch.randn(n, generator=rng).to(device, bias_dtype)
    assert_same(backend.int8_mm(a, w), reference.int8_mm(a, w), what)
    got = backend.int8_scaled_mm(a, w, a_scale, w_scale, bias, out_dtype)
    want = reference.int8_scaled_mm(a, w, a_scale, w_scale, bias, out_dtype)
    assert_same(got, want, what)
    x = torch.randn((*lead, k), generator=rng).to(device, out_dtype)
    assert_same(
        backend.int8_linear(x, w, w_scale, bias),
        reference.int8_linear(x, w, w_scale, bias),
        what,
    )


def regular(device: torch.device) -> None:
    for seed, dtype in enumerate(FLOATS):
        for shape in ((4, 16), (2, 3, 64), (33, 128), (8, 1024), (128,)):
            check_quantize(torch.randn(shape, generator=generator(seed)).to(device, dtype))
        for bias_dtype in (None, *FLOATS):
            check_matmul((32,), 64, 128, seed, device, dtype, bias_dtype)
    check_matmul((2, 3, 24), 96, 64, 7, device)
    # Several groups of the rasterisation, the last one short.
    check_matmul((19 * 16,), 160, 32, 8, device)


def tails(device: torch.device) -> None:
    for seed, (m, n, k) in enumerate(
        [(1, 1, 1), (3, 5, 7), (17, 33, 65), (31, 130, 257), (70, 40, 31), (5, 64, 100)]
    ):
        check_matmul((m,), n, k, seed, device)
        check_quantize(torch.randn((m, k), generator=generator(seed)).to(device, torch.bfloat16))
    check_quantize(torch.randn((130, 67), generator=generator(9)).to(device))


def small_m(device: torch.device) -> None:
    for m in range(18):
        check_matmul((m,), 40, 48, m, device, torch.float16, None)
    check_matmul((), 40, 48, 18, device)
    check_matmul((4,), 0, 48, 19, device)
    check_matmul((2, 0), 8, 16, 20, device)
    empty = torch.empty((2, 0, 16), device=device)
    for got, want in zip(
        backend.quantize_per_token(empty), reference.quantize_per_token(empty), strict=True
    ):
        assert_same(got, want)
    # A column without rows is a zero column.
    assert_same(backend.quantize_per_channel(empty[0], 1)[1], torch.ones((1, 16), device=device))


def extremes(device: torch.device) -> None:
    inf, nan = float("inf"), float("nan")
    for dtype in FLOATS:
        info = torch.finfo(dtype)
        subnormal = info.smallest_normal * info.eps
        x = torch.randn((12, 40), generator=generator(0)).to(device, dtype)
        x[0] = 0
        x[1, 3] = nan
        x[2, 5] = inf
        x[3, 39] = -inf
        x[4, :] = subnormal
        x[5] = x[5].sign() * info.max
        x[6, 0] = info.smallest_normal
        x[6, 1:] = 0
        x[7, 1:] = 0
        x[8, :8] = torch.tensor([inf, nan, -inf, 0, 1, -1, subnormal, info.max])
        x[9] = -0.0
        check_quantize(x)
        rng = generator(1)
        w, w_scale = int8((24, 40), rng, device), torch.rand((24, 1), generator=rng).to(device)
        y = backend.int8_linear(x, w, w_scale, None)
        assert_same(y, reference.int8_linear(x, w, w_scale, None), dtype)
        bad_rows = y.isnan().any(-1).nonzero().flatten().tolist()
        assert bad_rows == [1, 2, 3, 8], "a NaN row touches itself alone"
    # float32 scales on both sides of the smallest normal one, where a scale becomes 1.
    tiny = torch.finfo(torch.float32).smallest_normal
    steps = torch.arange(-4, 5, dtype=torch.float64) * 2.0**-24
    x = ((1 + steps) * tiny * 127).to(torch.float32).reshape(-1, 1) * torch.linspace(-1, 1, 33)
    check_quantize(x.to(device))

    # Sums at the ends of int32; the largest K there is.
    for k in (512, reference.MAX_K):
        a = torch.full((2, k), -128, dtype=torch.int8, device=device)
        w = torch.full((3, k), -128, dtype=torch.int8, device=device)
        w[1] = 127
        assert_same(backend.int8_mm(a, w), reference.int8_mm(a, w), k)
        assert int(backend.int8_mm(a, w)[0, 0]) == 2**14 * k

    # Results that overflow the output, scales that are not finite.
    a, w = int8((5, 64), generator(2), device), int8((7, 64), generator(3), device)
    a_scale = torch.tensor([1e30, 1e-30, inf, nan, 1.0], device=device).reshape(5, 1)
    w_scale = torch.tensor([1e30, 1e-38, 1.0, inf, 0.0, nan, 1e3], device=device).reshape(7, 1)
    for dtype in FLOATS:
        got = backend.int8_scaled_mm(a, w, a_scale, w_scale, None, dtype)
        assert_same(got, reference.int8_scaled_mm(a, w, a_scale, w_scale, None, dtype), dtype)


def ties(device: torch.device) -> None:
    """Quotients on a half and a unit in the last place beside it."""
    for dtype in FLOATS:
        rng = generator(4)
        amax = (torch.rand((24, 1), generator=rng) + 0.5) * 2.0 ** torch.randint(
            -12, 12, (24, 1), generator=rng
        )
        amax = amax.to(dtype).to(torch.float32)
        halves = torch.arange(-126.5, 127.0) * (amax / 127)
        x = torch.cat([amax, halves, halves], 1).to(dtype)
        bits = x.view(INT_VIEW[dtype])
        bits[:, 255:] += torch.randint(-1, 2, bits[:, 255:].shape, generator=rng, dtype=bits.dtype)
        check_quantize(x.to(device))
    # Powers of two: amax = 127 * 2^e makes every half an exact one.
    x = torch.cat([torch.tensor([127.0]), torch.arange(-126.5, 127.0)])
    check_quantize(torch.stack([x * 2.0**e for e in (-140, -126, -103, -100, 0, 100)]).to(device))


def long_rows(device: torch.device) -> None:
    cols = configs.MAX_ROW_IN_REGISTERS
    for width in (cols - 1, cols, cols + 1, cols + 4097):
        x = torch.randn((2, width), generator=generator(width)).to(device, torch.float16)
        x[1, -1] = float("nan")
        for got, want in zip(
            backend.quantize_per_token(x), reference.quantize_per_token(x), strict=True
        ):
            assert_same(got, want, width)


def layout(device: torch.device) -> None:
    rng = generator(5)
    x = torch.randn((48, 20), generator=rng).to(device)
    w = int8((2 * 24, 48), rng, device)[::2]
    w_scale = torch.rand((1, 24), generator=rng).to(device).t()
    bias = torch.randn(48, generator=rng).to(device)[::2]
    assert not x.t().is_contiguous()
    check_quantize(x.t())
    check_quantize(x[:, ::3])
    check_quantize(x[:1].expand(4, 20))
    y = backend.int8_linear(x.t(), w, w_scale, bias)
    assert_same(y, reference.int8_linear(x.t(), w, w_scale, bias))
    q, scale = reference.quantize_per_token(x.t())
    q_t = q.t().contiguous().t()
    assert_same(backend.int8_mm(q_t, w), reference.int8_mm(q, w))
    got = backend.int8_scaled_mm(q_t, w, scale.expand(20, 2)[:, 1:], w_scale, bias, torch.float16)
    assert_same(got, reference.int8_scaled_mm(q, w, scale, w_scale, bias, torch.float16))


def errors(device: torch.device) -> None:
    def float_of(*shape: int) -> Tensor:
        return torch.zeros(shape, device=device)

    def int8_of(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.int8, device=device)

    def scaled(**changed: object) -> None:
        arguments = {
            "a": int8_of(2, 8),
            "w": int8_of(4, 8),
            "a_scale": float_of(2, 1),
            "w_scale": float_of(4, 1),
            "bias": float_of(4),
            "out_dtype": torch.float16,
        }
        backend.int8_scaled_mm(**{**arguments, **changed})

    k = reference.MAX_K + 1
    for call, message in (
        (lambda: backend.quantize_per_token(int8_of(2, 8)), "float16 or bfloat16, got torch.int8"),
        (lambda: backend.quantize_per_token(float_of(2, 0)), r"at least 1, got \[2, 0\]"),
        (lambda: backend.quantize_per_token(float_of()), r"at least 1, got \[\]"),
        (lambda: backend.quantize_per_channel(float_of(8)), r"shape \[N, K\], got \[8\]"),
        (lambda: backend.quantize_per_channel(float_of(2, 8), 2), r"axis 0 or 1 .*, got 2"),
        (lambda: backend.quantize_per_channel(int8_of(2, 8)), "got torch.int8"),
        (lambda: backend.int8_mm(float_of(2, 8), int8_of(4, 8)), "int8, got torch.float32"),
        (lambda: backend.int8_mm(int8_of(2, 8), float_of(4, 8)), "expected w .*torch.float32"),
        (lambda: backend.int8_mm(int8_of(2, 8), int8_of(4, 9)), r"got a \[2, 8\] and w \[4, 9\]"),
        (lambda: backend.int8_mm(int8_of(2, 8), int8_of(8)), r"shape \[N, K\], got \[8\]"),
        (lambda: backend.int8_mm(int8_of(1, k), int8_of(1, k)), "K = 131072 is over the limit"),
        (
            lambda: backend.int8_mm(int8_of(2, 8), int8_of(4, 8).to("meta")),
            "expected w on .*, got meta",
        ),
        (lambda: scaled(a_scale=float_of(2)), r"a_scale of shape \[2, 1\], got \[2\]"),
        (lambda: scaled(a_scale=float_of(2, 1).half()), "a_scale of dtype torch.float32"),
        (lambda: scaled(w_scale=float_of(1, 4)), r"w_scale of shape \[4, 1\], got \[1, 4\]"),
        (lambda: scaled(w_scale=float_of(4, 1).double()), "got torch.float64"),
        (lambda: scaled(bias=float_of(5)), r"bias of shape \[4\], got \[5\]"),
        (lambda: scaled(bias=int8_of(4)), "expected bias of dtype"),
        (lambda: scaled(out_dtype=torch.int32), "out_dtype .*got torch.int32"),
        (
            lambda: backend.int8_linear(int8_of(2, 8), int8_of(4, 8), float_of(4, 1), None),
            "expected x of dtype",
        ),
    ):
        with pytest.raises(RuntimeError, match=message):
            call()


def compiled(device: torch.device) -> None:
    """Every function under torch.compile with one graph, and torch's own checks of the ops."""
    rng = generator(6)
    x = torch.randn((6, 32), generator=rng).to(device)
    w, w_scale = int8((16, 32), rng, device), torch.rand((16, 1), generator=rng).to(device)
    q, scale = reference.quantize_per_token(x)
    compiler = "inductor" if device.type == "cuda" else "aot_eager"
    for function, arguments in (
        ("quantize_per_token", (x,)),
        ("quantize_per_channel", (x, 1)),
        ("int8_mm", (q, w)),
        ("int8_scaled_mm", (q, w, scale, w_scale, None, torch.bfloat16)),
        ("int8_linear", (x, w, w_scale, None, torch.float16)),
    ):
        traced = torch.compile(getattr(backend, function), fullgraph=True, backend=compiler)
        got, want = traced(*arguments), getattr(reference, function)(*arguments)
        pairs = [(got, want)] if isinstance(got, Tensor) else zip(got, want, strict=True)
        for got_one, want_one in pairs:
            assert_same(got_one, want_one, function)
        torch.library.opcheck(getattr(torch.ops.int8_ops_triton, function), arguments)


def random_problems(device: torch.device, count: int) -> None:
    rng = generator(2024)

    def pick(*values: int) -> int:
        return values[int(torch.randint(len(values), (), generator=rng))]

    for _ in range(count):
        m, n, k = (pick(1, 2, 7, 16, 33, 64, 100, 128) for _ in range(3))
        dtype = FLOATS[pick(0, 1, 2)]
        bias_dtype = (None, *FLOATS)[pick(0, 1, 2, 3)]
        check_matmul(
            (m,), n, k, int(torch.randint(2**31, (), generator=rng)), device, dtype, bias_dtype
        )
        x = torch.randn((m, k), generator=rng) * 2.0 ** pick(-30, -10, 0, 10)
        x[pick(0, m // 2, m - 1), k // 2] = (0.0, float("nan"), float("inf"))[pick(0, 0, 0, 1, 2)]
        check_quantize(x.to(device, dtype))


def random_few(device: torch.device) -> None:
    random_problems(device, 30)


def exact_fma(x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
    """float32 x * y + z, rounded once: the sum in float64 is rounded to odd, then to float32.

    Boldo and Melquiond, IEEE Trans. Computers 57, 2008.
    """
    product = x.astype(np.float64) * y.astype(np.float64)  # exact: 48 bits
    z = z.astype(np.float64)
    total = product + z
    virtual = total - product
    error = (product - (total - virtual)) + (z - virtual)
    inexact_even = (error != 0) & (total.view(np.int64) & 1 == 0)
    toward = np.where(error > 0, np.inf, -np.inf)
    return np.where(inexact_even, np.nextafter(total, toward), total).astype(np.float32)


def fma_division(device: torch.device) -> None:
    """The division that a GPU runs (one reciprocal a row, FMAs), with FMAs that round once."""
    from triton.runtime import interpreter

    from int8_ops.backends.triton import launch

    def create_fma(_: object, x: object, y: object, z: object) -> object:
        data = exact_fma(*np.broadcast_arrays(x.data, y.data, z.data))
        return interpreter.TensorHandle(data, x.dtype)

    interpreter.InterpreterBuilder.create_fma = create_fma
    launch.FMA_DIVISION = True
    ties(device)
    extremes(device)
    for exponent in (-118, -100, -99, -40, 0, 60, 120):
        x = torch.randn((64, 512), generator=generator(exponent + 200)) * 2.0**exponent
        check_quantize(x.to(device))


CASES = {
    case.__name__: case
    for case in (
        regular,
        tails,
        small_m,
        extremes,
        ties,
        long_rows,
        layout,
        errors,
        compiled,
        random_few,
    )
}
INTERPRETER_CASES = {**CASES, "fma_division": fma_division}

if __name__ == "__main__":
    INTERPRETER_CASES[sys.argv[1]](torch.device("cpu"))
    print("passed", sys.argv[1])

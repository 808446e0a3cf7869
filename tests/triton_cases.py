"""What the Triton backend is tried on beyond cases.py, on a CUDA device and in the interpreter.

The interpreter has to be chosen before Triton is imported, so test_triton.py runs this file in a
process of its own: ``TRITON_INTERPRET=1 python triton_cases.py RESULT.json``. With a GPU it calls
the same functions on CUDA tensors.
"""

from __future__ import annotations

import functools
import json
import sys
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import cases
import latent_attention_cases as attention
import numpy as np
import pytest
import torch
from latent_attention_cases import Problem
from torch import Tensor

from int8_ops import backends, reference
from int8_ops.backends import triton as backend
from int8_ops.backends.triton import configs

FLOATS = cases.DTYPES
INT_VIEW = {torch.float32: torch.int32, torch.float16: torch.int16, torch.bfloat16: torch.int16}


def assert_same(got: Tensor, want: Tensor, what: object = "") -> None:
    assert cases.same_bits(got, want.cpu()), f"{what}: got\n{got}\nexpected\n{want}"


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def int8(shape: tuple[int, ...], rng: torch.Generator, device: torch.device) -> Tensor:
    """All int8 values, -128 included."""
    return torch.randint(-128, 128, shape, generator=rng, dtype=torch.int8).to(device)


def check_quantize(x: Tensor) -> None:
    pairs = [(backend.quantize_per_token(x), reference.quantize_per_token(x))]
    if x.dim() == 2:
        for axis in (0, 1, -1, -2):
            got = backend.quantize_per_channel(x, axis)
            pairs.append((got, reference.quantize_per_channel(x, axis)))
    for got, want in pairs:
        assert_same(got[1], want[1], ("scale", x.shape, x.dtype))
        assert_same(got[0], want[0], ("q", x.shape, x.dtype))


def check_linear(m: int, n: int, k: int, seed: int, device: torch.device) -> None:
    rng = generator(seed)
    case = cases.make("linear", (m,), k, n, torch.bfloat16, rng, torch.float32)
    cases.check(backend, case, device)


def affordable(case: cases.Case, device: torch.device) -> bool:
    """On a GPU, every case; the interpreter needs a minute for each of the largest."""
    return device.type == "cuda" or (case.w.numel() <= 1 << 17 and case.x.numel() <= 1 << 15)


def named(category: str, device: torch.device) -> None:
    chosen = [case for case in cases.NAMED[category]() if affordable(case, device)]
    assert chosen
    for case in chosen:
        cases.check(backend, case, device)


def raster(device: torch.device) -> None:
    """Several groups of the rasterisation, the last one short, and tiles cut on both sides."""
    check_linear(19 * 16 + 3, 161, 32, 8, device)


def extremes_more(device: torch.device) -> None:
    """Scales around the smallest normal float32, results past the output's range."""
    inf, nan = float("inf"), float("nan")
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
    # The second range has scales near the smallest normal float32, where residuals underflow.
    ranges = [(dtype, -12, 12) for dtype in FLOATS] + [(torch.float32, -118, -104)]
    for dtype, lowest, highest in ranges:
        rng = generator(4)
        exponents = torch.randint(lowest, highest, (32, 1), generator=rng)
        amax = (torch.rand((32, 1), generator=rng) + 0.5) * 2.0**exponents
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
        (lambda: backend.quantize_per_token(int8_of(2, 8)), "BFloat16, got torch.int8"),
        (lambda: backend.quantize_per_token(float_of(2, 0)), r"at least 1, got \[2, 0\]"),
        (lambda: backend.quantize_per_token(float_of()), "at least 1 dimension, got a scalar"),
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
            "two different devices: w on meta",
        ),
        (lambda: scaled(a_scale=float_of(2)), r"got a_scale \[2\] for a \[2, 8\]"),
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
    """Through the package's entry points, as one graph and as torch.library wants its ops."""
    rng = generator(6)
    x = torch.randn((6, 32), generator=rng).to(device)
    w, w_scale = int8((16, 32), rng, device), torch.rand((16, 1), generator=rng).to(device)
    q, scale = reference.quantize_per_token(x)
    compiler = "inductor" if device.type == "cuda" else "aot_eager"
    for function, arguments in (
        ("quantize_per_token", (x,)),
        ("quantize_per_channel", (x, 1)),
        ("int8_scaled_mm", (q, w, scale, w_scale, None, torch.bfloat16)),
        ("int8_linear", (x, w, w_scale, None, torch.float16)),
    ):
        entry = functools.partial(getattr(backends, function), backend="triton")
        traced = torch.compile(entry, fullgraph=True, dynamic=True, backend=compiler)
        got, want = traced(*arguments), getattr(reference, function)(*arguments)
        pairs = [(got, want)] if isinstance(got, Tensor) else zip(got, want, strict=True)
        for got_one, want_one in pairs:
            assert_same(got_one, want_one, function)
        op = getattr(torch.ops.int8_ops, f"{function}_via")
        torch.library.opcheck(op, (*arguments, "triton"))


def random_few(device: torch.device) -> None:
    for case in cases.random_cases(50, seed=77):
        if affordable(case, device):
            cases.check(backend, case, device)


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
    extremes_more(device)
    named("extremes", device)
    for exponent in (-118, -100, -99, -40, 0, 60, 120):
        x = torch.randn((64, 512), generator=generator(exponent + 200)) * 2.0**exponent
        check_quantize(x.to(device))


# A GPU compiles kernels for nearly every problem: several workers share them.
ATTENTION_NAMED = list(attention.named())
ATTENTION_SEEDS = range(31, 35)
RANDOM_PER_SEED = 10


def latent_attention(problems: Callable[[], list[Problem]], device: torch.device) -> None:
    for problem in problems():
        if device.type == "cpu" and problem.q.numel() * problem.k.q[0].shape[2] > 1 << 19:
            continue  # the interpreter needs minutes for it
        here = problem.map(lambda t: t.to(device))
        got = backend.latent_attention_decode(*here.arguments).cpu()
        found = attention.outcome(got, problem)
        assert found is None, found


def attention_named(category: str) -> list[Problem]:
    """But for heads of sizes that the kernels don't take."""
    return [p for p in attention.named()[category] if p.q.shape[3] in backend.HEAD_SIZES]


def attention_random(seed: int) -> list[Problem]:
    """With heads of sizes that the kernels take."""
    make = attention.Maker(seed)
    return [make.random(f"random {i}", sizes=(32, 64, 128)) for i in range(RANDOM_PER_SEED)]


def attention_cases() -> dict[str, Callable[[torch.device], None]]:
    problems = {
        **{name: functools.partial(attention_named, name) for name in ATTENTION_NAMED},
        **{f"random {seed}": functools.partial(attention_random, seed) for seed in ATTENTION_SEEDS},
    }
    return {
        f"latent_attention {name}": functools.partial(latent_attention, make)
        for name, make in problems.items()
    }


def latent_attention_alone(device: torch.device) -> None:
    """A row has the same bits alone, and a query those it has without the others."""
    make = attention.Maker(32)
    problem = make.problem(
        "alone", 3, 1, 2, 2, 64, 3, 600, [(8, 32), (4, 32)], [(4, 64)], starts=[0, 5, 90],
        lengths=[600, 300, 97], v_bias=torch.float32,
    )  # fmt: skip
    here = problem.map(lambda t: t.to(device))
    whole = backend.latent_attention_decode(*here.arguments)
    for b in range(3):
        row = here.rows(slice(b, b + 1))
        assert_same(backend.latent_attention_decode(*row.arguments), whole[b : b + 1].cpu(), b)
        one = replace(row, q=row.q[:, :, :1], length=row.length - 2)
        got = backend.latent_attention_decode(*one.arguments)
        if device.type == "cuda":  # the interpreter's products depend on a row's place in a tile
            assert_same(got, whole[b : b + 1, :1].cpu(), b)
        assert torch.allclose(got, whole[b : b + 1, :1], rtol=1e-4, atol=1e-5)


def latent_attention_unequal_pairs(device: torch.device) -> None:
    """Scales of the keys' A that differ within a RoPE pair: NaN for their head."""
    for dtype in FLOATS:
        problem = attention.Maker(35).problem("pairs", 2, k=[(8, 32), (4, 32)], dtype=dtype)
        for part, channel in ((0, 3), (1, 40)):
            unequal = problem.with_key_scale(1, channel, 0.75, part).map(lambda t: t.to(device))
            got = backend.latent_attention_decode(*unequal.arguments).isnan()
            assert not got[:, :, :2].any(), (dtype, part)
            assert got[:, :, 2:].all(), (dtype, part)


def latent_attention_errors(device: torch.device) -> None:
    problem = attention.Maker(33).problem("errors", tokens=9, size=80).map(lambda t: t.to(device))
    with pytest.raises(RuntimeError, match=r"takes heads of .*, got 80"):
        backend.latent_attention_decode(*problem.arguments)
    with pytest.raises(RuntimeError, match="expected a window of at least 1"):
        backend.latent_attention_decode(*replace(problem, window=0).arguments)


def latent_attention_compiled(device: torch.device) -> None:
    """Through the package's entry point, as one graph and as torch.library wants its ops."""
    problem = attention.Maker(34).problem("compiled", 2, tokens=40, v=[(4, 32), (8, 16)])
    here = problem.map(lambda t: t.to(device))

    def entry(*arguments: object) -> Tensor:
        return backends.latent_attention_decode(*arguments, "triton")

    compiler = "inductor" if device.type == "cuda" else "aot_eager"
    got = torch.compile(entry, fullgraph=True, backend=compiler)(*here.arguments)
    assert attention.outcome(got.cpu(), problem) is None
    op = torch.ops.int8_ops.latent_attention_decode_via
    torch.library.opcheck(op, (*here.op_arguments, "triton"))


CASES = {
    **{category: functools.partial(named, category) for category in cases.NAMED},
    **attention_cases(),
    **{
        case.__name__: case
        for case in (
            *(raster, extremes_more, ties, long_rows, errors, compiled, random_few),
            *(latent_attention_alone, latent_attention_unequal_pairs),
            *(latent_attention_errors, latent_attention_compiled),
        )
    },
}
# Last: it changes the interpreter for good.
INTERPRETER_CASES = {**CASES, "fma_division": fma_division}


def failures(device: torch.device) -> dict[str, str | None]:
    """Each case of the interpreter -> None, or the traceback of its failure."""
    result: dict[str, str | None] = {}
    for name, case in INTERPRETER_CASES.items():
        try:
            case(device)
            result[name] = None
        except Exception:
            result[name] = traceback.format_exc()
    return result


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(json.dumps(failures(torch.device("cpu"))))

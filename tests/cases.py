"""Inputs that every backend is tried on, and the comparison with the reference.

The reference runs on the CPU whatever the device under test is, so that no two sides of a
comparison share a kernel.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from int8_ops import backends, reference

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Case:
    """Arguments of a quantized linear layer: floats for the quantizers, integers for the matmul."""

    name: str
    x: Tensor  # floating [..., K]
    w: Tensor  # int8 [N, K], -128 included
    w_scale: Tensor  # float32 [N, 1]
    w_float: Tensor  # floating [N, K]
    bias: Tensor | None
    out_dtype: torch.dtype

    def __repr__(self) -> str:
        bias = None if self.bias is None else self.bias.dtype
        return (
            f"{self.name}: x {tuple(self.x.shape)} strides {self.x.stride()} {self.x.dtype}, "
            f"w {tuple(self.w.shape)} strides {self.w.stride()}, bias {bias}, out {self.out_dtype}"
        )

    def to(self, device: torch.device) -> Case:
        """On another device with the strides kept, which ``Tensor.to`` does not promise."""

        def move(t: Tensor | None) -> Tensor | None:
            if t is None or t.device == device:
                return t
            out = torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=device)
            # An expanded tensor overlaps itself; its first element is all there is to copy.
            if 0 in t.stride() and t.numel() > 0:
                index = tuple(slice(0, 1) if s == 0 else slice(None) for s in t.stride())
                out[index].copy_(t[index])
            else:
                out.copy_(t)
            return out

        return replace(
            self,
            x=move(self.x),
            w=move(self.w),
            w_scale=move(self.w_scale),
            w_float=move(self.w_float),
            bias=move(self.bias),
        )


def _integers(shape: tuple[int, ...], g: torch.Generator) -> Tensor:
    return torch.randint(-128, 128, shape, generator=g, dtype=torch.int8)


def _scales(n: int, g: torch.Generator) -> Tensor:
    return torch.rand((n, 1), generator=g) * 0.02 + 1e-4


def make(
    name: str,
    lead: tuple[int, ...],
    k: int,
    n: int,
    dtype: torch.dtype,
    g: torch.Generator,
    bias_dtype: torch.dtype | None = None,
    out_dtype: torch.dtype | None = None,
) -> Case:
    """A case of ordinary values: x [*lead, k], w [n, k]."""
    return Case(
        name=name,
        x=torch.randn((*lead, k), generator=g).to(dtype),
        w=_integers((n, k), g),
        w_scale=_scales(n, g),
        w_float=torch.randn((n, k), generator=g).to(dtype),
        bias=None if bias_dtype is None else torch.randn(n, generator=g).to(bias_dtype),
        out_dtype=out_dtype or dtype,
    )


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def regular() -> list[Case]:
    """Shapes of a model's layers, every dtype of x, bias and result."""
    g = _generator(1)
    shapes = [((2, 64), 256, 512), ((48,), 576, 192), ((3, 5, 7), 128, 64)]
    return [
        make("regular", lead, k, n, dtype, g, bias, out)
        for (lead, k, n), dtype, bias, out in zip(
            shapes * 3,
            (*DTYPES, *DTYPES[1:], DTYPES[0], *DTYPES),
            (None, *DTYPES, None, *DTYPES, None),
            (None, *DTYPES[::-1], None, None, *DTYPES),
            strict=True,
        )
    ]


def tails() -> list[Case]:
    """Sizes that no tile or vector divides."""
    g = _generator(2)
    sizes = [(1, 1, 1), (2, 1, 3), (5, 3, 1), (7, 31, 33), (33, 17, 65), (65, 127, 129)]
    sizes += [(130, 129, 127), (19, 255, 257), (3, 1041, 7), (9, 2049, 5)]
    return [
        make("tails", (m,), k, n, DTYPES[i % 3], g, DTYPES[i % 3] if i % 2 else None)
        for i, (m, k, n) in enumerate(sizes)
    ]


def small_m() -> list[Case]:
    """No rows, one row, and every count up to the one where tiles start."""
    g = _generator(3)
    cases = [make("small_m", (m,), 96, 72, DTYPES[m % 3], g, torch.float32) for m in range(18)]
    cases.append(make("small_m", (2, 0, 3), 16, 8, torch.float16, g))
    cases.append(make("small_m", (), 64, 24, torch.bfloat16, g))
    cases.append(make("small_m", (4,), 64, 0, torch.float16, g))
    return cases


def extremes() -> list[Case]:
    """The ends of every range: saturated sums, huge and tiny values, ties, NaN, Inf, zero rows."""
    g = _generator(4)
    cases = []
    for dtype in DTYPES:
        base = make("extremes", (12,), 40, 16, dtype, g, torch.float32)
        info = torch.finfo(dtype)
        x = base.x.clone()
        x[0] = 0.0
        x[1, 3] = torch.nan
        x[2, 5] = torch.inf
        x[3, 7] = -torch.inf
        x[4] = info.max
        x[5] = info.tiny
        x[6] = info.smallest_normal * info.eps  # subnormal in dtype, if it keeps them
        x[7] = -info.max
        x[7, 1:] = 1.0
        x[8] = torch.arange(40) - 20 + 0.5  # halves: every second one rounds to even
        x[8, 0] = 127.0
        x[9] = -0.0
        x[10, 0], x[10, 1] = torch.nan, torch.inf
        w_float = base.w_float.clone()
        w_float[:12] = x
        cases.append(replace(base, x=x, w_float=w_float))
    g_sum = make("extremes", (3,), 4096, 6, torch.float32, g)
    low = replace(g_sum, x=torch.full_like(g_sum.x, -1.0), w=torch.full_like(g_sum.w, -128))
    high = replace(low, w=torch.full_like(g_sum.w, 127))
    longest = make("extremes", (1,), reference.MAX_K, 2, torch.float32, g)
    longest = replace(longest, w=torch.full_like(longest.w, -128))
    scales = replace(cases[0], w_scale=torch.full_like(cases[0].w_scale, torch.nan))
    return [*cases, low, high, longest, scales]


def layout() -> list[Case]:
    """Views: transposed, strided, sliced, offset, expanded."""
    g = _generator(5)
    base = make("layout", (24,), 48, 40, torch.float16, g, torch.bfloat16)
    wide = torch.randn((24, 97), generator=g).half()
    both = torch.randn((48, 24), generator=g).half()
    cube = torch.randn((4, 6, 48), generator=g).half()
    columns = torch.randn(80, generator=g).bfloat16()
    return [
        replace(base, x=both.t()),
        replace(base, x=wide[:, 1:49]),
        replace(base, x=wide[:, ::2][:, :48]),
        replace(base, x=cube.transpose(0, 1)),
        replace(base, x=cube[:, 1::2]),
        replace(base, x=base.x[:1].expand(5, 48)),
        replace(base, x=base.x[:, :1].expand(24, 48)),
        replace(base, w=_integers((48, 40), g).t(), w_float=both.t()),
        replace(base, w=_integers((40, 99), g)[:, 3:51]),
        replace(base, w=_integers((80, 48), g)[::2], w_scale=_scales(80, g)[::2]),
        replace(base, bias=columns[::2]),
        replace(base, w_scale=_scales(1, g).expand(40, 1)),
    ]


NAMED = {
    "regular": regular,
    "tails": tails,
    "small_m": small_m,
    "extremes": extremes,
    "layout": layout,
}

_SMALL = (*range(1, 34), 47, 48, 63, 64, 65, 96, 100, 127, 128, 129)
_LARGE = (160, 192, 255, 256, 257, 320, 511, 576, 1024, 1040, 1041)


def random_cases(count: int, seed: int = 0) -> Iterator[Case]:
    """``count`` cases, the same for every caller: mostly small, one in forty larger."""
    g = _generator(seed)

    def pick(options: tuple) -> object:
        return options[int(torch.randint(len(options), (1,), generator=g))]

    def chance(one_in: int) -> bool:
        return int(torch.randint(one_in, (1,), generator=g)) == 0

    for index in range(count):
        sizes = _LARGE if chance(40) else _SMALL
        m = 0 if chance(50) else pick(sizes)
        lead = pick(((m,), (1, m), (m, 1), (2, m), ()))
        case = make(
            f"random {index} of seed {seed}",
            lead,
            pick(sizes),
            pick(sizes),
            pick(DTYPES),
            g,
            pick((None, None, *DTYPES)),
            pick(DTYPES),
        )
        yield _vary(case, pick, chance, g)


def _vary(case: Case, pick, chance, g: torch.Generator) -> Case:
    """Spread the magnitudes, plant a special value, loosen the layout."""
    x = (case.x.float() * pick((1.0, 1e-3, 30.0, 1e-6))).to(case.x.dtype)
    rows = x.view(-1, x.shape[-1])
    if rows.shape[0] > 0 and chance(2):
        row = int(torch.randint(rows.shape[0], (1,), generator=g))
        column = int(torch.randint(rows.shape[1], (1,), generator=g))
        special = pick((0.0, torch.nan, torch.inf, -torch.inf, "max", "tiny", "ties"))
        if special == "ties":
            # Multiples of a half with the largest at 127: x / scale lands on ties exactly.
            ties = torch.randint(-253, 254, (rows.shape[1],), generator=g) / 2
            rows[row] = ties.to(rows.dtype)
            rows[row, column] = 127.0
        elif special == "max":
            rows[row, column] = torch.finfo(x.dtype).max
        elif special == "tiny":
            rows[row] = torch.finfo(x.dtype).tiny
        elif special == 0.0:
            rows[row] = 0.0
        else:
            rows[row, column] = special
    w = case.w
    if chance(4):
        x = torch.cat([x, x], dim=-1)[..., x.shape[-1] :]
    elif chance(4) and x.dim() >= 2:
        x = x.transpose(0, -1).contiguous().transpose(0, -1)
    if chance(4):
        w = w.t().contiguous().t()
    if chance(8):
        w = torch.full_like(w, pick((-128, 127, 0)))
    return replace(case, x=x, w=w)


def same_bits(got: Tensor, expected: Tensor) -> bool:
    """Shape, dtype and every bit; NaNs count as one value, since their payload means nothing."""
    got = got.detach().cpu()
    if got.shape != expected.shape or got.dtype != expected.dtype:
        return False
    if got.is_floating_point():
        nan = got.isnan()
        if not torch.equal(nan, expected.isnan()):
            return False
        got, expected = got.masked_fill(nan, 0), expected.masked_fill(nan, 0)
    bits = _BITS[got.element_size()]
    return torch.equal(got.contiguous().view(bits), expected.contiguous().view(bits))


def check(backend: backends.Backend, case: Case, device: torch.device) -> None:
    """Every function of a backend on a case, against the reference."""
    here = case.to(device)

    def same(what: str, got: Tensor, expected: Tensor) -> None:
        assert same_bits(got, expected), (
            f"{what} differs on {case}: got {tuple(got.shape)} {got.dtype}\n{got}\n"
            f"expected {tuple(expected.shape)} {expected.dtype}\n{expected}"
        )

    q, scale = reference.quantize_per_token(case.x)
    got_q, got_scale = backend.quantize_per_token(here.x)
    same("quantize_per_token scale", got_scale, scale)
    same("quantize_per_token q", got_q, q)
    for axis in (0, 1):
        if axis == 1 and case.w_float.shape[0] == 0:
            continue
        expected = reference.quantize_per_channel(case.w_float, axis)
        got = backend.quantize_per_channel(here.w_float, axis)
        same(f"quantize_per_channel axis {axis} scale", got[1], expected[1])
        same(f"quantize_per_channel axis {axis} q", got[0], expected[0])
    a = torch.where(q == 0, -128, q).to(torch.int8)
    a_here = a.to(device)
    same("int8_mm", backend.int8_mm(a_here, here.w), reference.int8_mm(a, case.w))
    same(
        "int8_scaled_mm",
        backend.int8_scaled_mm(
            a_here, here.w, scale.to(device), here.w_scale, here.bias, case.out_dtype
        ),
        reference.int8_scaled_mm(a, case.w, scale, case.w_scale, case.bias, case.out_dtype),
    )
    same(
        "int8_linear",
        backend.int8_linear(here.x, here.w, here.w_scale, here.bias, case.out_dtype),
        reference.int8_linear(case.x, case.w, case.w_scale, case.bias, case.out_dtype),
    )

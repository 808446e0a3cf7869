"""The reference itself, against arithmetic that shares nothing with torch."""

from __future__ import annotations

from fractions import Fraction

import cases
import numpy as np
import pytest
import torch

from int8_ops import reference


def _nearest(value: Fraction, neighbours: int = 2) -> float:
    """``value`` rounded to float32, half to even, by comparing exact fractions."""
    start = np.float32(float(value))
    low = high = start
    options = {start}
    for _ in range(neighbours):
        low, high = np.nextafter(low, np.float32(-np.inf)), np.nextafter(high, np.float32(np.inf))
        options |= {low, high}
    best = min(abs(Fraction(float(o)) - value) for o in options)
    tied = [o for o in options if abs(Fraction(float(o)) - value) == best]
    return float(min(tied, key=lambda o: int(o.view(np.int32)) & 1))


def _half_even(value: Fraction) -> int:
    return round(value)  # Fraction.__round__ rounds halves to even, exactly


@pytest.mark.parametrize("dtype", cases.DTYPES)
def test_quantize_is_the_contract_in_exact_arithmetic(dtype):
    x = torch.randn(40, 9).to(dtype)
    x[0] = torch.tensor([127, 0.5, 1.5, 2.5, -0.5, -1.5, 63.5, -126.5, 0])  # ties
    q, scale = reference.quantize_per_token(x)
    for row in range(x.shape[0]):
        values = [Fraction(v) for v in x[row].tolist()]
        expected_scale = _nearest(max(map(abs, values)) / 127)
        assert scale[row].item() == expected_scale
        quotients = [Fraction(_nearest(v / Fraction(expected_scale))) for v in values]
        expected = [max(-127, min(127, _half_even(v))) for v in quotients]
        assert q[row].tolist() == expected


def test_special_rows():
    tiny = torch.finfo(torch.float32).tiny
    x = torch.tensor(
        [
            [0.0, -0.0, 0.0],
            [tiny, 0.0, -tiny],  # amax / 127 is subnormal
            [torch.nan, 1.0, 2.0],
            [1.0, torch.inf, 2.0],
            [-torch.inf, torch.nan, 0.0],
            [tiny * 127, 0.0, -tiny],  # the smallest scale there is
            [-3.0, 3.0, 1.5],
        ]
    )
    q, scale = reference.quantize_per_token(x)
    assert q.tolist() == [
        [0, 0, 0],
        [0, 0, 0],
        [0, 0, 0],
        [0, 0, 0],
        [0, 0, 0],
        [127, 0, -1],
        [-127, 127, 64],
    ]
    assert scale.flatten()[[0, 1, 5]].tolist() == [1.0, 1.0, tiny]
    assert scale.flatten()[2:5].isnan().all()


def test_a_spoilt_row_spoils_its_outputs_and_no_others():
    x = torch.randn(5, 16)
    x[1, 3], x[3, 0] = torch.nan, torch.inf
    w, w_scale = reference.quantize_per_channel(torch.randn(7, 16))
    y = reference.int8_linear(x, w, w_scale)
    assert y.isnan().all(dim=1).tolist() == [False, True, False, True, False]
    assert y[[0, 2, 4]].isfinite().all()


def test_per_channel_is_per_token_along_either_axis():
    w = torch.randn(6, 10)
    q, scale = reference.quantize_per_channel(w, 1)
    q_t, scale_t = reference.quantize_per_token(w.t())
    assert torch.equal(q, q_t.t())
    assert torch.equal(scale, scale_t.t())
    assert torch.equal(reference.quantize_per_channel(w, -1)[0], q)
    assert torch.equal(reference.quantize_per_channel(w, -2)[0], reference.quantize_per_token(w)[0])


def test_minus_128_never_occurs():
    q, _ = reference.quantize_per_token(torch.randn(64, 300) * 10)
    assert q.min() == -127


def test_sums_are_those_of_python_integers():
    a = torch.randint(-128, 128, (3, 50), dtype=torch.int8)
    w = torch.randint(-128, 128, (4, 50), dtype=torch.int8)
    got = reference.int8_mm(a, w).tolist()
    for i in range(3):
        for j in range(4):
            pairs = zip(a[i].tolist(), w[j].tolist(), strict=True)
            assert got[i][j] == sum(p * q for p, q in pairs)


def test_the_largest_sum_still_fits():
    low = torch.full((1, reference.MAX_K), -128, dtype=torch.int8)
    assert reference.int8_mm(low, low).item() == 128 * 128 * reference.MAX_K
    assert 128 * 128 * reference.MAX_K < 2**31 <= 128 * 128 * (reference.MAX_K + 1)


def test_epilogue_rounds_after_each_step():
    acc = torch.randint(-(2**30), 2**30, (50, 3), dtype=torch.int32)
    a_scale, w_scale, bias = torch.rand(50, 1), torch.rand(3, 1), torch.randn(3)
    y = reference.epilogue(acc, a_scale, w_scale, bias, torch.float32)
    for i in range(50):
        for j in range(3):
            step = Fraction(_nearest(Fraction(acc[i, j].item())))
            step = Fraction(_nearest(step * Fraction(a_scale[i, 0].item())))
            step = Fraction(_nearest(step * Fraction(w_scale[j, 0].item())))
            assert y[i, j].item() == _nearest(step + Fraction(bias[j].item()))


@pytest.mark.gpu
def test_cuda_gives_the_bits_of_the_cpu():
    for case in [*cases.regular(), *cases.extremes()]:
        here = case.to(torch.device("cuda"))
        got = reference.int8_linear(here.x, here.w, here.w_scale, here.bias, here.out_dtype)
        expected = reference.int8_linear(case.x, case.w, case.w_scale, case.bias, case.out_dtype)
        assert cases.same_bits(got, expected), case

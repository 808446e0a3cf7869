"""int4 latents: the numbers, the packing, and what a stream is stored as."""

from __future__ import annotations

import math

import pytest
import torch

from int8_ops import INT8Quantizer
from int8_ops.llama.packing import (
    dequantize_int4,
    dequantize_slice,
    pack_int4,
    quantize_int4,
    quantize_stream,
    unpack_int4,
)
from int8_ops.llama.rounding import round_with_feedback
from int8_ops.llama.spec import LayerSpec, Slice, parse_stream


def test_every_pair_of_values_survives_packing():
    values = torch.arange(-8, 8, dtype=torch.int8)
    low, high = torch.cartesian_prod(values, values).unbind(-1)
    q = torch.stack((low, high), dim=-1)
    packed = pack_int4(q)
    assert packed.dtype == torch.int8
    assert packed.shape == (256, 1)
    assert len(packed.unique()) == 256
    assert torch.equal(unpack_int4(packed), q)


def test_packing_keeps_halves_apart():
    q = torch.randint(-8, 8, (3, 5, 12), dtype=torch.int8)
    packed = pack_int4(q)
    assert torch.equal((packed << 4) >> 4, q[..., :6])
    assert torch.equal(packed >> 4, q[..., 6:])


def test_the_largest_element_is_off_by_half_a_step_whatever_its_sign():
    x = torch.tensor([[1.0, -4.25, 2.75, 0.1], [-1.0, 4.25, 3.9, -4.25]])
    q, scale = quantize_int4(x)
    assert torch.equal(scale, torch.tensor([[0.5], [-0.5]]))
    assert q[0].tolist() == [2, -8, 6, 0]  # halves to even
    assert q[1].tolist() == [2, -8, -8, 7]  # a tie takes the positive one, its mirror is clamped
    assert float(dequantize_int4(q, scale)[0, 1]) == -4.0


def test_no_error_above_a_step_and_a_half_and_halves_for_most():
    x = torch.randn(512, 64)
    q, scale = quantize_int4(x)
    assert int(q.min()) >= -8
    assert int(q.max()) <= 7
    error = ((dequantize_int4(q, scale) - x) / scale).abs()
    assert float(error.max()) <= 1.5 + 1e-5
    assert float((error <= 0.5 + 1e-5).float().mean()) > 0.98


def test_awkward_rows_follow_the_int8_contract():
    x = torch.ones(5, 8)
    x[0] = 0
    x[1] = 1e-44
    x[2, 3] = math.nan
    x[3, 0] = -math.inf
    q, scale = quantize_int4(x)
    _, expected = INT8Quantizer.quantize_per_token(x)
    assert torch.equal(scale.isnan(), expected.isnan())
    assert torch.equal(q[:4], torch.zeros(4, 8, dtype=torch.int8))
    assert scale[:2, 0].tolist() == [1.0, 1.0]
    assert torch.equal(q[4], torch.full((8,), -8, dtype=torch.int8))


def test_signed_scales_beat_symmetric_ones_as_the_docstring_says():
    x = torch.randn(4096, 192)
    signed = float((dequantize_int4(*quantize_int4(x)) - x).square().mean())
    low, high = x.amin(dim=-1, keepdim=True), x.amax(dim=-1, keepdim=True)
    exact = torch.where(high >= -low, high, low) / -8
    whole = float((torch.round(x / exact).clamp(-8, 7) * exact - x).square().mean())
    assert whole / signed > 1.04
    scale = x.abs().amax(dim=-1, keepdim=True) / 7
    symmetric = float((torch.round(x / scale) * scale - x).square().mean())
    assert 1.3 < symmetric / signed < 1.45


@pytest.mark.parametrize(
    ("q", "told"),
    [
        (torch.zeros(2, 3, dtype=torch.int8), "got torch.int8 [2, 3]"),
        (torch.zeros(2, 4), "got torch.float32"),
    ],
)
def test_pack_refuses(q, told):
    with pytest.raises(ValueError, match="pack_int4: expected int8") as error:
        pack_int4(q)
    assert told in str(error.value)


def test_unpack_refuses_another_dtype():
    with pytest.raises(ValueError, match=r"expected int8, got torch\.uint8"):
        unpack_int4(torch.zeros(2, dtype=torch.uint8))


def test_a_stream_is_stored_slice_by_slice():
    spec = (Slice(8, 6), Slice(4, 10), Slice(16, 3))
    latent = torch.randn(2, 3, 5, 19)
    stored = quantize_stream(latent, spec, "auto")
    assert [(q.dtype, tuple(q.shape)) for q, _ in stored] == [
        (torch.int8, (2, 3, 5, 6)),
        (torch.int8, (2, 3, 5, 5)),
        (torch.float32, (2, 3, 5, 3)),
    ]
    assert [None if s is None else tuple(s.shape) for _, s in stored] == [(2, 3, 5)] * 2 + [None]
    q, scale = INT8Quantizer.quantize_per_token(latent[..., :6])
    assert torch.equal(stored[0][0], q)
    assert torch.equal(stored[0][1], scale[..., 0])
    pieces = [
        dequantize_slice(one, part, torch.float32) for one, part in zip(stored, spec, strict=True)
    ]
    assert torch.equal(pieces[1], dequantize_int4(*quantize_int4(latent[..., 6:16])))
    assert torch.equal(pieces[2], latent[..., 16:])


def test_bytes_count_scales():
    spec = LayerSpec(k=(Slice(8, 32), Slice(4, 64)), v=(Slice(4, 96),), groups=2)
    assert spec.bytes_per_token == 2 * ((32 + 4 + 32 + 4) + (48 + 4))
    assert LayerSpec.from_dict(spec.to_dict(), "here") == spec


@pytest.mark.parametrize(
    ("value", "told"),
    [
        ([[3, 8]], "expected bits 4, 8 or 16, got 3"),
        ([[4, 7]], "even in 4 bits"),
        ([[8, 0]], "expected rank >= 1"),
        ([], "at least one"),
        ("8", "expected [[bits, rank], ...], got '8'"),
    ],
)
def test_a_bad_spec_is_refused_by_name(value, told):
    with pytest.raises(ValueError, match=r"layers\[3\]\.k") as error:
        parse_stream(value, "layers[3].k")
    assert told in str(error.value)


def test_feedback_moves_rounding_errors_to_where_they_cost_little():
    latents = torch.randn(4096, 48, dtype=torch.float64) * torch.logspace(0, -2, 48)
    turn = torch.linalg.qr(torch.randn(48, 48, dtype=torch.float64))[0]
    latents, a = latents @ turn, torch.randn(32, 48)
    q, scale = INT8Quantizer.quantize_per_channel(a)
    better = round_with_feedback(a, scale, latents.T @ latents)
    assert better.dtype == torch.int8
    assert int(better.min()) >= -127
    error = [float((latents @ (n * scale - a).double().T).norm()) for n in (q, better)]
    assert error[1] < 0.5 * error[0]
    # Nothing to weigh by: each for itself.
    assert torch.equal(round_with_feedback(a, scale, torch.zeros(48, 48)), q)
    assert torch.equal(round_with_feedback(a, scale, torch.eye(48)), q)

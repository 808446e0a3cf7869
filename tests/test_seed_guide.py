"""The calls of the user's guide, as it makes them, on the CPU and on CUDA where there is one."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from int8_ops import (
    ALRDLinearINT8,
    INT8Linear,
    INT8LinearFunction,
    INT8Quantizer,
    Quantizer,
    backends,
    reference,
)


def test_fake_and_real_quantizer(device):
    x = torch.randn(2, 512, 256, device=device)
    quantizer = Quantizer(n_bits=8)
    x_fake_quant = quantizer(x)
    assert x_fake_quant.dtype == x.dtype

    x_int8, scale = INT8Quantizer.quantize_per_token(x)
    x_restored = INT8Quantizer.dequantize(x_int8, scale)
    assert torch.equal(x_restored, x_fake_quant)


def test_int8_quantizer(device):
    x = torch.randn(2, 512, 256, device=device)
    x_int8, scale = INT8Quantizer.quantize_per_token(x)
    assert (x_int8.shape, x_int8.dtype) == ((2, 512, 256), torch.int8)
    assert (scale.shape, scale.dtype) == ((2, 512, 1), torch.float32)
    x_restored = INT8Quantizer.dequantize(x_int8, scale)
    assert ((x_restored - x).abs() <= scale * 0.5001).all()

    w = torch.randn(1024, 256, device=device)
    w_int8, scale = INT8Quantizer.quantize_per_channel(w)
    assert (w_int8.shape, w_int8.dtype) == ((1024, 256), torch.int8)
    assert (scale.shape, scale.dtype) == ((1024, 1), torch.float32)


def test_int8_linear(device):
    # On CUDA this is the guide's mix: weights made on the CPU, an input on the GPU, no .to().
    weight = torch.randn(1024, 256)
    bias = torch.randn(1024)
    layer = INT8Linear(weight, bias, backend="auto")

    x = torch.randn(2, 512, 256, dtype=torch.float16, device=device)
    output = layer(x)
    assert (output.shape, output.dtype) == ((2, 512, 1024), torch.float16)

    exact = F.linear(x.float(), weight.to(device), bias.to(device))
    assert F.cosine_similarity(output.float().flatten(), exact.flatten(), dim=0) > 0.99

    w_int8, w_scale = reference.quantize_per_channel(weight)
    expected = reference.int8_linear(x.cpu(), w_int8, w_scale, bias)
    assert torch.equal(output.cpu(), expected)


def test_int8_linear_function(device):
    w = torch.randn(1024, 256, device=device)
    w_int8, w_scale = INT8Quantizer.quantize_per_channel(w)
    x = torch.randn(2, 512, 256, dtype=torch.float16, device=device)
    bias = torch.randn(1024, device=device)
    output = INT8LinearFunction.apply(
        x,
        w_int8,
        w_scale,
        bias,
        "auto",
    )
    assert (output.shape, output.dtype) == ((2, 512, 1024), torch.float16)
    assert torch.equal(output, INT8Linear.from_quantized(w_int8, w_scale, bias)(x))


@pytest.mark.parametrize("backend", ["auto", "triton", "torch", "fallback"])
def test_backend_choice(device, backend):
    weight = torch.randn(64, 32)
    layer = INT8Linear(weight, backend=backend)
    x = torch.randn(3, 32, device=device)
    reason = backends.unavailable_reason(backend, device)
    if reason is None:
        w_int8, w_scale = reference.quantize_per_channel(weight)
        assert torch.equal(layer(x).cpu(), reference.int8_linear(x.cpu(), w_int8, w_scale))
    else:
        with pytest.raises(RuntimeError, match=f"backend '{backend}' cannot be used"):
            layer(x)


class ValueCache:
    """Keeps latents, as the guide's cache does."""

    def __init__(self) -> None:
        self.key = self.value = None

    def update(self, key, value):
        self.key = key if self.key is None else torch.cat([self.key, key], dim=1)
        self.value = value if self.value is None else torch.cat([self.value, value], dim=1)
        return self.key, self.value


class GuideAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(64, 64, bias=False)
        self.k_proj = ALRDLinearINT8(64, 64, 32, bias=False)
        self.v_proj = ALRDLinearINT8(64, 64, 32)

    def forward(self, hidden_states, past_key_value=None):
        query_states = self.q_proj(hidden_states)

        key_latent = self.k_proj.BLinear(hidden_states)
        key_latent = self.k_proj.quantize_latent(key_latent)

        value_latent = self.v_proj.BLinear(hidden_states)
        value_latent = self.v_proj.quantize_latent(value_latent)

        if past_key_value is not None:
            key_latent, value_latent = past_key_value.update(key_latent, value_latent)

        key_states = self.k_proj.ALinear(key_latent)
        value_states = self.v_proj.forward_int8(value_latent)
        return F.scaled_dot_product_attention(query_states, key_states, value_states)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention(device, dtype):
    attention = GuideAttention().to(device, dtype)
    attention.v_proj.prepare_int8_weights()
    cache = ValueCache()
    with torch.no_grad():
        for tokens in (7, 1, 1):
            hidden_states = torch.randn(2, tokens, 64, device=device, dtype=dtype)
            output = attention(hidden_states, cache)
            assert (output.shape, output.dtype) == ((2, tokens, 64), dtype)
    assert cache.value.shape == (2, 9, 32)
    assert cache.value.dtype == dtype


def test_alrd_linear(device):
    layer = ALRDLinearINT8(256, 1024, 128).to(device)
    assert isinstance(layer.BLinear, nn.Linear)
    assert isinstance(layer.ALinear, nn.Linear)
    layer.prepare_int8_weights()
    latent = layer.BLinear(torch.randn(2, 16, 256, device=device))
    output = layer.forward_int8(latent)
    by_hand = INT8LinearFunction.apply(
        latent,
        layer.A_int8,
        layer.A_scale,
        layer.ALinear.bias,
        layer.backend,
    )
    assert torch.equal(output, by_hand)

"""The modules and the quantizers: numbers, state, devices, casts."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys

import cases
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import nn

import int8_ops
from int8_ops import (
    ALRDLinearINT8,
    INT8Linear,
    INT8LinearFunction,
    INT8Quantizer,
    Quantizer,
    backends,
    prepare_all_int8_weights,
    reference,
)
from int8_ops.nn._state import describe_backend


def _expected(x, layer, out_dtype=None):
    """The reference on a layer's own buffers."""
    bias = None if layer.bias is None else layer.bias.cpu()
    return reference.int8_linear(
        x.detach().cpu(), layer.weight.cpu(), layer.weight_scale.cpu(), bias, out_dtype
    )


def _buffers(module):
    return {k: v.clone() for k, v in module.state_dict().items()}


def _same_state(a, b):
    a, b = a.state_dict(), b.state_dict()
    assert list(a) == list(b)
    for key in a:
        assert a[key].dtype == b[key].dtype
        assert torch.equal(a[key].cpu(), b[key].cpu()), key


def _through_pickle(module):
    return pickle.loads(pickle.dumps(module))


def _through_torch_save(module):
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = [copy.deepcopy, copy.copy, _through_pickle, _through_torch_save]


# -- the quantizers -------------------------------------------------------------------------------


def test_int8_quantizer_by_every_backend(backend_on):
    name, device = backend_on
    x = torch.randn(3, 5, 40, dtype=torch.float16)
    for got, expected in zip(
        INT8Quantizer.quantize_per_token(x.to(device), backend=name),
        reference.quantize_per_token(x),
        strict=True,
    ):
        assert cases.same_bits(got, expected)
    for axis in (0, 1):
        got = INT8Quantizer.quantize_per_channel(x[0].to(device), axis, backend=name)
        expected = reference.quantize_per_channel(x[0], axis)
        assert cases.same_bits(got[0], expected[0])
        assert cases.same_bits(got[1], expected[1])
        restored = INT8Quantizer.dequantize(*got)
        assert cases.same_bits(restored, reference.dequantize(*expected))


def test_fake_quantizer_is_the_real_one_seen_as_floats(device):
    x = torch.randn(7, 64, device=device).half()
    q, scale = INT8Quantizer.quantize_per_token(x)
    assert torch.equal(Quantizer(n_bits=8)(x), INT8Quantizer.dequantize(q, scale, x.dtype))


@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("group_size", [0, 16])
@pytest.mark.parametrize("n_bits", [2, 4, 8])
def test_fake_quantizer_levels_and_error(device, n_bits, group_size, sym):
    x = torch.randn(5, 64, device=device) + 0.5
    y = Quantizer(n_bits, group_size, sym)(x)
    assert y.shape == x.shape
    assert y.dtype == x.dtype
    for values, rounded in zip(
        x.reshape(-1, group_size or 64), y.reshape(-1, group_size or 64), strict=True
    ):
        span = 2 * values.abs().max() if sym else values.max() - values.min()
        step = span / (2**n_bits - (2 if sym else 1))
        assert rounded.unique().numel() <= 2**n_bits - sym
        assert (values - rounded).abs().max() <= step * 0.5001


def test_fake_quantizer_clips_and_survives_specials():
    x = torch.tensor([[1.0, -0.5, 0.25, 0.0]])
    assert Quantizer(8, clip_ratio=0.5)(x)[0, 0] == 0.5
    for sym in (True, False):
        quantizer = Quantizer(8, sym=sym)
        assert torch.equal(quantizer(torch.zeros(2, 4)), torch.zeros(2, 4))
        spoilt = quantizer(torch.tensor([[1.0, torch.nan], [1.0, torch.inf], [1.0, 2.0]]))
        assert spoilt.isnan().all(1).tolist() == [True, True, False]
    far = torch.tensor([[1000.0, 1000.5, 1001.0]])
    assert torch.allclose(Quantizer(8, sym=False)(far), far, atol=1 / 255)


def test_fake_quantizer_gradient_is_straight_through():
    x = torch.randn(3, 8, requires_grad=True)
    Quantizer(4, group_size=4, sym=False)(x).backward(torch.arange(24.0).view(3, 8))
    assert torch.equal(x.grad, torch.arange(24.0).view(3, 8))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n_bits": 1}, "n_bits in 2..16, got 1"),
        ({"n_bits": 17}, "n_bits in 2..16, got 17"),
        ({"group_size": -1}, "group_size >= 0, got -1"),
        ({"clip_ratio": 0.0}, r"clip_ratio in \(0, 1\], got 0.0"),
        ({"clip_ratio": 1.5}, r"clip_ratio in \(0, 1\], got 1.5"),
    ],
)
def test_fake_quantizer_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        Quantizer(**arguments)


def test_fake_quantizer_refuses_a_group_that_does_not_divide():
    with pytest.raises(ValueError, match="divisible by group_size 3, got 8"):
        Quantizer(8, group_size=3)(torch.randn(2, 8))
    with pytest.raises(RuntimeError, match="expected x of dtype"):
        Quantizer()(torch.zeros(2, 8, dtype=torch.int8))


# -- INT8Linear: numbers --------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("with_bias", [True, False])
def test_forward_is_the_reference(backend_on, dtype, with_bias):
    name, device = backend_on
    weight, bias = torch.randn(33, 40), torch.randn(33) if with_bias else None
    layer = INT8Linear(weight, bias, backend=name).to(device)
    q, scale = reference.quantize_per_channel(weight)
    assert torch.equal(layer.weight.cpu(), q)
    assert torch.equal(layer.weight_scale.cpu(), scale)
    for shape in [(2, 5, 40), (1, 40), (40,), (0, 40)]:
        x = torch.randn(shape).to(dtype)
        assert cases.same_bits(layer(x.to(device)), _expected(x, layer))


def test_quality_is_that_of_eight_bits(device):
    linear = nn.Linear(512, 512).to(device)
    x = torch.randn(256, 512, device=device)
    y, expected = INT8Linear.from_linear(linear)(x), linear(x)
    assert F.cosine_similarity(y.flatten(), expected.flatten(), dim=0) > 0.999


def test_there_is_no_float_copy_of_the_weight():
    layer = INT8Linear.from_linear(nn.Linear(64, 32).half())
    sizes = {k: v.numel() * v.element_size() for k, v in layer.state_dict().items()}
    assert sizes == {"weight": 64 * 32, "weight_scale": 32 * 4, "bias": 32 * 2}
    held = [v for v in vars(layer).values() if isinstance(v, torch.Tensor)]
    assert held == []
    assert list(layer.parameters()) == []


def test_from_linear_keeps_device_mode_and_bias(device):
    linear = nn.Linear(8, 6, device=device, dtype=torch.bfloat16).eval()
    layer = INT8Linear.from_linear(linear, backend="auto")
    assert not layer.training
    assert layer.weight.device == linear.weight.device
    assert torch.equal(layer.bias, linear.bias)
    assert layer.bias.data_ptr() != linear.bias.data_ptr()
    assert not layer.bias.requires_grad


def test_from_quantized_takes_the_integers_as_they_are(device):
    q = torch.randint(-128, 128, (6, 8), dtype=torch.int8, device=device)
    scale = torch.rand(6, 1, device=device)
    layer = INT8Linear.from_quantized(q, scale)
    assert (layer.in_features, layer.out_features) == (8, 6)
    assert layer.weight.data_ptr() == q.data_ptr()
    x = torch.randn(3, 8)
    assert cases.same_bits(layer(x.to(device)), _expected(x, layer))
    with pytest.raises(RuntimeError, match=r"expected w of dtype torch.int8"):
        INT8Linear.from_quantized(q.float(), scale)
    with pytest.raises(RuntimeError, match=r"w_scale of shape \[6, 1\], got \[6\]"):
        INT8Linear.from_quantized(q, scale[:, 0])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: INT8Linear(torch.randn(4)), r"w of shape \[N, K\], got \[4\]"),
        (lambda: INT8Linear(torch.zeros(4, 4, dtype=torch.int32)), "expected w of dtype"),
        (lambda: INT8Linear(torch.randn(4, 3), torch.randn(3)), r"bias of shape \[4\], got \[3\]"),
        (lambda: INT8Linear(torch.randn(1, 131_072)), "over the limit of 131071"),
    ],
)
def test_construction_refuses(make, message):
    with pytest.raises(RuntimeError, match=message):
        make()


def test_an_unknown_backend_is_refused_at_once_an_absent_one_at_use():
    with pytest.raises(ValueError, match="unknown backend 'cublas'"):
        INT8Linear(torch.randn(4, 4), backend="cublas")
    layer = INT8Linear(torch.randn(4, 4), backend="torch")
    assert "unavailable on cpu" in repr(layer)
    with pytest.raises(RuntimeError, match="backend 'torch' cannot be used on cpu"):
        layer(torch.randn(2, 4))


def test_repr_tells_shapes_and_the_backend():
    layer = INT8Linear(torch.randn(6, 8), torch.randn(6))
    text = "in_features=8, out_features=6, bias=True, backend=auto (cpu)"
    assert repr(layer) == f"INT8Linear({text}, follows its first input)"
    layer(torch.randn(1, 8))
    assert repr(layer) == f"INT8Linear({text})"
    assert "backend=fallback" in repr(INT8Linear(torch.randn(6, 8), backend="fallback"))


def test_repr_names_the_backend_alone_where_it_computes_nothing():
    for name in ("auto", "cuda", "fallback"):
        layer = INT8Linear(torch.randn(6, 8), backend=name).to("meta")
        assert repr(layer).endswith(f"backend={name})")
    mps = torch.device("mps")
    assert describe_backend("auto", mps) == "auto"
    assert describe_backend("fallback", mps).startswith("fallback (unavailable on mps: ")


def test_wrong_inputs_are_named(device):
    layer = INT8Linear(torch.randn(6, 8)).to(device)
    with pytest.raises(RuntimeError, match=r"same last dimension K, got x \[2, 7\] and w \[6, 8\]"):
        layer(torch.randn(2, 7, device=device))
    with pytest.raises(RuntimeError, match="expected x of dtype Float, Half or BFloat16"):
        layer(torch.randn(2, 8, device=device, dtype=torch.float64))


# -- INT8Linear: gradient, autocast ---------------------------------------------------------------


def test_gradient_by_every_backend(backend_on):
    name, device = backend_on
    layer = INT8Linear(torch.randn(6, 8), torch.randn(6), backend=name).to(device)
    x = torch.randn(2, 3, 8, device=device, requires_grad=True)
    y = layer(x)
    assert cases.same_bits(y, _expected(x, layer))
    grad = torch.randn_like(y)
    y.backward(grad)
    w = INT8Quantizer.dequantize(layer.weight, layer.weight_scale)
    assert torch.equal(x.grad, grad @ w)
    with torch.no_grad():
        assert not layer(x).requires_grad
    with torch.inference_mode():
        assert cases.same_bits(layer(x), _expected(x, layer))


def test_function_by_every_backend(backend_on):
    name, device = backend_on
    w, w_scale = INT8Quantizer.quantize_per_channel(torch.randn(6, 8, device=device))
    bias = torch.randn(6, device=device, requires_grad=True)
    x = torch.randn(4, 8, device=device, dtype=torch.bfloat16, requires_grad=True)
    expected = reference.int8_linear(
        x.detach().cpu(), w.cpu(), w_scale.cpu(), bias.detach().cpu(), torch.bfloat16
    )
    y = INT8LinearFunction.apply(x, w, w_scale, bias, name)
    assert cases.same_bits(y, expected)
    grad = torch.randn_like(y)
    y.backward(grad)
    assert torch.equal(x.grad, grad @ INT8Quantizer.dequantize(w, w_scale, torch.bfloat16))
    assert torch.equal(bias.grad, grad.float().sum(0))
    assert cases.same_bits(INT8LinearFunction.apply(x, w, w_scale, bias), expected)
    no_bias = INT8LinearFunction.apply(x, w, w_scale)
    no_bias.sum().backward()
    assert no_bias.shape == y.shape


@pytest.mark.parametrize("wanted", [torch.bfloat16, torch.float16])
def test_autocast_sets_the_result_and_leaves_the_input(backend_on, wanted):
    name, device = backend_on
    layer = INT8Linear(torch.randn(48, 1100), torch.randn(48), backend=name).to(device)
    x = torch.randn(4, 1100, device=device)
    expected = _expected(x, layer, wanted)
    with torch.autocast(device.type, dtype=wanted):
        assert cases.same_bits(layer(x), expected)
        assert cases.same_bits(layer(x.clone().requires_grad_()), expected)
        function = INT8LinearFunction.apply(x, layer.weight, layer.weight_scale, layer.bias, name)
        assert cases.same_bits(function, expected)
    assert layer(x).dtype == torch.float32


# -- INT8Linear: state ----------------------------------------------------------------------------


@pytest.mark.parametrize("duplicate", COPIES)
def test_copies_keep_every_bit(device, duplicate):
    layer = INT8Linear(torch.randn(6, 8), torch.randn(6)).to(device)
    x = torch.randn(3, 8, device=device)
    y = layer(x)
    other = duplicate(layer)
    _same_state(other, layer)
    assert torch.equal(other(x), y)
    assert other.backend == layer.backend


def test_state_dict_round_trip(device, tmp_path):
    layer = INT8Linear(torch.randn(6, 8), torch.randn(6)).to(device)
    safetensors.torch.save_file(layer.state_dict(), tmp_path / "layer.safetensors")
    torch.save(layer.state_dict(), tmp_path / "layer.pt")
    for state in (
        layer.state_dict(),
        safetensors.torch.load_file(tmp_path / "layer.safetensors"),
        torch.load(tmp_path / "layer.pt", weights_only=True),
    ):
        for assign in (False, True):
            other = INT8Linear(torch.randn(6, 8), torch.randn(6)).to(device)
            assert set(other.load_state_dict(state, assign=assign)[0]) == set()
            _same_state(other, layer)
    x = torch.randn(2, 8, device=device)
    assert cases.same_bits(other.to(device)(x), _expected(x, layer))


def test_loading_floats_is_refused():
    layer = INT8Linear(torch.randn(6, 8), torch.randn(6))
    before = _buffers(layer)
    with pytest.raises(
        RuntimeError, match=r"expected weight of dtype torch.int8, got torch.float32"
    ):
        layer.load_state_dict(nn.Linear(8, 6).state_dict(), strict=False)
    cast = {**before, "weight_scale": before["weight_scale"].half()}
    with pytest.raises(RuntimeError, match=r"expected weight_scale of dtype torch.float32"):
        layer.load_state_dict(cast)
    for key, value in before.items():
        assert torch.equal(layer.state_dict()[key], value)


CASTS = {
    "half": lambda m: m.half(),
    "bfloat16": lambda m: m.to(torch.bfloat16),
    "float": lambda m: m.float(),
    "double": lambda m: m.double(),
    "type": lambda m: m.type(torch.float16),
    "there and back": lambda m: m.half().bfloat16().float(),
    "apply": lambda m: m._apply(lambda t: t.to(torch.float16)),
    "device and dtype": lambda m: m.to("cpu", torch.float16),
}


@pytest.mark.parametrize("cast", CASTS)
def test_casts_leave_integers_and_scales(cast):
    model = nn.Sequential(INT8Linear(torch.randn(6, 8), torch.randn(6)))
    before = _buffers(model)
    model = CASTS[cast](model)
    layer = model[0]
    assert torch.equal(layer.weight, before["0.weight"])
    assert layer.weight_scale.dtype == torch.float32
    assert torch.equal(layer.weight_scale, before["0.weight_scale"])
    plain = CASTS[cast](nn.Sequential(nn.Linear(8, 6)))
    assert layer.bias.dtype == plain[0].bias.dtype


def test_meta_and_back():
    linear = nn.Linear(8, 6)
    state = INT8Linear.from_linear(linear).state_dict()
    layer = INT8Linear.from_linear(nn.Linear(8, 6, device="meta"))
    assert layer.weight.is_meta
    assert layer.weight_scale.dtype == torch.float32
    assert layer(torch.empty(2, 8, device="meta")).shape == (2, 6)
    assert repr(layer).endswith("backend=auto)")
    for materialise in (
        lambda m: m.load_state_dict(state, assign=True),
        lambda m: m.to_empty(device="cpu").load_state_dict(state),
    ):
        other = copy.deepcopy(layer)
        materialise(other)
        _same_state(other, INT8Linear.from_linear(linear))
        x = torch.randn(2, 8)
        assert cases.same_bits(other(x), _expected(x, other))
    there = INT8Linear(torch.randn(6, 8)).to("meta")
    assert there.weight_scale.is_meta
    assert there.weight_scale.dtype == torch.float32


def test_an_input_on_meta_does_not_take_the_weights_along():
    layer = INT8Linear(torch.randn(6, 8))
    with pytest.raises(RuntimeError, match="two different devices"):
        layer(torch.empty(2, 8, device="meta"))
    assert layer.weight.device.type == "cpu"


@pytest.mark.gpu
def test_a_layer_never_moved_follows_its_first_input():
    weight, x = torch.randn(6, 8), torch.randn(2, 8)
    layer = INT8Linear(weight)
    assert cases.same_bits(layer(x.cuda()), _expected(x, layer))
    assert layer.weight.is_cuda
    with pytest.raises(RuntimeError, match="two different devices"):
        layer(x)
    for settled in (
        INT8Linear(weight).to("cpu"),
        INT8Linear(weight).half(),
        INT8Linear.from_linear(nn.Linear(8, 6)),
        INT8Linear.from_quantized(*reference.quantize_per_channel(weight)),
    ):
        with pytest.raises(RuntimeError, match=r"two different devices; move the layer with .to"):
            settled(x.cuda())
    used = INT8Linear(weight)
    used(x)
    with pytest.raises(RuntimeError, match="two different devices"):
        used(x.cuda())


@pytest.mark.gpu
def test_a_layer_moves_like_any_module():
    layer = INT8Linear(torch.randn(6, 8), torch.randn(6))
    x = torch.randn(2, 8)
    y = layer(x)
    assert cases.same_bits(layer.cuda()(x.cuda()), y)
    assert "backend=auto (cpu)" not in repr(layer)
    assert cases.same_bits(layer.cpu()(x), y)


@pytest.mark.gpu
def test_second_device():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    layer = INT8Linear(torch.randn(6, 8)).to("cuda:1")
    x = torch.randn(2, 8)
    assert cases.same_bits(layer(x.to("cuda:1")), _expected(x, layer))
    with pytest.raises(RuntimeError, match="two different devices"):
        layer(x.to("cuda:0"))


# -- ALRDLinearINT8 -------------------------------------------------------------------------------


def _alrd(device="cpu", prepared=True, **kwargs):
    layer = ALRDLinearINT8(24, 20, 8, device=device, **kwargs)
    if prepared:
        layer.prepare_int8_weights()
    return layer


def _is_of_its_floats(layer):
    q, scale = reference.quantize_per_channel(layer.ALinear.weight.detach().cpu())
    return torch.equal(layer.A_int8.cpu(), q) and torch.equal(layer.A_scale.cpu(), scale)


def test_buffers_have_their_final_shape_from_the_start(device):
    layer = _alrd(device, prepared=False)
    for _ in range(2):
        assert layer.A_int8.shape == (20, 8)
        assert layer.A_int8.dtype == torch.int8
        assert layer.A_scale.shape == (20, 1)
        assert layer.A_scale.dtype == torch.float32
        assert {"A_int8", "A_scale"} <= set(layer.state_dict())
        layer.prepare_int8_weights()
    assert _is_of_its_floats(layer)


def test_prepare_is_idempotent_and_lazy():
    layer = _alrd(prepared=False)
    x = torch.randn(3, 24)
    y = layer(x)
    assert _is_of_its_floats(layer)
    before = layer.A_int8
    layer.prepare_int8_weights()
    assert layer.A_int8 is before
    layer.prepare_int8_weights(keep_float=False)
    layer.prepare_int8_weights(keep_float=False)
    layer.prepare_int8_weights()
    assert torch.equal(layer(x), y)


@pytest.mark.parametrize("with_bias", [True, False])
def test_forward_int8_is_the_reference(backend_on, with_bias):
    name, device = backend_on
    layer = _alrd(device, backend=name, bias=with_bias)
    latent = torch.randn(2, 5, 8, device=device).half()
    bias = layer.ALinear.bias.detach().cpu() if with_bias else None
    arguments = (layer.A_int8.cpu(), layer.A_scale.cpu(), bias)
    expected = reference.int8_linear(latent.cpu(), *arguments)
    with torch.no_grad():
        assert cases.same_bits(layer.forward_int8(latent), expected)
    assert cases.same_bits(layer.forward_int8(latent), expected)
    q, scale = layer.quantize_latent_int8(latent)
    assert cases.same_bits(q, reference.quantize_per_token(latent.cpu())[0])
    # A latent stored as int8 is not quantized again: the same bits as in one go.
    stored = layer.forward_int8(q, scale, out_dtype=torch.float16)
    assert cases.same_bits(stored, expected)
    assert layer.forward_int8(q, scale).dtype == torch.float32


def test_forward_goes_through_both_factors(device):
    layer = _alrd(device)
    x = torch.randn(4, 24, device=device)
    assert torch.equal(layer(x), layer.forward_int8(layer.BLinear(x)))
    y, expected = layer(x).flatten(), layer.forward_float(x).flatten()
    assert F.cosine_similarity(y, expected, dim=0) > 0.999


def test_quantize_latent_returns_floats(device):
    layer = _alrd(device)
    latent = torch.randn(3, 8, device=device, dtype=torch.bfloat16, requires_grad=True)
    y = layer.quantize_latent(latent)
    q, scale = reference.quantize_per_token(latent.detach().cpu())
    assert cases.same_bits(y, reference.dequantize(q, scale, torch.bfloat16))
    y.backward(torch.ones_like(y))
    assert torch.equal(latent.grad, torch.ones_like(latent))


def test_gradients_reach_x_b_and_the_bias(device):
    layer = _alrd(device)
    x = torch.randn(4, 24, device=device, requires_grad=True)
    layer(x).sum().backward()
    a = INT8Quantizer.dequantize(layer.A_int8, layer.A_scale)
    grad_latent = torch.ones(4, 20, device=device) @ a
    assert torch.allclose(x.grad, grad_latent @ layer.BLinear.weight)
    assert torch.allclose(layer.BLinear.weight.grad, grad_latent.t() @ x)
    assert torch.equal(layer.ALinear.bias.grad, torch.full((20,), 4.0, device=device))
    assert layer.ALinear.weight.grad is None


def test_autocast(device):
    layer = _alrd(device)
    x = torch.randn(4, 24, device=device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
        q, scale = layer.quantize_latent_int8(torch.randn(4, 8, device=device))
        assert layer.forward_int8(q, scale).dtype == torch.bfloat16


def test_forward_int8_refuses():
    layer = _alrd()
    q, scale = layer.quantize_latent_int8(torch.randn(3, 8))
    with pytest.raises(ValueError, match=r"got torch.int8 without latent_scale"):
        layer.forward_int8(q)
    with pytest.raises(ValueError, match=r"got torch.float32 with latent_scale"):
        layer.forward_int8(torch.randn(3, 8), scale)
    with pytest.raises(RuntimeError, match="a_scale of a's shape"):
        layer.forward_int8(q, scale[:2])
    with pytest.raises(ValueError, match="rank >= 1, got 0"):
        ALRDLinearINT8(8, 8, 0)
    with pytest.raises(ValueError, match="unknown backend"):
        ALRDLinearINT8(8, 8, 4, backend="nope")


def test_freeing_halves_the_bytes_of_a_against_fp16():
    in_features, out_features, rank = 512, 512, 256
    layer = ALRDLinearINT8(in_features, out_features, rank, dtype=torch.float16)
    layer.prepare_int8_weights()
    fp16 = layer.ALinear.weight.numel() * layer.ALinear.weight.element_size()
    bias = layer.ALinear.bias
    layer.prepare_int8_weights(keep_float=False)
    assert layer.ALinear.weight is None
    assert layer.ALinear.bias is bias
    of_a = {"A_int8", "A_scale", "ALinear.weight"} & set(layer.state_dict())
    left = sum(v.numel() * v.element_size() for k, v in layer.state_dict().items() if k in of_a)
    assert of_a == {"A_int8", "A_scale"}
    assert left == fp16 // 2 + out_features * 4
    assert left < 0.51 * fp16
    with pytest.raises(RuntimeError, match="ALinear has no float weight"):
        layer.forward_float(torch.randn(1, in_features).half())


def test_changes_of_the_float_weight_are_noticed():
    layer = _alrd()
    latent = torch.randn(2, 8)
    with torch.no_grad():
        layer.ALinear.weight.mul_(3.0)
    layer.forward_int8(latent)
    assert _is_of_its_floats(layer)
    layer.ALinear.weight = nn.Parameter(torch.randn(20, 8))
    assert not _is_of_its_floats(layer)
    state = layer.state_dict()  # never stale integers beside new floats
    q, _ = reference.quantize_per_channel(state["ALinear.weight"])
    assert torch.equal(state["A_int8"], q)


def test_loading_floats_quantizes_anew(device):
    source = _alrd(device, prepared=False)
    floats = {k: v for k, v in source.state_dict().items() if not k.startswith("A_")}
    for state in (floats, source.state_dict()):
        for assign in (False, True):
            layer = _alrd(device)
            layer.load_state_dict(state, assign=assign)
            assert torch.equal(layer.ALinear.weight, source.ALinear.weight)
            assert _is_of_its_floats(layer)
    fresh = _alrd(device, prepared=False)
    fresh.load_state_dict(floats)
    fresh(torch.randn(1, 24, device=device))
    assert _is_of_its_floats(fresh)


def test_loading_integers_keeps_them(device):
    source = _alrd(device)
    state = _buffers(source)
    state["A_int8"][0, 0] = 77  # integers of somebody's own making
    for prepared in (False, True):
        layer = _alrd(device, prepared=prepared)
        layer.load_state_dict(state)
        layer(torch.randn(1, 24, device=device))
        layer.prepare_int8_weights()
        assert torch.equal(layer.A_int8, state["A_int8"])
        assert torch.equal(layer.ALinear.weight, state["ALinear.weight"])


def test_checkpoints_cross_between_kept_and_freed(device):
    source = _alrd(device)
    x = torch.randn(3, 24, device=device)
    y = source(x)
    kept = _buffers(source)
    floats = {k: v for k, v in kept.items() if not k.startswith("A_")}
    source.prepare_int8_weights(keep_float=False)
    freed = _buffers(source)
    assert "ALinear.weight" not in freed

    for prepared in (False, True):
        layer = nn.ModuleList([_alrd(device, prepared=prepared)])
        layer.load_state_dict({f"0.{k}": v for k, v in freed.items()})
        assert layer[0].ALinear.weight is None
        assert torch.equal(layer[0](x), y)
        _same_state(layer[0], source)
    for state in (kept, floats, freed):
        layer = _alrd(device)
        layer.prepare_int8_weights(keep_float=False)
        layer.load_state_dict(state)
        assert layer.ALinear.weight is None
        assert torch.equal(layer(x), y)


def test_loading_neither_floats_nor_integers_is_an_error():
    state = _alrd(prepared=False).state_dict()
    del state["ALinear.weight"]
    with pytest.raises(RuntimeError, match="saved before prepare_int8_weights"):
        _alrd().load_state_dict(state)
    del state["A_int8"], state["A_scale"]
    with pytest.raises(RuntimeError, match=r"Missing key.*A_int8.*A_scale"):
        _alrd().load_state_dict(state)
    wrong = {**_alrd().state_dict(), "A_scale": torch.ones(20, 1).half()}
    with pytest.raises(RuntimeError, match=r"expected A_scale of dtype torch.float32"):
        _alrd().load_state_dict(wrong)
    with pytest.raises(RuntimeError, match="size mismatch for A_int8"):
        _alrd().load_state_dict(
            ALRDLinearINT8(24, 20, 4).from_linear(nn.Linear(24, 20), 4).state_dict()
        )


@pytest.mark.parametrize("keep_float", [True, False])
@pytest.mark.parametrize("duplicate", COPIES[:1] + COPIES[2:])
def test_alrd_copies_keep_every_bit(duplicate, keep_float):
    layer = _alrd()
    with torch.no_grad():
        layer.A_int8[0, 0] = 77  # a copy that quantized anew would lose this
    layer.prepare_int8_weights(keep_float=keep_float)
    x = torch.randn(3, 24)
    y = layer(x)
    other = duplicate(layer)
    _same_state(other, layer)
    assert torch.equal(other(x), y)
    assert other.A_int8[0, 0] == 77
    if keep_float:
        with torch.no_grad():
            other.ALinear.weight.add_(1.0)
        other(x)
        assert _is_of_its_floats(other)
        assert layer.A_int8[0, 0] == 77


@pytest.mark.parametrize("keep_float", [True, False])
def test_alrd_safetensors(tmp_path, keep_float):
    layer = _alrd(dtype=torch.float16)
    layer.prepare_int8_weights(keep_float)
    safetensors.torch.save_file(layer.state_dict(), tmp_path / "a.safetensors")
    other = _alrd(dtype=torch.float16, prepared=False)
    other.load_state_dict(safetensors.torch.load_file(tmp_path / "a.safetensors"))
    _same_state(other, layer)


@pytest.mark.parametrize("cast", CASTS)
def test_alrd_casts_leave_integers_and_scales(cast):
    layer = _alrd()
    before = _buffers(layer)
    layer = CASTS[cast](layer)
    if cast != "double":  # a float64 bias is refused by the op
        layer.forward_int8(torch.randn(2, 8))
    assert torch.equal(layer.A_int8, before["A_int8"])
    assert layer.A_scale.dtype == torch.float32
    assert torch.equal(layer.A_scale, before["A_scale"])
    plain = CASTS[cast](nn.Linear(8, 6))
    assert layer.BLinear.weight.dtype == layer.ALinear.bias.dtype == plain.weight.dtype


def test_alrd_on_meta():
    source = _alrd()
    layer = _alrd("meta", prepared=False)
    assert layer.A_int8.is_meta
    assert layer.A_scale.is_meta
    assert layer(torch.empty(2, 24, device="meta")).shape == (2, 20)
    layer = ALRDLinearINT8.from_linear(nn.Linear(24, 20, device="meta"), 8)
    layer.load_state_dict(source.state_dict(), assign=True)
    _same_state(layer, source)
    x = torch.randn(2, 24)
    assert torch.equal(layer(x), source(x))
    empty = _alrd("meta", prepared=False).to_empty(device="cpu")
    empty.load_state_dict(source.state_dict())
    assert torch.equal(empty(x), source(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_from_linear_is_the_best_approximation(device, dtype):
    linear = nn.Linear(40, 24, device=device, dtype=dtype)
    w = linear.weight.detach().double()
    singular = torch.linalg.svdvals(w)
    for rank in (1, 8, 24):
        layer = ALRDLinearINT8.from_linear(linear, rank)
        a, b = layer.ALinear.weight.double(), layer.BLinear.weight.double()
        error = torch.linalg.norm(a @ b - w)
        best = singular[rank:].square().sum().sqrt()
        assert error <= best + torch.finfo(dtype).eps * torch.linalg.norm(w) * 2
        # The square root of the spectrum on each side.
        column, row = a.norm(dim=0), b.norm(dim=1)
        assert torch.allclose(column, singular[:rank].sqrt(), rtol=torch.finfo(dtype).eps * 4)
        assert torch.allclose(row, singular[:rank].sqrt(), rtol=torch.finfo(dtype).eps * 4)
        assert torch.equal(layer.ALinear.bias, linear.bias)
        assert layer.ALinear.weight.dtype == dtype
        assert _is_of_its_floats(layer)
    assert ALRDLinearINT8.from_linear(nn.Linear(8, 8, bias=False), 4).ALinear.bias is None
    for rank in (0, 25):
        with pytest.raises(ValueError, match=r"expected rank in 1..24 .*got"):
            ALRDLinearINT8.from_linear(linear, rank)


def test_prepare_all():
    model = nn.ModuleDict({"a": _alrd(prepared=False), "b": nn.Sequential(_alrd(prepared=False))})
    assert prepare_all_int8_weights(model) == 2
    assert _is_of_its_floats(model["a"])
    assert prepare_all_int8_weights(model, keep_float=False) == 2
    assert model["b"][0].ALinear.weight is None
    assert prepare_all_int8_weights(nn.Linear(2, 2)) == 0


def test_alrd_repr():
    layer = _alrd(prepared=False)
    assert "rank=8, backend=auto (cpu), int8 weights not prepared" in repr(layer)
    layer.prepare_int8_weights(keep_float=False)
    assert "int8 weights prepared, float A freed" in repr(layer)


# -- the package ----------------------------------------------------------------------------------


def test_import_is_silent_quick_and_leaves_cuda_alone():
    code = """
import time, torch
start = time.perf_counter()
import int8_ops
seconds = time.perf_counter() - start
import sys
assert not torch.cuda.is_initialized()
assert "triton" not in sys.modules and "torch._dynamo" not in sys.modules
print(seconds)
"""
    best = float("inf")
    for _ in range(3):
        result = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        )
        assert result.stderr == ""
        assert len(result.stdout.splitlines()) == 1  # the figure, and nothing of the package's
        best = min(best, float(result.stdout))
    assert best <= 0.3


def test_the_public_names_are_the_contract():
    assert set(int8_ops.__all__) >= {
        "ALRDLinearINT8",
        "INT8Linear",
        "INT8LinearFunction",
        "INT8Quantizer",
        "Quantizer",
        "backend_for",
        "ops",
        "prepare_all_int8_weights",
        "quantize_",
        "__version__",
    }
    assert all(hasattr(int8_ops, name) for name in int8_ops.__all__)


def test_a_call_without_gradient_stays_below_autograd(monkeypatch):
    layer = INT8Linear(torch.randn(6, 8))
    x = torch.randn(1, 8)

    def refuse(*arguments):
        raise AssertionError("an autograd.Function ran where no gradient was wanted")

    with monkeypatch.context() as patch:
        patch.setattr(backends._Linear, "apply", refuse)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            assert layer(x).grad_fn is None
        names = [event.name for event in profile.events()]
        assert names.count("int8_ops::int8_linear") == 1
        with torch.no_grad():
            layer(x.clone().requires_grad_())
    assert layer(x.requires_grad_()).grad_fn is not None


def test_a_copy_of_a_changed_layer_takes_its_integers_along():
    """A deepcopy or pickle after an optimizer step holds the integers of the weight as it is."""
    layer = ALRDLinearINT8.from_linear(nn.Linear(24, 16, bias=False), 8)
    with torch.no_grad():
        layer.ALinear.weight.mul_(2)
    for copied in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        state = copied.state_dict()
        q, scale = INT8Quantizer.quantize_per_channel(layer.ALinear.weight.detach())
        assert torch.equal(state["A_int8"], q)
        assert torch.equal(state["A_scale"], scale)


def test_a_layer_first_used_in_inference_mode_can_be_trained():
    layer = ALRDLinearINT8(24, 16, 8)
    x = torch.randn(3, 24)
    with torch.inference_mode():
        layer(x)
    layer(x).sum().backward()
    assert layer.BLinear.weight.grad is not None


def test_a_refused_load_changes_nothing():
    layer = ALRDLinearINT8(24, 16, 4)
    x = torch.randn(3, 24)
    before = layer(x)
    other = ALRDLinearINT8.from_linear(nn.Linear(24, 16), 8)
    other.prepare_int8_weights(keep_float=False)
    integers = {k: v for k, v in other.state_dict().items() if k.startswith("A_")}
    message = r"size mismatch for A_int8: expected \[16, 4\], got \[16, 8\]"
    with pytest.raises(RuntimeError, match=message):
        layer.load_state_dict(integers)
    assert layer.ALinear.weight is not None
    assert torch.equal(layer(x), before)


def test_floats_loaded_into_a_freed_layer_on_meta_are_not_lost():
    source = ALRDLinearINT8.from_linear(nn.Linear(24, 16), 8)
    floats = {k: v for k, v in source.state_dict().items() if not k.startswith("A_")}
    target = ALRDLinearINT8(24, 16, 8, device="meta")
    target.prepare_int8_weights(keep_float=False)
    target.load_state_dict(floats, strict=False, assign=True)
    assert torch.equal(target.A_int8, source.A_int8)
    assert torch.equal(target.A_scale, source.A_scale)


def test_a_bias_of_no_outputs_gets_its_gradient():
    layer = INT8Linear(torch.empty(0, 8), torch.empty(0))
    layer.bias.requires_grad_()
    layer(torch.randn(3, 8)).sum().backward()
    assert layer.bias.grad.shape == (0,)

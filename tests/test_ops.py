"""The custom ops and their typed functions: numbers, errors, registration, gradient, autocast."""

from __future__ import annotations

import cases
import pytest
import torch

from int8_ops import _extension, ops, reference

pytestmark = pytest.mark.skipif(
    _extension.core.module is None, reason=str(_extension.core.unavailable_reason())
)


class OpsAsBackend:
    """The public functions under the names that ``cases.check`` calls."""

    quantize_per_token = staticmethod(ops.quantize_per_token)
    quantize_per_channel = staticmethod(ops.quantize_per_channel)
    int8_mm = staticmethod(ops.int8_mm)
    int8_scaled_mm = staticmethod(ops.int8_scaled_mm)
    int8_linear = staticmethod(ops.int8_linear)


@pytest.fixture(autouse=True)
def _has_kernels(request):
    if "device" in request.fixturenames:
        reason = _extension.unavailable_reason(request.getfixturevalue("device").type)
        if reason is not None:
            pytest.skip(reason)


@pytest.mark.parametrize("category", cases.NAMED)
def test_named_cases(device, category):
    for case in cases.NAMED[category]():
        cases.check(OpsAsBackend, case, device)


@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("axis", [0, 1])
def test_dequantize(device, dtype, axis):
    for shape in [(5, 7), (1, 1), (33, 130), (2, 3)]:
        q, scale = reference.quantize_per_channel(torch.randn(shape), axis)
        scale[..., :1] = torch.nan if shape == (2, 3) else 1e-3
        got = ops.dequantize(q.to(device), scale.to(device), dtype)
        assert cases.same_bits(got, reference.dequantize(q, scale, dtype))


def test_dequantize_rows_of_any_rank(device):
    for lead in [(), (4,), (2, 3, 4), (0, 3)]:
        q, scale = reference.quantize_per_token(torch.randn(*lead, 9))
        got = ops.dequantize(q.to(device), scale.to(device), torch.float16)
        assert cases.same_bits(got, reference.dequantize(q, scale, torch.float16))


def test_dequantize_errors(device):
    q = torch.zeros(4, 6, dtype=torch.int8, device=device)
    for shape in [(4,), (6, 1), (4, 6), (1, 1, 6)]:
        with pytest.raises(RuntimeError, match="dequantize: expected scale of"):
            ops.dequantize(q, torch.ones(shape, device=device))
    with pytest.raises(RuntimeError, match="expected q of dtype"):
        ops.dequantize(q.float(), torch.ones(4, 1, device=device))
    with pytest.raises(RuntimeError, match="expected scale of dtype"):
        ops.dequantize(q, torch.ones(4, 1, device=device).half())


def _linear_arguments(device, dtype=torch.float32, m=4, k=8, n=6):
    w, w_scale = reference.quantize_per_channel(torch.randn(n, k))
    x = torch.randn(m, k, dtype=dtype)
    return [t.to(device) for t in (x, w, w_scale, torch.randn(n))]


# -- registration ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", cases.DTYPES)
def test_opcheck(device, dtype):
    x, w, w_scale, bias = _linear_arguments(device, dtype)
    a, a_scale = (t.to(device) for t in reference.quantize_per_token(x.cpu()))
    op = torch.ops.int8_ops
    torch.library.opcheck(op.quantize_per_token, (x,))
    torch.library.opcheck(op.quantize_per_channel, (x, 0))
    torch.library.opcheck(op.quantize_per_channel, (x, 1))
    torch.library.opcheck(op.dequantize, (w, w_scale, dtype))
    torch.library.opcheck(op.int8_mm, (a, w))
    torch.library.opcheck(op.int8_scaled_mm, (a, w, a_scale, w_scale, bias, dtype))
    torch.library.opcheck(op.int8_linear, (x, w, w_scale, bias))
    torch.library.opcheck(op.int8_linear, (x.requires_grad_(), w, w_scale, None, torch.float32))


def test_fakes_agree_with_the_kernels(device):
    for case in [*cases.tails(), *cases.small_m(), *cases.layout()]:
        here, meta = case.to(device), case.to(torch.device("meta"))
        pairs = [
            (ops.quantize_per_token(c.x), ops.int8_linear(c.x, c.w, c.w_scale, c.bias, c.out_dtype))
            for c in (here, meta)
        ]
        for real, fake in zip(
            (*pairs[0][0], pairs[0][1]), (*pairs[1][0], pairs[1][1]), strict=True
        ):
            assert fake.is_meta
            assert real.shape == fake.shape
            assert real.dtype == fake.dtype
            assert real.stride() == fake.stride()


def test_fakes_refuse_what_the_kernels_refuse(device):
    x, w, w_scale, bias = _linear_arguments(device)
    wrong = [
        (x.double(), w, w_scale, bias),
        (x[:, :7], w, w_scale, bias),
        (x, w.int(), w_scale, bias),
        (x, w[None], w_scale, bias),
        (x, w, w_scale.half(), bias),
        (x, w, w_scale.t(), bias),
        (x, w, w_scale, bias[:5]),
        (x, w, w_scale, bias.int()),
    ]
    for arguments in wrong:
        with pytest.raises(RuntimeError, match=r"int8_ops.int8_linear: expected"):
            ops.int8_linear(*arguments)
        with pytest.raises(RuntimeError, match=r"int8_ops.int8_linear: expected"):
            ops.int8_linear(*(t.to("meta") for t in arguments))


# -- gradient -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", cases.DTYPES)
def test_gradient(device, dtype):
    x, w, w_scale, bias = _linear_arguments(device, dtype)
    x = x.reshape(2, 2, 8).requires_grad_()
    bias.requires_grad_()
    y = ops.int8_linear(x, w, w_scale, bias)
    grad_y = torch.randn_like(y)
    y.backward(grad_y)
    assert torch.equal(x.grad, grad_y @ ops.dequantize(w, w_scale, dtype))
    assert x.grad.dtype == dtype
    assert torch.equal(bias.grad, grad_y.float().reshape(-1, 6).sum(0))


def test_gradient_with_another_out_dtype(device):
    x, w, w_scale, _ = _linear_arguments(device, torch.float16)
    x.requires_grad_()
    y = ops.int8_linear(x, w, w_scale, None, torch.float32)
    y.sum().backward()
    expected = torch.ones_like(y) @ ops.dequantize(w, w_scale, torch.float32)
    assert torch.equal(x.grad, expected.half())


def test_no_gradient_where_none_is_due(device):
    x, w, w_scale, bias = _linear_arguments(device)
    assert not ops.int8_linear(x, w, w_scale, bias).requires_grad
    w_scale.requires_grad_()
    y = ops.int8_linear(x.requires_grad_(), w, w_scale, bias)
    assert torch.autograd.grad(y.sum(), [w_scale], allow_unused=True) == (None,)
    with torch.no_grad():
        assert not ops.int8_linear(x, w, w_scale, bias).requires_grad


# -- autocast -------------------------------------------------------------------------------------


@pytest.mark.parametrize("wanted", [torch.bfloat16, torch.float16])
def test_autocast_sets_the_result_and_leaves_the_input(device, wanted):
    x, w, w_scale, bias = _linear_arguments(device)
    expected = reference.int8_linear(x.cpu(), w.cpu(), w_scale.cpu(), bias.cpu(), wanted)
    with torch.autocast(device.type, dtype=wanted):
        assert cases.same_bits(ops.int8_linear(x, w, w_scale, bias), expected)
        asked = ops.int8_linear(x, w, w_scale, bias, torch.float32)
    assert asked.dtype == torch.float32
    assert ops.int8_linear(x, w, w_scale, bias).dtype == torch.float32


# -- streams, graphs, devices ---------------------------------------------------------------------


@pytest.mark.gpu
def test_graph_replay_with_changed_inputs():
    device = torch.device("cuda")
    if _extension.unavailable_reason("cuda"):
        pytest.skip(str(_extension.unavailable_reason("cuda")))
    x, w, w_scale, bias = _linear_arguments(device, torch.bfloat16, m=5, k=64, n=48)
    a = torch.randint(-128, 128, (5, 64), dtype=torch.int8, device=device)

    def everything():
        q, scale = ops.quantize_per_token(x)
        return (
            q,
            scale,
            *ops.quantize_per_channel(x, 1),
            ops.dequantize(q, scale, torch.float16),
            ops.int8_mm(a, w),
            ops.int8_scaled_mm(q, w, scale, w_scale, bias, torch.bfloat16),
            ops.int8_linear(x, w, w_scale, bias),
        )

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        everything()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = everything()
    for _ in range(3):
        x.copy_(torch.randn_like(x))
        a.copy_(torch.randint_like(a, -128, 128))
        graph.replay()
        for got, expected in zip(captured, everything(), strict=True):
            assert torch.equal(got, expected)


@pytest.mark.gpu
def test_second_device():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    device = torch.device("cuda", 1)
    assert torch.cuda.current_device() == 0
    for case in [*cases.regular(), *cases.layout()]:
        cases.check(OpsAsBackend, case, device)
    assert torch.cuda.current_device() == 0
    x, w, w_scale, bias = _linear_arguments(device)
    with pytest.raises(RuntimeError, match="two different devices"):
        ops.int8_linear(x.to("cuda:0"), w, w_scale, bias)


@pytest.mark.gpu
def test_runs_on_the_current_stream():
    if _extension.unavailable_reason("cuda"):
        pytest.skip(str(_extension.unavailable_reason("cuda")))
    x, w, w_scale, bias = _linear_arguments(torch.device("cuda"), torch.float16, m=64, k=512, n=512)
    expected = ops.int8_linear(x, w, w_scale, bias)
    torch.cuda.synchronize()
    late = torch.zeros_like(x)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        # The copy waits; an op on another stream would read the zeros.
        torch.cuda._sleep(50_000_000)
        late.copy_(x)
        got = ops.int8_linear(late, w, w_scale, bias)
    side.synchronize()
    assert torch.equal(got, expected)

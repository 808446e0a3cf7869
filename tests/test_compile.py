"""torch.compile, torch.export and CUDA graphs: the same bits as eager, in one graph."""

from __future__ import annotations

import cases
import pytest
import torch
from torch import nn

from int8_ops import (
    ALRDLinearINT8,
    INT8Linear,
    INT8LinearFunction,
    INT8Quantizer,
    Quantizer,
    _extension,
    backends,
    ops,
    reference,
)


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def _needs_kernels(device):
    reason = _extension.unavailable_reason(device.type)
    if reason is not None:
        pytest.skip(reason)


def _all_ops(x, a, w, w_scale, bias):
    q, scale = ops.quantize_per_token(x)
    q_col, scale_col = ops.quantize_per_channel(x, 1)
    return (
        q,
        scale,
        q_col,
        scale_col,
        ops.dequantize(q, scale, torch.float16),
        ops.int8_mm(a, w),
        ops.int8_scaled_mm(q, w, scale, w_scale, bias, torch.bfloat16),
        ops.int8_linear(x, w, w_scale, bias),
    )


def _arguments(m, device, k=32, n=24):
    w, w_scale = reference.quantize_per_channel(torch.randn(n, k))
    a = torch.randint(-128, 128, (m, k), dtype=torch.int8)
    return [t.to(device) for t in (torch.randn(m, k), a, w, w_scale, torch.randn(n))]


def test_ops_fullgraph_dynamic(device):
    _needs_kernels(device)
    compiled = torch.compile(_all_ops, fullgraph=True, dynamic=True)
    for m in (3, 5, 17, 64):
        arguments = _arguments(m, device)
        for got, expected in zip(compiled(*arguments), _all_ops(*arguments), strict=True):
            assert torch.equal(got, expected)


@pytest.mark.parametrize("compiler", ["inductor", "aot_eager"])
def test_linear_fullgraph_dynamic(backend_on, compiler):
    name, device = backend_on
    layer = INT8Linear(torch.randn(24, 32), torch.randn(24), backend=name).to(device)
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=compiler)
    for m in (2, 5, 18):
        x = torch.randn(m, 32, device=device)
        x[0, 0] = torch.nan  # -ffast-math in a fused kernel would lose it
        with torch.no_grad():
            assert cases.same_bits(compiled(x), layer(x).cpu())


def test_linear_gradient_compiled(backend_on):
    name, device = backend_on
    layer = INT8Linear(torch.randn(24, 32), torch.randn(24), backend=name).to(device)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(5, 32, device=device)
    eager, traced = x.clone().requires_grad_(), x.clone().requires_grad_()
    y = compiled(traced)
    y.square().sum().backward()
    layer(eager).square().sum().backward()
    assert torch.equal(traced.grad, eager.grad)


def test_function_compiled(backend_on):
    name, device = backend_on
    w, w_scale = INT8Quantizer.quantize_per_channel(torch.randn(24, 32, device=device))
    bias = torch.randn(24, device=device)

    def call(x):
        return INT8LinearFunction.apply(x, w, w_scale, bias, name)

    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend="aot_eager")
    for m in (2, 7):
        x = torch.randn(m, 32, device=device)
        eager, traced = x.clone().requires_grad_(), x.clone().requires_grad_()
        y, expected = compiled(traced), call(eager)
        assert torch.equal(y, expected)
        y.square().sum().backward()
        expected.square().sum().backward()
        assert torch.equal(traced.grad, eager.grad)


def test_alrd_compiled(backend_on):
    name, device = backend_on
    layer = ALRDLinearINT8(32, 24, 8, backend=name, device=device)
    layer.prepare_int8_weights()

    def call(x):
        q, scale = layer.quantize_latent_int8(layer.BLinear(x))
        fake = layer.quantize_latent(layer.BLinear(x))
        return layer(x), layer.forward_int8(q, scale), fake

    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend="aot_eager")
    for m in (2, 7):
        x = torch.randn(m, 32, device=device)
        for got, expected in zip(compiled(x), call(x), strict=True):
            assert torch.equal(got, expected)
    unprepared = ALRDLinearINT8(32, 24, 8, backend=name, device=device)
    with pytest.raises(Exception, match="call prepare_int8_weights"):
        torch.compile(unprepared, fullgraph=True, backend="aot_eager")(x)


def test_fake_quantizer_compiled():
    quantizer = Quantizer(4, group_size=16, sym=False)
    x = torch.randn(3, 32)
    compiled = torch.compile(quantizer, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), quantizer(x))


def test_compiled_under_autocast(device):
    layer = INT8Linear(torch.randn(24, 32)).to(device)
    x = torch.randn(4, 32, device=device)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with torch.no_grad(), torch.autocast(device.type, dtype=torch.bfloat16):
        got, expected = compiled(x), layer(x)
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, expected)


def test_a_compiled_call_names_two_devices():
    layer = INT8Linear(torch.randn(24, 32))
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with pytest.raises(Exception, match="device"):
        compiled(torch.randn(2, 32, device="meta"))
    assert layer.weight.device.type == "cpu"


class TwoLayers(nn.Module):
    def __init__(self, device, backend):
        super().__init__()
        self.first = INT8Linear(torch.randn(48, 32), torch.randn(48), backend=backend).to(device)
        self.second = ALRDLinearINT8(48, 16, 8, device=device, backend=backend)
        self.second.prepare_int8_weights()

    def forward(self, x):
        return self.second(torch.relu(self.first(x)))


def test_export(backend_on):
    name, device = backend_on
    model = TwoLayers(device, name).eval()
    x = torch.randn(4, 32, device=device)
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: batch},))
    with torch.no_grad():
        for m in (2, 9):
            x = torch.randn(m, 32, device=device)
            assert torch.equal(program.module()(x), model(x))
    names = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert any(n.startswith("int8_ops.int8_linear") for n in names)


@pytest.mark.gpu
def test_reduce_overhead_replays_with_changed_inputs(backend_on):
    name, device = backend_on
    if device.type != "cuda":
        pytest.skip("CUDA graphs are of CUDA")
    model = TwoLayers(device, name).eval()
    compiled = torch.compile(model, fullgraph=True, mode="reduce-overhead")
    with torch.no_grad():
        for _ in range(5):
            x = torch.randn(6, 32, device=device)
            torch.compiler.cudagraph_mark_step_begin()
            got = compiled(x).clone()
            assert torch.equal(got, model(x))


@pytest.mark.gpu
def test_ops_reduce_overhead():
    device = torch.device("cuda")
    _needs_kernels(device)
    compiled = torch.compile(_all_ops, fullgraph=True, mode="reduce-overhead")
    for _ in range(4):
        arguments = _arguments(9, device)
        torch.compiler.cudagraph_mark_step_begin()
        got = [t.clone() for t in compiled(*arguments)]
        for one, expected in zip(got, _all_ops(*arguments), strict=True):
            assert torch.equal(one, expected)


@pytest.mark.gpu
def test_module_graph_replay_with_changed_inputs(backend_on):
    name, device = backend_on
    if device.type != "cuda":
        pytest.skip("CUDA graphs are of CUDA")
    model = TwoLayers(device, name).eval()
    x = torch.randn(6, 32, device=device)
    with torch.no_grad():
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                model(x)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = model(x)
        for _ in range(3):
            x.copy_(torch.randn_like(x))
            graph.replay()
            assert torch.equal(captured, model(x))


def test_the_tracer_sees_the_native_op_where_there_is_one(device):
    _needs_kernels(device)
    assert backends._is_native("auto", device.type)
    graphs = []

    def keep(graph, inputs):
        graphs.append(graph)
        return graph.forward

    layer = INT8Linear(torch.randn(24, 32)).to(device)
    torch.compile(layer, backend=keep)(torch.randn(2, 32, device=device))
    targets = {str(node.target) for node in graphs[0].graph.nodes}
    assert "int8_ops.int8_linear.default" in targets

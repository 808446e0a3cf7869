"""The registry, and every backend against the reference, bit for bit."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import cases
import pytest
import torch

import int8_ops
from int8_ops import _extension, backends, reference
from int8_ops.backends import torch_int_mm

RANDOM_CASES = 2000


@pytest.mark.parametrize("category", cases.NAMED)
def test_named_cases(backend_on, category):
    name, device = backend_on
    module = backends.select(name, device)
    for case in cases.NAMED[category]():
        cases.check(module, case, device)


def test_random_cases(backend_on, one_thread):
    name, device = backend_on
    module = backends.select(name, device)
    for case in cases.random_cases(RANDOM_CASES):
        cases.check(module, case, device)


def _arguments(device):
    x = torch.randn(4, 8, device=device)
    w = torch.randint(-128, 128, (6, 8), dtype=torch.int8, device=device)
    return x, w, torch.ones(6, 1, device=device), torch.zeros(6, device=device)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.float64}, "expected x of dtype Float, Half or BFloat16"),
        ({"w": torch.int32}, "expected w of dtype"),
        ({"w_scale": torch.float16}, "expected w_scale of dtype"),
        ({"bias": torch.int32}, "expected bias of dtype Float, Half or BFloat16"),
        ({"x": (4, 7)}, r"same last dimension K, got x \[4, 7\] and w \[6, 8\]"),
        ({"x": ()}, "at least 1 dimension"),
        ({"w": (2, 6, 8)}, r"expected w of shape \[N, K\], got \[2, 6, 8\]"),
        ({"w_scale": (6,)}, r"expected w_scale of shape \[6, 1\], got \[6\]"),
        ({"w_scale": (1, 6)}, r"expected w_scale of shape \[6, 1\], got \[1, 6\]"),
        ({"bias": (5,)}, r"expected bias of shape \[6\], got \[5\]"),
        ({"x": (4, 0), "w": (6, 0)}, "last dimension of at least 1"),
        (
            {"x": (1, reference.MAX_K + 1), "w": (6, reference.MAX_K + 1)},
            "over the limit of 131071",
        ),
    ],
    ids=str,
)
def test_errors_are_named(backend_on, change, message):
    name, device = backend_on
    module = backends.select(name, device)
    arguments = dict(zip(("x", "w", "w_scale", "bias"), _arguments(device), strict=True))
    for key, value in change.items():
        old = arguments[key]
        arguments[key] = (
            old.to(value)
            if isinstance(value, torch.dtype)
            else torch.ones(value, dtype=old.dtype, device=device)
        )
    with pytest.raises(RuntimeError, match=message):
        module.int8_linear(*arguments.values(), None)


def test_errors_of_the_other_functions(backend_on):
    name, device = backend_on
    module = backends.select(name, device)
    x, w, w_scale, _ = _arguments(device)
    with pytest.raises(RuntimeError, match="expected a of dtype"):
        module.int8_mm(x, w)
    with pytest.raises(RuntimeError, match="a_scale of a's shape"):
        module.int8_scaled_mm(w, w, w_scale.t(), w_scale, None, torch.float32)
    with pytest.raises(RuntimeError, match="Float, Half or BFloat16"):
        module.int8_scaled_mm(w, w, w_scale, w_scale, None, torch.float64)
    with pytest.raises(RuntimeError, match="Float, Half or BFloat16"):
        module.quantize_per_token(w)
    with pytest.raises(RuntimeError, match=r"expected axis 0 or 1 \(or -2, -1\), got 2"):
        module.quantize_per_channel(x, 2)
    with pytest.raises(RuntimeError, match=r"expected w of shape \[N, K\]"):
        module.quantize_per_channel(x[None], 0)
    with pytest.raises(RuntimeError, match="at least one row"):
        module.quantize_per_channel(x[:0], 1)


@pytest.mark.gpu
def test_two_devices_are_named(backend_on):
    name, device = backend_on
    module = backends.select(name, device)
    x, w, w_scale, bias = _arguments(device)
    other = torch.device("cpu" if device.type == "cuda" else "cuda")
    for wrong in (
        (x, w.to(other), w_scale, bias),
        (x, w, w_scale.to(other), bias),
        (x, w, w_scale, bias.to(other)),
    ):
        with pytest.raises(RuntimeError, match="two different devices"):
            module.int8_linear(*wrong, None)


# -- the registry ---------------------------------------------------------------------------------


def test_every_backend_is_listed_with_a_reason_or_none():
    listed = int8_ops.available_backends()
    assert list(listed) == ["cuda", "cpu", "triton", "torch", "fallback"]
    assert listed["cpu"] is None
    assert listed["fallback"] is None
    assert all(reason is None or len(reason) > 10 for reason in listed.values())


def test_auto_picks_by_device(device):
    expected = "cpu" if device.type == "cpu" else None
    picked = int8_ops.backend_for(device)
    assert picked == expected or (device.type == "cuda" and picked != "cpu")
    assert int8_ops.backend_for(torch.empty(1, device=device)) == picked
    assert int8_ops.backend_for(str(device)) == picked
    assert int8_ops.backend_for("meta") == "fallback"


def test_auto_order_on_cuda(monkeypatch):
    absent: set[str] = set()
    monkeypatch.setattr(
        backends,
        "unavailable_reason",
        lambda name, device=None: "gone" if name in absent or name == "cpu" else None,
    )
    order = []
    for _ in range(4):
        order.append(backends.backend_for("cuda"))
        absent.add(order[-1])
    assert order == ["cuda", "triton", "torch", "fallback"]
    with pytest.raises(RuntimeError, match="no backend can run on cuda: cuda: gone; cpu: gone"):
        backends.backend_for("cuda")


def test_a_named_backend_is_refused_never_replaced():
    with pytest.raises(RuntimeError, match="backend 'cuda' cannot be used on cpu: it takes cuda"):
        int8_ops.backend_for("cpu", "cuda")
    with pytest.raises(RuntimeError, match=r"'torch' cannot be used on cpu: .*CUDA only"):
        int8_ops.backend_for("cpu", "torch")
    with pytest.raises(ValueError, match="unknown backend 'cutlass': expected one of auto, cuda"):
        int8_ops.backend_for("cpu", "cutlass")
    with pytest.raises(RuntimeError, match="'cuda' cannot be used on cpu"):
        int8_ops.INT8Quantizer.quantize_per_token(torch.randn(2, 2), backend="cuda")


def test_a_missing_triton_is_a_reason(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    for loaded in [name for name in sys.modules if name.startswith("int8_ops.backends.triton")]:
        monkeypatch.delitem(sys.modules, loaded)
    reason = int8_ops.available_backends()["triton"]
    assert reason is not None
    assert "triton" in reason


def test_int_mm_is_padded_within_its_limits(monkeypatch, one_thread):
    calls = []

    def strict_int_mm(a, b):
        assert a.shape[0] > 16
        assert a.shape[1] % 8 == 0
        assert b.shape[1] % 8 == 0
        assert a.is_contiguous()
        assert b.t().is_contiguous()
        calls.append((a.shape, b.shape))
        return (a.to(torch.int64) @ b.to(torch.int64)).to(torch.int32)

    monkeypatch.setattr(torch, "_int_mm", strict_int_mm)
    cpu = torch.device("cpu")
    for category in cases.NAMED.values():
        for case in category():
            cases.check(torch_int_mm, case, cpu)
    for case in cases.random_cases(300, seed=1):
        cases.check(torch_int_mm, case, cpu)
    assert len(calls) > 300


def test_int_mm_is_never_used_on_a_cpu():
    assert "can be wrong" in torch_int_mm.unavailable_reason(torch.device("cpu"))


def test_the_op_that_names_a_backend_passes_opcheck(backend_on):
    name, device = backend_on
    x, w, w_scale, bias = _arguments(device)
    ops = torch.ops.int8_ops
    torch.library.opcheck(ops.quantize_per_token_via, (x, name))
    torch.library.opcheck(ops.quantize_per_channel_via, (x, 1, name))
    torch.library.opcheck(
        ops.int8_scaled_mm_via, (w, w, w_scale, w_scale, bias, torch.float16, name)
    )
    torch.library.opcheck(
        ops.int8_linear_via, (x.requires_grad_(), w, w_scale, bias, torch.float16, name)
    )


# -- a package whose compiled modules are absent --------------------------------------------------


def _run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False
    )


def test_without_the_core_module_the_fallback_serves_and_ops_tell_why():
    result = _run(
        """
        import sys
        sys.modules["int8_ops._C"] = None
        import torch, int8_ops
        from int8_ops import reference
        x, w = torch.randn(3, 8), torch.randn(5, 8)
        assert int8_ops.backend_for("cpu") == "fallback"
        assert "int8_ops._C could not be loaded" in int8_ops.available_backends()["cpu"]
        layer = int8_ops.INT8Linear(w)
        q, scale = reference.quantize_per_channel(w)
        expected = reference.int8_linear(x, q, scale)
        assert torch.equal(layer(x), expected)
        x.requires_grad_()
        layer(x).sum().backward()
        assert torch.equal(x.grad, torch.ones(3, 5) @ reference.dequantize(q, scale))
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(x), expected)
        for call in (
            lambda: int8_ops.ops.int8_mm(q, q),
            lambda: int8_ops.ops.quantize_per_token(x),
            lambda: int8_ops.INT8Linear(w, backend="cpu")(x),
        ):
            try:
                call()
            except RuntimeError as error:
                assert "int8_ops._C could not be loaded" in str(error), error
                assert "pip install --no-build-isolation ." in str(error), error
            else:
                raise AssertionError("no error")
        """
    )
    assert result.returncode == 0, result.stderr


@pytest.mark.skipif(_extension.cuda.module is not None, reason="the CUDA module is built here")
def test_without_the_cuda_module_the_reason_is_given():
    reason = int8_ops.available_backends()["cuda"]
    assert reason is not None
    assert "built without CUDA kernels" in reason or "could not be loaded" in reason
    # The dispatcher would print a table of its keys; these print the reason.
    for name in _extension.OP_NAMES:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"int8_ops::{name}", "CUDA")

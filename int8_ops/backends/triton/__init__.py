"""The ``triton`` backend: this library's kernels written in Triton, for CUDA devices.

Bit for bit the numbers of ``int8_ops.reference``. Triton is imported at the first call, so that
importing the package costs nothing where the backend is not used. Under ``torch.compile`` and
``torch.export`` the calls become ops of the namespace ``int8_ops_triton``, opaque to the tracer:
a shape is tuned when the compiled code first runs, not while it is traced.
"""

# torch.library's own functions carry no types.
# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from types import ModuleType

import torch
from torch import Tensor

from ... import _fake
from . import checks

MIN_CAPABILITY = (8, 0)


@functools.cache
def _import_error() -> str | None:
    try:
        importlib.import_module(f"{__name__}.launch")
    except ImportError as error:
        return f"triton can't be imported: {type(error).__name__}: {error}"
    return None


@functools.cache
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None


@functools.cache
def _launch() -> ModuleType:
    return importlib.import_module(f"{__name__}.launch")


def unavailable_reason(device: torch.device | None = None) -> str | None:
    """Why the backend can't run (on ``device``, or anywhere without one); None when it can.

    With ``TRITON_INTERPRET=1`` set before the first use, the kernels run on CPU tensors, slowly,
    under Triton's interpreter.
    """
    if not _installed():
        return "triton is not installed: pip install triton"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return _import_error()
    if device is not None and device.type != "cuda":
        return f"triton kernels run on CUDA devices, this one is {device}"
    if torch.version.cuda is None:
        return f"triton kernels need a CUDA build of torch, this one is {torch.__version__}"
    if not torch.cuda.is_available():
        return "triton kernels need a CUDA device, none is available"
    capability = torch.cuda.get_device_capability(device)
    if capability < MIN_CAPABILITY:
        return (
            f"triton kernels need compute capability {MIN_CAPABILITY[0]}.{MIN_CAPABILITY[1]}, "
            f"this device has {capability[0]}.{capability[1]}"
        )
    return _import_error()


def _require(op: str, device: torch.device) -> ModuleType:
    # A CUDA tensor of a capable device is every call but the first: keep it cheap.
    if device not in _usable:
        reason = unavailable_reason(device)
        if reason is not None:
            raise RuntimeError(f"int8_ops.{op} (triton): {reason}")
        _usable.add(device)
    return _launch()


_usable: set[torch.device] = set()


def _quantize_per_token(x: Tensor) -> tuple[Tensor, Tensor]:
    op = "quantize_per_token"
    checks.rows(op, "x", x)
    checks.float_dtype(op, "x", x.dtype)
    launch = _require(op, x.device)
    q = x.new_empty(x.shape, dtype=torch.int8)
    scale = x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)
    if q.numel() > 0:
        launch.quantize_rows(x.contiguous(), q, scale)
    return q, scale


def _quantize_per_channel(w: Tensor, axis: int = 0) -> tuple[Tensor, Tensor]:
    op = "quantize_per_channel"
    checks.columns(op, w, axis)
    launch = _require(op, w.device)
    per_row = axis % 2 == 0
    q = w.new_empty(w.shape, dtype=torch.int8)
    scale_shape = (w.shape[0], 1) if per_row else (1, w.shape[1])
    scale = w.new_empty(scale_shape, dtype=torch.float32)
    if per_row:
        if q.numel() > 0:
            launch.quantize_rows(w.contiguous(), q, scale)
    else:
        launch.quantize_columns(w.contiguous(), q, scale)
    return q, scale


def _int8_mm(a: Tensor, w: Tensor) -> Tensor:
    op = "int8_mm"
    checks.matmul_operands(op, "a", a, w)
    checks.int8_operand(op, "a", a)
    launch = _require(op, a.device)
    out = a.new_empty((*a.shape[:-1], w.shape[0]), dtype=torch.int32)
    if out.numel() > 0:
        launch.matmul(a.contiguous(), w.contiguous(), out)
    return out


def _int8_scaled_mm(
    a: Tensor,
    w: Tensor,
    a_scale: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    op = "int8_scaled_mm"
    checks.matmul_operands(op, "a", a, w)
    checks.int8_operand(op, "a", a)
    checks.a_scale(op, a_scale, a)
    checks.w_scale(op, w_scale, w)
    checks.bias(op, bias, w)
    checks.float_dtype(op, "out_dtype", out_dtype)
    launch = _require(op, a.device)
    out = a.new_empty((*a.shape[:-1], w.shape[0]), dtype=out_dtype)
    if out.numel() > 0:
        launch.matmul(
            a.contiguous(),
            w.contiguous(),
            out,
            a_scale.contiguous(),
            w_scale.contiguous(),
            None if bias is None else bias.contiguous(),
        )
    return out


def _int8_linear(
    x: Tensor,
    w: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    op = "int8_linear"
    checks.matmul_operands(op, "x", x, w)
    checks.float_dtype(op, "x", x.dtype)
    checks.w_scale(op, w_scale, w)
    checks.bias(op, bias, w)
    out_dtype = x.dtype if out_dtype is None else out_dtype
    checks.float_dtype(op, "out_dtype", out_dtype)
    launch = _require(op, x.device)
    out = x.new_empty((*x.shape[:-1], w.shape[0]), dtype=out_dtype)
    if out.numel() > 0:
        q = x.new_empty(x.shape, dtype=torch.int8)
        scale = x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)
        launch.quantize_rows(x.contiguous(), q, scale)
        launch.matmul(
            q,
            w.contiguous(),
            out,
            scale,
            w_scale.contiguous(),
            None if bias is None else bias.contiguous(),
        )
    return out


def _register_ops() -> torch.library.Library:
    """The ops that a traced call becomes. Eager calls skip them: a dispatch costs host time."""
    library = torch.library.Library("int8_ops_triton", "DEF")
    for schema, implementation, fake in (
        (
            "quantize_per_token(Tensor x) -> (Tensor, Tensor)",
            _quantize_per_token,
            _fake._quantize_per_token,
        ),
        (
            "quantize_per_channel(Tensor w, int axis=0) -> (Tensor, Tensor)",
            _quantize_per_channel,
            _fake._quantize_per_channel,
        ),
        ("int8_mm(Tensor a, Tensor w) -> Tensor", _int8_mm, _fake._int8_mm),
        (
            "int8_scaled_mm(Tensor a, Tensor w, Tensor a_scale, Tensor w_scale, Tensor? bias, "
            "ScalarType out_dtype) -> Tensor",
            _int8_scaled_mm,
            _fake._int8_scaled_mm,
        ),
        (
            "int8_linear(Tensor x, Tensor w, Tensor w_scale, Tensor? bias, "
            "ScalarType? out_dtype=None) -> Tensor",
            _int8_linear,
            _fake._int8_linear,
        ),
    ):
        name = schema.partition("(")[0]
        library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        for key in ("CUDA", "CPU"):  # CPU: under the interpreter
            library.impl(name, implementation, key)
        torch.library.register_fake(f"int8_ops_triton::{name}", fake, lib=library)
    return library


_library = _register_ops()


def quantize_per_token(x: Tensor) -> tuple[Tensor, Tensor]:
    """``x [..., K]`` float -> ``q`` int8 ``[..., K]``, ``scale`` float32 ``[..., 1]``.

    Raises RuntimeError for another dtype, an empty last dimension or a device without the backend.
    """
    if torch.compiler.is_compiling():
        q, scale = torch.ops.int8_ops_triton.quantize_per_token.default(x)
        return q, scale
    return _quantize_per_token(x)


def quantize_per_channel(w: Tensor, axis: int = 0) -> tuple[Tensor, Tensor]:
    """``w [N, K]`` float -> int8 and a scale a row ``[N, 1]`` (axis 0) or a column ``[1, K]``.

    Raises RuntimeError for another dtype, shape or axis, or a device without the backend.
    """
    if torch.compiler.is_compiling():
        q, scale = torch.ops.int8_ops_triton.quantize_per_channel.default(w, axis)
        return q, scale
    return _quantize_per_channel(w, axis)


def int8_mm(a: Tensor, w: Tensor) -> Tensor:
    """``a [..., K]``, ``w [N, K]``, int8 -> the exact int32 sums ``[..., N]``.

    Raises RuntimeError for other dtypes, a K that differs or is over the limit, two devices.
    """
    if torch.compiler.is_compiling():
        out: Tensor = torch.ops.int8_ops_triton.int8_mm.default(a, w)
        return out
    return _int8_mm(a, w)


def int8_scaled_mm(
    a: Tensor,
    w: Tensor,
    a_scale: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    """``int8_mm``, then ``(float(acc) * a_scale) * w_scale + bias`` -> ``out_dtype [..., N]``.

    ``a_scale`` float32 ``[..., 1]``, ``w_scale`` float32 ``[N, 1]``, ``bias`` float32, float16 or
    bfloat16 ``[N]``. Raises RuntimeError where an argument is anything else.
    """
    if torch.compiler.is_compiling():
        out: Tensor = torch.ops.int8_ops_triton.int8_scaled_mm.default(
            a, w, a_scale, w_scale, bias, out_dtype
        )
        return out
    return _int8_scaled_mm(a, w, a_scale, w_scale, bias, out_dtype)


def int8_linear(
    x: Tensor,
    w: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Quantize ``x [..., K]`` per token, multiply by ``w [N, K]``, scale, add the bias.

    Returns ``[..., N]`` in ``out_dtype``, by default x's. Raises RuntimeError as the ops it is
    made of.
    """
    if torch.compiler.is_compiling():
        out: Tensor = torch.ops.int8_ops_triton.int8_linear.default(x, w, w_scale, bias, out_dtype)
        return out
    return _int8_linear(x, w, w_scale, bias, out_dtype)

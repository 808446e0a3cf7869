"""The ``cpu`` and ``cuda`` backends: this library's own kernels, through its custom ops.

The functions run below autograd: gradients are attached one level up (``backends.int8_linear``),
and the autograd layer of a Python-registered formula costs more host time than the op itself
(about 3 us of 7 on the CPU; see Note [Host cost] in nn/linear.py).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _extension

# Filled in at import; stays empty when the compiled module did not load, which ``select`` reports
# before any of these functions can be reached.
_OPS: dict[str, Any] = {}
if _extension.core.module is not None:
    _OPS = {name: getattr(torch.ops.int8_ops, name).default for name in _extension.OP_NAMES}
_int8_linear: Any = _OPS.get("int8_linear")
_BelowAutograd: Any = torch._C._AutoDispatchBelowAutograd


def unavailable_reason(device: torch.device | None = None) -> str | None:
    """Why the compiled ops cannot run on ``device`` (None: on the CPU); None when they can."""
    return _extension.unavailable_reason("cpu" if device is None else device.type)


def quantize_per_token(x: Tensor) -> tuple[Tensor, Tensor]:
    """``x [..., K]`` -> int8 ``[..., K]``, float32 ``[..., 1]``."""
    q, scale = _OPS["quantize_per_token"](x)
    return q, scale


def quantize_per_channel(w: Tensor, axis: int = 0) -> tuple[Tensor, Tensor]:
    """``w [N, K]`` -> int8 ``[N, K]``, float32 ``[N, 1]`` (axis 0) or ``[1, K]`` (axis 1)."""
    q, scale = _OPS["quantize_per_channel"](w, axis)
    return q, scale


def int8_mm(a: Tensor, w: Tensor) -> Tensor:
    """int8 ``a [..., K]``, ``w [N, K]`` -> int32 ``[..., N]``."""
    out: Tensor = _OPS["int8_mm"](a, w)
    return out


def int8_scaled_mm(
    a: Tensor,
    w: Tensor,
    a_scale: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    """``int8_mm`` with the scale epilogue -> ``out_dtype [..., N]``."""
    out: Tensor = _OPS["int8_scaled_mm"](a, w, a_scale, w_scale, bias, out_dtype)
    return out


def int8_linear(
    x: Tensor,
    w: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """``x [..., K]`` -> ``out_dtype`` (x's by default) ``[..., N]``, without gradient."""
    with _BelowAutograd():
        out: Tensor = _int8_linear(x, w, w_scale, bias, out_dtype)
    return out

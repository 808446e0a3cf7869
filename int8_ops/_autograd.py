"""The gradient of ``int8_linear``: straight-through for x, a sum for the bias, none for weights.

The forward rounds x to int8; its backward treats that rounding as the identity, so
``grad_x = grad_y @ dequantize(w)`` in the gradient's dtype (Bengio et al. 2013, arXiv:1308.3432).
The int8 weight and its scale are constants and get no gradient. The bias gets ``sum(grad_y)``,
added up in float32, in torch's order, and rounded to the bias's dtype.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import _extension


def dequantize(q: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """``q * scale`` in float32, rounded once: the op, or the same bits in PyTorch without it."""
    if _extension.covers(q.device.type):
        out: Tensor = torch.ops.int8_ops.dequantize.default(q, scale, dtype)
        return out
    return (q.to(torch.float32) * scale).to(dtype)


def grad_x(grad_y: Tensor, w: Tensor, w_scale: Tensor) -> Tensor:
    """``grad_y [..., N]``, int8 ``w [N, K]`` and its scale ``[N, 1]`` -> ``[..., K]``."""
    return grad_y @ dequantize(w, w_scale, grad_y.dtype)


def grad_bias(grad_y: Tensor, dtype: torch.dtype) -> Tensor:
    """``grad_y [..., N]`` summed over all but the last dimension, in float32 -> ``[N]``."""
    rows = list(range(grad_y.dim() - 1))
    summed = grad_y.sum(rows, dtype=torch.float32) if rows else grad_y
    return summed.to(dtype)


def save_for_backward(ctx: Any, x: Tensor, w: Tensor, w_scale: Tensor, bias: Tensor | None) -> None:
    """Keep what ``gradients`` needs: the int8 weight, not its float copy."""
    ctx.save_for_backward(w, w_scale)
    ctx.x_dtype = x.dtype
    ctx.bias_dtype = None if bias is None else bias.dtype


def gradients(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """(grad of x, grad of bias), each None where it is not needed."""
    w, w_scale = ctx.saved_tensors
    x = grad_x(grad_y, w, w_scale).to(ctx.x_dtype) if ctx.needs_input_grad[0] else None
    wants_bias = ctx.bias_dtype is not None and ctx.needs_input_grad[3]
    return x, grad_bias(grad_y, ctx.bias_dtype) if wants_bias else None


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    save_for_backward(ctx, *inputs[:4])


def register(op: str, inputs: int, lib: torch.library.Library | None = None) -> None:
    """Attach the gradient to an op that takes (x, w, w_scale, bias, ...), ``inputs`` in all."""

    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        x, bias = gradients(ctx, grad_y)
        return (x, None, None, bias, *([None] * (inputs - 4)))

    torch.library.register_autograd(op, backward, setup_context=_setup_context, lib=lib)

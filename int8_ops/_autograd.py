"""The gradient of ``int8_linear``: straight-through for x, none for weights, scales and bias.

The forward rounds x to int8; its backward treats that rounding as the identity, so
``grad_x = grad_y @ dequantize(w)`` in the gradient's dtype (Bengio et al. 2013, arXiv:1308.3432).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def grad_x(grad_y: Tensor, w: Tensor, w_scale: Tensor) -> Tensor:
    """``grad_y [..., N]``, int8 ``w [N, K]`` and its scale ``[N, 1]`` -> ``[..., K]``."""
    dequantize = torch.ops.int8_ops.dequantize.default
    return grad_y @ dequantize(w, w_scale, grad_y.dtype)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, w, w_scale = inputs[:3]
    ctx.save_for_backward(w, w_scale)
    ctx.x_dtype = x.dtype


def _backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
    w, w_scale = ctx.saved_tensors
    grad = grad_x(grad_y, w, w_scale).to(ctx.x_dtype) if ctx.needs_input_grad[0] else None
    return grad, None, None, None, None


def register() -> None:
    """Attach the gradient to the op; called once, when the package is imported."""
    torch.library.register_autograd(
        "int8_ops::int8_linear", _backward, setup_context=_setup_context
    )

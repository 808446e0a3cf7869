"""``INT8Linear``: a linear layer that holds its weight as int8, and the function behind it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .. import _autograd, _checks, backends
from ..quantizer import INT8Quantizer
from ._state import apply_keeping_dtypes, describe_backend, dtype_errors

__all__ = ["INT8Linear", "INT8LinearFunction"]


class INT8LinearFunction(torch.autograd.Function):
    """``INT8LinearFunction.apply(x, w_int8, w_scale, bias=None, backend="auto")``.

    Quantizes ``x [..., K]`` per token, multiplies by int8 ``w_int8 [N, K]``, applies the scales
    (``w_scale`` float32 ``[N, 1]``) and the bias ``[N]``; returns ``[..., N]`` in x's dtype, or in
    autocast's where that is on. The gradient of x is straight-through,
    ``grad_y @ dequantize(w)`` in grad_y's dtype; the bias gets its own, the weight none.

    Raises RuntimeError for wrong shapes, dtypes or devices and for a backend that cannot be used,
    ValueError for an unknown backend.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        w_int8: Tensor,
        w_scale: Tensor,
        bias: Tensor | None = None,
        backend: str = "auto",
    ) -> Tensor:
        """See the class."""
        _autograd.save_for_backward(ctx, x, w_int8, w_scale, bias)
        return backends.int8_linear(x, w_int8, w_scale, bias, None, backend)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients of x and of the bias."""
        x, bias = _autograd.gradients(ctx, grads[0])
        return x, None, None, bias, None


# Note [Host cost]
# At M = 1 a layer costs what its Python and its dispatch cost. So forward looks its buffers up in
# the dictionary (nn.Module.__getattr__ is slower than the checks it would serve), remembers which
# backend function serves the device it saw last, and, where no gradient is wanted, runs it below
# autograd: a formula registered from Python costs more than the whole op.


class INT8Linear(nn.Module):
    """``y = x @ dequantize(weight).T + bias`` in int8: the weight is quantized once, x per token.

    Buffers: ``weight`` int8 ``[out_features, in_features]``, ``weight_scale`` float32
    ``[out_features, 1]``, ``bias`` ``[out_features]`` or None. There is no float copy of the
    weight. ``.half()``, ``.to(bfloat16)`` and the like cast the bias, as they do nn.Linear's, and
    leave the integers and the scales as they are.

    Device: a layer built here from CPU tensors and never moved goes, at its first call, to the
    device of its input. Any ``.to()`` or the like, that first call, and ``from_linear`` or
    ``from_quantized`` settle where it lives; from then on an input elsewhere is an error.

    Args:
        weight: float32, float16 or bfloat16 ``[out_features, in_features]``; it may be on meta.
        bias: floating ``[out_features]``, or None. Copied.
        backend: ``"auto"`` or a backend's name (``int8_ops.backends``). A name is only looked up
            here; whether that backend can run is asked when there is an input to run it on.

    Raises:
        RuntimeError: a wrong shape or dtype.
        ValueError: an unknown backend.
    """

    weight: Tensor
    weight_scale: Tensor
    bias: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor | None = None, backend: str = "auto") -> None:
        """Quantize ``weight``; see the class."""
        super().__init__()
        q, scale = INT8Quantizer.quantize_per_channel(weight.detach())
        bias = None if bias is None else bias.detach().clone()
        self._set_up(q, scale, bias, backend)
        self._follows_input = q.device.type == "cpu"

    def _set_up(self, q: Tensor, scale: Tensor, bias: Tensor | None, backend: str) -> None:
        _check_quantized(q, scale, bias)
        self.backend = backends.check_name(backend)
        self.out_features, self.in_features = q.shape
        self.register_buffer("weight", q)
        self.register_buffer("weight_scale", scale)
        self.register_buffer("bias", bias)
        self._follows_input = False
        self._forget_route()

    @classmethod
    def from_linear(cls, linear: nn.Linear, backend: str = "auto") -> INT8Linear:
        """The int8 form of an ``nn.Linear``, on the same device, in the same training mode."""
        layer = cls(linear.weight, linear.bias, backend)
        layer._follows_input = False
        return layer.train(linear.training)

    @classmethod
    def from_quantized(
        cls, q: Tensor, scale: Tensor, bias: Tensor | None = None, backend: str = "auto"
    ) -> INT8Linear:
        """A layer around integers that exist: int8 ``q [N, K]``, float32 ``scale [N, 1]``."""
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer._set_up(q.detach(), scale.detach(), None if bias is None else bias.detach(), backend)
        return layer

    def extra_repr(self) -> str:
        """Shapes, the backend asked for, and what ``auto`` picks where the layer is."""
        follows = ", follows its first input" if self._follows_input else ""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, "
            f"backend={describe_backend(self.backend, self.weight.device)}{follows}"
        )

    def forward(self, x: Tensor) -> Tensor:
        """Floating ``x [..., in_features]`` -> ``[..., out_features]`` in x's dtype, or autocast's.

        Raises RuntimeError for a wrong shape or dtype, for an input on another device than the
        layer, and for a backend that cannot be used there.
        """
        if torch.compiler.is_compiling():
            return backends.int8_linear(
                x, self.weight, self.weight_scale, self.bias, None, self.backend
            )
        if x.device != self._device:
            self._settle(x.device)
        buffers = self._buffers
        w, scale, bias = buffers["weight"], buffers["weight_scale"], buffers["bias"]
        if x.requires_grad or (bias is not None and bias.requires_grad):
            # The backend's front end looks at the grad mode, and at autocast.
            return backends.int8_linear(x, w, scale, bias, None, self.backend)  # type: ignore[arg-type]
        out_dtype = backends.autocast_dtype(self._device_type)
        y: Tensor = self._linear(x, w, scale, bias, out_dtype)
        return y

    def _forget_route(self) -> None:
        self._device: torch.device | None = None
        self._device_type = ""
        self._linear: Any = None

    def _settle(self, device: torch.device) -> None:
        """Choose the backend function for ``device``; follow the input there if that is due."""
        here = self.weight.device
        if device != here:
            if not self._follows_input or device.type == "meta":
                raise RuntimeError(
                    f"INT8Linear: expected x on {here}, where the layer is, got x on {device}, two "
                    f"different devices; move the layer with .to({str(device)!r})"
                )
            # The buffers outlive the call: made in inference mode, they could not be trained with.
            with torch.inference_mode(False), torch.no_grad():
                for name, buffer in self._buffers.items():
                    self._buffers[name] = None if buffer is None else buffer.to(device)
        linear = backends.linear_function(self.backend, device)
        self._device, self._device_type, self._linear = device, device.type, linear
        self._follows_input = False

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> INT8Linear:
        apply_keeping_dtypes(self, ("weight", "weight_scale"), super()._apply, fn, recurse)
        self._follows_input = False
        self._forget_route()
        return self

    def __getstate__(self) -> dict[str, Any]:
        """The route is found anew where the copy lives."""
        return {**self.__dict__, "_device": None, "_device_type": "", "_linear": None}

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        errors = dtype_errors(
            self,
            state_dict,
            prefix,
            {"weight": torch.int8, "weight_scale": torch.float32},
            "load float weights into nn.Linear and convert that with INT8Linear.from_linear",
        )
        if errors:
            error_msgs.extend(errors)
            return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        self._forget_route()


def _check_quantized(q: Tensor, scale: Tensor, bias: Tensor | None) -> None:
    _checks.check_matmul("INT8Linear", "weight", q, q)
    _checks.check_w_scale("INT8Linear", scale, q)
    _checks.check_bias("INT8Linear", bias, q)

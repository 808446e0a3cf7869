"""``INT8Quantizer``, which returns integers, and ``Quantizer``, the fake one to compare it with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from . import _autograd, _checks, _extension, backends

__all__ = ["INT8Quantizer", "Quantizer"]


class INT8Quantizer:
    """Symmetric int8 quantization that returns int8 values with their float32 scales.

    >>> q, scale = INT8Quantizer.quantize_per_token(x)
    >>> x_restored = INT8Quantizer.dequantize(q, scale)

    Every backend returns the same bits: those of ``int8_ops.reference``.
    """

    @staticmethod
    def quantize_per_token(x: Tensor, backend: str = "auto") -> tuple[Tensor, Tensor]:
        """One scale a row.

        Args:
            x: float32, float16 or bfloat16 ``[..., K]``, K >= 1.
            backend: see ``int8_ops.backends``.

        Returns:
            ``q`` int8 ``[..., K]`` in -127..127, ``scale`` float32 ``[..., 1]``. A row of zeros has
            scale 1; a row with a NaN or an Inf has q = 0 and scale NaN.

        Raises:
            RuntimeError: a wrong dtype or shape, or a backend that cannot be used.
            ValueError: an unknown backend.
        """
        return backends.quantize_per_token(x, backend)

    @staticmethod
    def quantize_per_channel(
        w: Tensor, axis: int = 0, backend: str = "auto"
    ) -> tuple[Tensor, Tensor]:
        """One scale a row (``axis=0``: an output channel of a weight) or a column (``axis=1``).

        Args:
            w: float32, float16 or bfloat16 ``[N, K]``.
            axis: 0 or 1 (or -2, -1): the dimension that keeps a scale an index.
            backend: see ``int8_ops.backends``.

        Returns:
            ``q`` int8 ``[N, K]``, ``scale`` float32 ``[N, 1]`` (axis 0) or ``[1, K]`` (axis 1).

        Raises:
            RuntimeError: a wrong dtype, shape or axis, or a backend that cannot be used.
            ValueError: an unknown backend.
        """
        return backends.quantize_per_channel(w, axis, backend)

    @staticmethod
    def dequantize(q: Tensor, scale: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """``q * scale`` in float32, rounded once to ``dtype``.

        Args:
            q: int8 ``[..., K]``.
            scale: float32 ``[..., 1]``, a scale a row, or ``[1, ..., 1, K]``, a scale a column.
            dtype: float32, float16 or bfloat16.

        Raises:
            RuntimeError: a wrong dtype or shape, or two devices.
        """
        # The op checks for itself, and a tracer cannot follow checks that quote tensors.
        if not _extension.covers(q.device.type) and not torch.compiler.is_compiling():
            _checks.check_dequantize(q, scale, dtype)
        return _autograd.dequantize(q, scale, dtype)


class StraightThrough(torch.autograd.Function):
    """Returns its second argument, passes the gradient to its first."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> Tensor:
        """``y``, which stands for ``x`` after a rounding."""
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        """The rounding counts as the identity."""
        return grads[0], None


class Quantizer(nn.Module):
    """A fake quantizer: rounds to ``n_bits`` levels and returns floats. It is here for comparison.

    It saves nothing and speeds up nothing; ``INT8Quantizer`` is the real one, and
    ``Quantizer(8)`` gives ``dequantize(*quantize_per_token(x))`` in x's dtype, bit for bit but for
    the sign of a zero. The gradient is straight-through.

    Args:
        n_bits: 2 to 16.
        group_size: so many neighbours of the last dimension share a scale; 0: the whole row does.
        sym: symmetric around zero, levels ``-(2^(n-1) - 1) .. 2^(n-1) - 1``; otherwise ``2^n``
            levels from the group's minimum to its maximum.
        clip_ratio: the range is shrunk by this factor, in (0, 1]; what lies outside is clamped.

    Raises:
        ValueError: an argument out of range.
    """

    def __init__(
        self, n_bits: int = 8, group_size: int = 0, sym: bool = True, clip_ratio: float = 1.0
    ) -> None:
        """Check and keep the settings."""
        super().__init__()
        if not 2 <= n_bits <= 16:
            raise ValueError(f"Quantizer: expected n_bits in 2..16, got {n_bits}")
        if group_size < 0:
            raise ValueError(f"Quantizer: expected group_size >= 0, got {group_size}")
        if not 0.0 < clip_ratio <= 1.0:
            raise ValueError(f"Quantizer: expected clip_ratio in (0, 1], got {clip_ratio}")
        self.n_bits = n_bits
        self.group_size = group_size
        self.sym = sym
        self.clip_ratio = clip_ratio

    def extra_repr(self) -> str:
        """The settings."""
        return (
            f"n_bits={self.n_bits}, group_size={self.group_size}, sym={self.sym}, "
            f"clip_ratio={self.clip_ratio}"
        )

    def forward(self, x: Tensor) -> Tensor:
        """Floating ``x [..., K]`` -> the same shape and dtype, rounded to the quantizer's levels.

        Raises RuntimeError for a wrong dtype, ValueError for a K that groups do not divide.
        """
        if not torch.compiler.is_compiling():
            _checks.check_float("Quantizer", "x", x.dtype)
            _checks.check_rows("Quantizer", "x", x)
        groups = x.detach().to(torch.float32)
        if self.group_size:
            if x.shape[-1] % self.group_size:
                raise ValueError(
                    f"Quantizer: expected a last dimension divisible by group_size "
                    f"{self.group_size}, got {x.shape[-1]}"
                )
            groups = groups.unflatten(-1, (-1, self.group_size))
        rounded = self._symmetric(groups) if self.sym else self._asymmetric(groups)
        y: Tensor = StraightThrough.apply(x, rounded.reshape(x.shape).to(x.dtype))
        return y

    def _symmetric(self, x: Tensor) -> Tensor:
        levels = 2 ** (self.n_bits - 1) - 1
        amax = x.abs().amax(dim=-1, keepdim=True)
        # clip_ratio 1 must leave amax's bits alone, and the divisor is a tensor: see reference.py.
        scale = (amax * self.clip_ratio) / torch.full_like(amax, levels)
        scale = torch.where(scale < torch.finfo(torch.float32).tiny, 1.0, scale)
        y = torch.round(x / scale).clamp(-levels, levels) * scale
        # A NaN or an Inf spoils its whole group, as in INT8Quantizer, instead of vanishing.
        return torch.where(torch.isfinite(amax), y, torch.nan)

    def _asymmetric(self, x: Tensor) -> Tensor:
        levels = 2**self.n_bits - 1
        low, high = x.aminmax(dim=-1, keepdim=True)
        low, high = low * self.clip_ratio, high * self.clip_ratio
        scale = (high - low) / torch.full_like(low, levels)
        finite = torch.isfinite(scale)
        scale = torch.where(scale < torch.finfo(torch.float32).tiny, 1.0, scale)
        # The zero point is the float minimum itself, so a group far from zero loses nothing.
        y = torch.round((x - low) / scale).clamp(0, levels) * scale + low
        return torch.where(finite, y, torch.nan)

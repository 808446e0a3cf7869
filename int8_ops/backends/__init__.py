"""The backends: who computes. All return the same bits; they differ in speed and in where they run.

========== ======================================== =========================
name       what                                     runs on
========== ======================================== =========================
cuda       this library's CUDA kernels              CUDA, where compiled
cpu        this library's CPU kernels               CPU
triton     this library's Triton kernels            CUDA, with triton
torch      ``torch._int_mm``, padded                CUDA
fallback   plain PyTorch                            any device with float64
auto       the first that can, in the order above   any device with float64
========== ======================================== =========================

``auto`` never takes ``triton`` or ``torch`` while this library's own kernels are there: it takes
``cuda`` even on a GPU that no compiled architecture covers, where the call raises and tells how to
rebuild, rather than be slower without a word. A backend asked for by name is used or refused, with
the reason: never replaced.
"""

from __future__ import annotations

import importlib
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from .. import _autograd, _extension, _fake
from ..reference import LatentStream

__all__ = ["Backend", "available_backends", "backend_for"]


class Backend(Protocol):
    """What a backend module offers: forward functions, no gradient (see ``int8_linear`` below)."""

    def unavailable_reason(self, device: torch.device | None = None) -> str | None:
        """None when usable (on ``device``); otherwise why not."""

    def quantize_per_token(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """``x [..., K]`` -> int8 ``[..., K]``, float32 ``[..., 1]``."""

    def quantize_per_channel(self, w: Tensor, axis: int = 0) -> tuple[Tensor, Tensor]:
        """``w [N, K]`` -> int8 ``[N, K]``, float32 ``[N, 1]`` (axis 0) or ``[1, K]`` (axis 1)."""

    def int8_mm(self, a: Tensor, w: Tensor) -> Tensor:
        """int8 ``a [..., K]``, ``w [N, K]`` -> int32 ``[..., N]``."""

    def int8_scaled_mm(
        self,
        a: Tensor,
        w: Tensor,
        a_scale: Tensor,
        w_scale: Tensor,
        bias: Tensor | None,
        out_dtype: torch.dtype,
    ) -> Tensor:
        """``int8_mm`` with the scale epilogue -> ``out_dtype [..., N]``."""

    def int8_linear(
        self,
        x: Tensor,
        w: Tensor,
        w_scale: Tensor,
        bias: Tensor | None,
        out_dtype: torch.dtype | None = None,
    ) -> Tensor:
        """``x [..., K]`` -> ``out_dtype`` (x's by default) ``[..., N]``."""


class AttentionBackend(Protocol):
    """A backend that has attention over latents, as ``ATTENTION`` names them."""

    def latent_attention_decode(
        self,
        q: Tensor,
        k: LatentStream,
        v: LatentStream,
        inv_freq: Tensor,
        start: Tensor,
        length: Tensor,
        scaling: float,
        origin: Tensor | None,
        rope_scaling: float,
        window: int | None,
    ) -> Tensor:
        """As ``ops.latent_attention_decode``."""


# Who attends over latents, by device: by itself the first, another where it is asked for by name.
ATTENTION = {"cpu": ("cpu",), "cuda": ("cuda", "triton")}


_MODULES = {
    "cuda": "native",
    "cpu": "native",
    "triton": "triton",
    "torch": "torch_int_mm",
    "fallback": "fallback",
}
NAMES = ("auto", *_MODULES)
NATIVE = ("cpu", "cuda")


def check_name(name: str) -> str:
    """``name``, if it is a backend's. Raises ValueError otherwise."""
    if name not in NAMES:
        raise ValueError(f"unknown backend {name!r}: expected one of {', '.join(NAMES)}")
    return name


def _load(name: str) -> Backend:
    return cast("Backend", importlib.import_module(f"{__name__}.{_MODULES[name]}"))


def unavailable_reason(name: str, device: torch.device | None = None) -> str | None:
    """Why backend ``name`` cannot be used (on ``device``); None when it can."""
    check_name(name)
    if name == "auto":
        return None
    if name in NATIVE:
        if device is not None and device.type != name:
            return f"it takes {name} tensors, not {device.type} ones"
        reason = _extension.unavailable_reason(name)
        if reason is None and device is None and name == "cuda" and not torch.cuda.is_available():
            return "the kernels are there, but torch sees no CUDA device"
        return reason
    try:
        module = _load(name)
    except ImportError as error:
        return f"{type(error).__name__}: {error}"
    return module.unavailable_reason(device)


def available_backends() -> dict[str, str | None]:
    """Each backend's name -> None when this machine can use it, or the reason it cannot."""
    return {name: unavailable_reason(name) for name in _MODULES}


def backend_for(device_or_tensor: torch.device | str | Tensor, name: str = "auto") -> str:
    """The backend that ``name`` stands for on a device; for ``"auto"``, the one it picks.

    Args:
        device_or_tensor: a device, its name, or a tensor on it.
        name: ``"auto"`` or a backend's name.

    Returns:
        ``"cuda"``, ``"cpu"``, ``"triton"``, ``"torch"`` or ``"fallback"``.

    Raises:
        ValueError: there is no backend of that name.
        RuntimeError: the named backend is absent, or does not run on that device; with the reason.
    """
    if isinstance(device_or_tensor, Tensor):
        device = device_or_tensor.device
    else:
        device = torch.device(device_or_tensor)
    if check_name(name) == "auto":
        reasons = {}
        for candidate in _MODULES:
            reasons[candidate] = unavailable_reason(candidate, device)
            if reasons[candidate] is None:
                return candidate
        told = "; ".join(f"{candidate}: {reason}" for candidate, reason in reasons.items())
        raise RuntimeError(f"no backend can run on {device}: {told}")
    reason = unavailable_reason(name, device)
    if reason is not None:
        raise RuntimeError(f"backend {name!r} cannot be used on {device}: {reason}")
    return name


def select(name: str, device: torch.device) -> Backend:
    """The module of ``backend_for(device, name)``; raises as that does."""
    return _load(backend_for(device, name))


# Note [Ops that name a backend]
# The PyTorch and Triton backends are ordinary Python. A compiler that traced into them would fuse
# and reassociate (inductor's C++ is built with -ffast-math's relatives, Triton's `/` is not
# correctly rounded), and the bits would no longer be the same. So a traced program meets them as
# one opaque op that carries the backend's name, with the fake and the gradient of the real one.
_LIB = torch.library.Library("int8_ops", "FRAGMENT")
_LIB.define("quantize_per_token_via(Tensor x, str backend) -> (Tensor q, Tensor scale)")
_LIB.define("quantize_per_channel_via(Tensor w, int axis, str backend) -> (Tensor q, Tensor scale)")
_LIB.define(
    "int8_scaled_mm_via(Tensor a, Tensor w, Tensor a_scale, Tensor w_scale, Tensor? bias, "
    "ScalarType out_dtype, str backend) -> Tensor"
)
_LIB.define(
    "int8_linear_via(Tensor x, Tensor w, Tensor w_scale, Tensor? bias, ScalarType? out_dtype, "
    "str backend) -> Tensor"
)
_LIB.define(
    "latent_attention_decode_via(Tensor q, "
    "Tensor[] k, Tensor[] k_scale, Tensor[] a_k, Tensor[] a_k_scale, Tensor? k_bias, "
    "Tensor[] v, Tensor[] v_scale, Tensor[] a_v, Tensor[] a_v_scale, Tensor? v_bias, "
    "Tensor inv_freq, Tensor start, Tensor length, Tensor? origin, "
    "float scaling, float rope_scaling, int? window, str backend) -> Tensor"
)


def _quantize_per_token_via(x: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    return select(backend, x.device).quantize_per_token(x)


def _quantize_per_channel_via(w: Tensor, axis: int, backend: str) -> tuple[Tensor, Tensor]:
    return select(backend, w.device).quantize_per_channel(w, axis)


def _int8_scaled_mm_via(
    a: Tensor,
    w: Tensor,
    a_scale: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    backend: str,
) -> Tensor:
    return select(backend, a.device).int8_scaled_mm(a, w, a_scale, w_scale, bias, out_dtype)


def _int8_linear_via(
    x: Tensor,
    w: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype | None,
    backend: str,
) -> Tensor:
    return select(backend, x.device).int8_linear(x, w, w_scale, bias, out_dtype)


def _latent_attention_decode_via(q: Tensor, *arguments: Any) -> Tensor:
    k, v = LatentStream(*arguments[:5]), LatentStream(*arguments[5:10])
    inv_freq, start, length, origin, scaling, rope_scaling, window, backend = arguments[10:]
    module = cast("AttentionBackend", select(backend, q.device))
    return module.latent_attention_decode(
        q, k, v, inv_freq, start, length, scaling, origin, rope_scaling, window
    )


for _via, _fake_fn in (
    (_quantize_per_token_via, lambda x, backend: _fake.quantize_per_token(x)),
    (_quantize_per_channel_via, lambda w, axis, backend: _fake.quantize_per_channel(w, axis)),
    (_int8_scaled_mm_via, lambda *args: _fake.int8_scaled_mm(*args[:-1])),
    (_int8_linear_via, lambda *args: _fake.int8_linear(*args[:-1])),
    (_latent_attention_decode_via, lambda *args: _fake.latent_attention_decode(*args[:-1])),
):
    _name = _via.__name__.removeprefix("_")
    _LIB.impl(_name, _via, "CompositeExplicitAutograd")
    torch.library.register_fake(f"int8_ops::{_name}", _fake_fn, lib=_LIB)
_autograd.register("int8_ops::int8_linear_via", inputs=6, lib=_LIB)


def _is_native(name: str, device_type: str) -> bool:
    """Whether the compiled ops serve this call; written so that a tracer can follow it."""
    if name == "auto":
        return _extension.covers(device_type)
    return name in NATIVE and name == device_type and _extension.covers(device_type)


def quantize_per_token(x: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    """By name, traceable. Shapes as in ``Backend``."""
    if _is_native(backend, x.device.type):
        q, scale = torch.ops.int8_ops.quantize_per_token.default(x)
    elif torch.compiler.is_compiling():
        q, scale = torch.ops.int8_ops.quantize_per_token_via.default(x, backend)
    else:
        q, scale = select(backend, x.device).quantize_per_token(x)
    return q, scale


def quantize_per_channel(w: Tensor, axis: int, backend: str) -> tuple[Tensor, Tensor]:
    """By name, traceable. Shapes as in ``Backend``."""
    if _is_native(backend, w.device.type):
        q, scale = torch.ops.int8_ops.quantize_per_channel.default(w, axis)
    elif torch.compiler.is_compiling():
        q, scale = torch.ops.int8_ops.quantize_per_channel_via.default(w, axis, backend)
    else:
        q, scale = select(backend, w.device).quantize_per_channel(w, axis)
    return q, scale


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """The dtype that torch.autocast asks for on that device type; None outside autocast."""
    # torch raises for a device type that has no autocast, such as meta.
    if device_type not in NATIVE and not torch.amp.is_autocast_available(device_type):
        return None
    if torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    return None


def int8_scaled_mm(
    a: Tensor,
    w: Tensor,
    a_scale: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    backend: str,
) -> Tensor:
    """By name, traceable, without gradient. Shapes as in ``Backend``."""
    if _is_native(backend, a.device.type):
        out: Tensor = torch.ops.int8_ops.int8_scaled_mm.default(
            a, w, a_scale, w_scale, bias, out_dtype
        )
    elif torch.compiler.is_compiling():
        out = torch.ops.int8_ops.int8_scaled_mm_via.default(
            a, w, a_scale, w_scale, bias, out_dtype, backend
        )
    else:
        out = select(backend, a.device).int8_scaled_mm(a, w, a_scale, w_scale, bias, out_dtype)
    return out


# The function that serves (backend, device), found once: finding it costs more than calling it.
_linear_functions: dict[tuple[str, torch.device], Any] = {}


def linear_function(name: str, device: torch.device) -> Any:
    """``select(name, device).int8_linear``, remembered."""
    found = _linear_functions.get((name, device))
    if found is None:
        found = _linear_functions[name, device] = select(name, device).int8_linear
    return found


def wants_grad(x: Tensor, bias: Tensor | None) -> bool:
    """Whether autograd would record an ``int8_linear`` of these."""
    return (x.requires_grad or (bias is not None and bias.requires_grad)) and (
        torch.is_grad_enabled()
    )


class _Linear(torch.autograd.Function):
    """The gradient for eager calls: a third of the host time of one registered with the op."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        w: Tensor,
        w_scale: Tensor,
        bias: Tensor | None,
        out_dtype: torch.dtype | None,
        backend: str,
    ) -> Tensor:
        _autograd.save_for_backward(ctx, x, w, w_scale, bias)
        out: Tensor = linear_function(backend, x.device)(x, w, w_scale, bias, out_dtype)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, bias = _autograd.gradients(ctx, grads[0])
        return x, None, None, bias, None, None


def int8_linear(
    x: Tensor,
    w: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype | None,
    backend: str,
) -> Tensor:
    """By name, differentiable, traceable. Shapes as in ``Backend``; autocast as in ``ops``."""
    if out_dtype is None:
        out_dtype = autocast_dtype(x.device.type)
    if not torch.compiler.is_compiling():
        if wants_grad(x, bias):
            out: Tensor = _Linear.apply(x, w, w_scale, bias, out_dtype, backend)
        else:
            out = linear_function(backend, x.device)(x, w, w_scale, bias, out_dtype)
    elif _is_native(backend, x.device.type):
        out = torch.ops.int8_ops.int8_linear.default(x, w, w_scale, bias, out_dtype)
    else:
        out = torch.ops.int8_ops.int8_linear_via.default(x, w, w_scale, bias, out_dtype, backend)
    return out


def latent_attention_decode(
    q: Tensor,
    k: LatentStream,
    v: LatentStream,
    inv_freq: Tensor,
    start: Tensor,
    length: Tensor,
    scaling: float,
    origin: Tensor | None,
    rope_scaling: float,
    window: int | None,
    backend: str,
) -> Tensor:
    """By name (``"auto"``: as ``ATTENTION`` has it), traceable, without gradient."""
    name = ATTENTION[q.device.type][0] if backend == "auto" else backend
    arguments = (
        *(q, *k.arguments(), *v.arguments()),
        *(inv_freq, start, length, origin, scaling, rope_scaling, window),
    )
    if _is_native(name, q.device.type):
        out: Tensor = torch.ops.int8_ops.latent_attention_decode.default(*arguments)
    else:
        out = torch.ops.int8_ops.latent_attention_decode_via.default(*arguments, name)
    return out

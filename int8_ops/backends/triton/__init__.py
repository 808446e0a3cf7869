"""The ``triton`` backend: this library's kernels written in Triton, for CUDA devices.

Bit for bit the numbers of ``int8_ops.reference``. Triton is imported at the first call, so that
importing the package costs nothing where the backend is not used. A traced program meets these
functions as opaque ops (Note [Ops that name a backend] in ``backends/__init__.py``): a shape is
tuned when the compiled code first runs, not while it is traced.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from types import ModuleType

import torch
from torch import Tensor

from ... import _checks
from ...reference import LatentStream

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


_usable: set[torch.device] = set()


def _launch_on(device: torch.device) -> ModuleType:
    # Asked once a device: every later call only looks it up.
    if device not in _usable:
        reason = unavailable_reason(device)
        if reason is not None:
            raise RuntimeError(f"backend 'triton' cannot be used on {device}: {reason}")
        _usable.add(device)
    return _launch()


def quantize_per_token(x: Tensor) -> tuple[Tensor, Tensor]:
    """``x [..., K]`` float -> ``q`` int8 ``[..., K]``, ``scale`` float32 ``[..., 1]``.

    Raises RuntimeError for another dtype, an empty last dimension or a device without the backend.
    """
    _checks.check_quantize_per_token(x)
    launch = _launch_on(x.device)
    q = x.new_empty(x.shape, dtype=torch.int8)
    scale = x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)
    if q.numel() > 0:
        launch.quantize_rows(x.contiguous(), q, scale)
    return q, scale


def quantize_per_channel(w: Tensor, axis: int = 0) -> tuple[Tensor, Tensor]:
    """``w [N, K]`` float -> int8 and a scale a row ``[N, 1]`` (axis 0) or a column ``[1, K]``.

    Raises RuntimeError for another dtype, shape or axis, or a device without the backend.
    """
    _checks.check_quantize_per_channel(w, axis)
    if axis % 2 == 0:
        return quantize_per_token(w)
    launch = _launch_on(w.device)
    q = w.new_empty(w.shape, dtype=torch.int8)
    scale = w.new_empty((1, w.shape[1]), dtype=torch.float32)
    launch.quantize_columns(w.contiguous(), q, scale)
    return q, scale


def int8_mm(a: Tensor, w: Tensor) -> Tensor:
    """``a [..., K]``, ``w [N, K]``, int8 -> the exact int32 sums ``[..., N]``.

    Raises RuntimeError for other dtypes, a K that differs or is over the limit, two devices.
    """
    _checks.check_int8_mm(a, w)
    launch = _launch_on(a.device)
    out = a.new_empty((*a.shape[:-1], w.shape[0]), dtype=torch.int32)
    if out.numel() > 0:
        launch.matmul(a.contiguous(), w.contiguous(), out)
    return out


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
    _checks.check_int8_scaled_mm(a, w, a_scale, w_scale, bias, out_dtype)
    launch = _launch_on(a.device)
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


def int8_linear(
    x: Tensor,
    w: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Quantize ``x [..., K]`` per token, multiply by ``w [N, K]``, scale, add the bias.

    Returns ``[..., N]`` in ``out_dtype``, by default x's. Raises RuntimeError as the functions it
    is made of.
    """
    _checks.check_int8_linear(x, w, w_scale, bias, out_dtype)
    launch = _launch_on(x.device)
    out = x.new_empty((*x.shape[:-1], w.shape[0]), dtype=out_dtype or x.dtype)
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


# A head's halves are the sides of tensor-core tiles.
HEAD_SIZES = (32, 64, 128, 256)


def latent_attention_decode(
    q: Tensor,
    k: LatentStream,
    v: LatentStream,
    inv_freq: Tensor,
    start: Tensor,
    length: Tensor,
    scaling: float,
    origin: Tensor | None = None,
    rope_scaling: float = 1.0,
    window: int | None = None,
) -> Tensor:
    """Attention of a few new tokens a row over integer latents; see ``int8_ops.ops``.

    Raises RuntimeError where an argument is wrong, or a head of another size than 32, 64, 128, 256.
    """
    _checks.check_latent_attention_decode(q, k, v, inv_freq, start, length, origin, window)
    size = q.shape[-1]
    if size not in HEAD_SIZES:
        raise RuntimeError(
            f"int8_ops.latent_attention_decode: the triton backend takes heads of {HEAD_SIZES}, "
            f"got {size}"
        )
    launch = _launch_on(q.device)
    if q.numel() == 0 or k.q[0].shape[2] == 0:
        return q.new_zeros((q.shape[0], q.shape[2], q.shape[1], size))
    attention_launch = importlib.import_module(f"{launch.__package__}.attention_launch")
    factor = scaling * rope_scaling
    out: Tensor = attention_launch.decode(q, k, v, inv_freq, start, length, origin, factor, window)
    return out

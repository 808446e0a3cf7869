"""Every way to compute a shape that is timed, and the check that each passes first."""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import _extension, reference
from ..backends import triton as triton_backend
from .shapes import Shape

# Restricts the CUDA matmuls to one path; read by the library at each call.
GEMM_PATH = "INT8_OPS_GEMM_PATH"
# Up to so many rows are compared in full; of more, so many at random, and the first and last.
WHOLE_ROWS = 512
SAMPLED_ROWS = 256


class Mismatch(RuntimeError):
    """A peer returned something else than the reference; its time would mean nothing."""


@dataclass
class Inputs:
    """One set: what any peer reads."""

    x: Tensor  # bf16 [M, K]
    w: Tensor  # bf16 [N, K]
    x_q: Tensor
    x_scale: Tensor
    w_q: Tensor
    w_scale: Tensor


def make_inputs(shape: Shape, device: torch.device, rng: torch.Generator) -> Inputs:
    """Random normal data: int8 kernels on zeros run at other clocks."""
    x = torch.randn((shape.m, shape.k), generator=rng, device=device, dtype=torch.bfloat16)
    w = torch.randn((shape.n, shape.k), generator=rng, device=device, dtype=torch.bfloat16)
    return Inputs(x, w, *reference.quantize_per_token(x), *reference.quantize_per_channel(w))


# -- what is compared -----------------------------------------------------------------------------


@dataclass
class Expected:
    """What the compared rows of one set's output must be."""

    rows: Tensor | None  # None: all of them
    shape: tuple[int, int]
    exact: Tensor  # the reference's
    real: Tensor  # x times w, float32

    def check(self, peer: Peer, out: Tensor) -> None:
        """Raise Mismatch unless ``out`` is what ``peer`` claims to compute."""
        if out.dtype != self.exact.dtype or tuple(out.shape) != self.shape:
            raise Mismatch(
                f"{peer.name} returned {out.dtype} {list(out.shape)}, "
                f"expected {self.exact.dtype} {list(self.shape)}"
            )
        got = out if self.rows is None else out[self.rows]
        if peer.tolerance is None:
            if not torch.equal(got, self.exact):
                count = int((got != self.exact).sum())
                raise Mismatch(
                    f"{peer.name} differs from the reference in {count} of {got.numel()} elements"
                )
            return
        want = self.exact.float() if peer.int8 else self.real
        error = float((got.float() - want).norm() / want.norm())
        if not error <= peer.tolerance:
            raise Mismatch(f"{peer.name} is off by {error:.1e}, allowed are {peer.tolerance:.1e}")


def expected(inputs: Inputs, rng: torch.Generator) -> Expected:
    """The reference of a set, of all rows if they are few, else of a sample."""
    m, n = inputs.x.shape[0], inputs.w.shape[0]
    x, x_q, x_scale = inputs.x, inputs.x_q, inputs.x_scale
    rows = None
    if m > WHOLE_ROWS:
        sample = 1 + torch.randperm(m - 2, generator=rng, device=x.device)[:SAMPLED_ROWS]
        ends = torch.tensor([0, m - 1], device=x.device)
        rows = torch.cat([ends, sample])
        x, x_q, x_scale = x[rows], x_q[rows], x_scale[rows]
    exact = reference.int8_scaled_mm(x_q, inputs.w_q, x_scale, inputs.w_scale, None, inputs.x.dtype)
    return Expected(rows, (m, n), exact, x.float() @ inputs.w.float().t())


# -- the peers ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Peer:
    """A way to compute a shape; ``prequantized`` ones are given x as int8."""

    name: str
    summary: str
    run: Callable[[Inputs], Tensor]
    prequantized: bool = False
    # None: bit for bit. Else the largest relative error, in the Frobenius norm.
    tolerance: float | None = None
    int8: bool = True
    # Tunes or compiles for seconds at each shape.
    slow: bool = False
    gemm_path: str | None = None
    takes: Callable[[Shape], bool] = lambda shape: True
    # Before the first call at a shape.
    prepare: Callable[[], None] = lambda: None


def cuda_linear(i: Inputs) -> Tensor:
    """This library's op, quantize included."""
    out: Tensor = torch.ops.int8_ops.int8_linear.default(i.x, i.w_q, i.w_scale, None)
    return out


def cuda_mm(i: Inputs) -> Tensor:
    """This library's op on an input that is quantized already."""
    out: Tensor = torch.ops.int8_ops.int8_scaled_mm.default(
        i.x_q, i.w_q, i.x_scale, i.w_scale, None, i.x.dtype
    )
    return out


def triton_linear(i: Inputs) -> Tensor:
    """The Triton backend, quantize included."""
    return triton_backend.int8_linear(i.x, i.w_q, i.w_scale, None)


def triton_mm(i: Inputs) -> Tensor:
    """The Triton backend on an input that is quantized already."""
    return triton_backend.int8_scaled_mm(i.x_q, i.w_q, i.x_scale, i.w_scale, None, i.x.dtype)


def int_mm_linear(x: Tensor, w_q: Tensor, w_scale: Tensor) -> Tensor:
    """``torch._int_mm`` with quantize and epilogue as a PyTorch user writes them."""
    xf = x.float()
    amax = xf.abs().amax(dim=-1, keepdim=True)
    scale = amax / torch.full_like(amax, 127)  # by a number, CUDA multiplies by its reciprocal
    q = (xf / scale).round().clamp(-127, 127).to(torch.int8)
    acc = torch._int_mm(q, w_q.t())
    return (acc.float() * scale * w_scale.t()).to(x.dtype)


@functools.cache
def _compiled_int_mm() -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    return torch.compile(int_mm_linear, fullgraph=True, dynamic=False)


def _forget_compiled() -> None:
    # A function is compiled for so many shapes and no more; each shape here begins afresh.
    torch.compiler.reset()


def _int_mm_takes(shape: Shape) -> bool:
    return shape.m > 16 and shape.k % 8 == 0 and shape.n % 8 == 0


# The first of a kind that can run is the one whose ratios and share of the floor are shown.
PEERS = (
    Peer("cuda", "int8_linear", cuda_linear),
    # Rounding y to bf16 is off by 1.1e-3 in this norm; cuBLAS may also add split sums in bf16.
    Peer("bf16", "F.linear", lambda i: F.linear(i.x, i.w), tolerance=1e-2, int8=False),
    Peer("mma.sync", "int8_linear held to the mma.sync path", cuda_linear, gemm_path="sm80"),
    Peer("triton", "the Triton backend", triton_linear, slow=True),
    Peer(
        "int_mm",
        "torch._int_mm, the rest in eager PyTorch",
        lambda i: int_mm_linear(i.x, i.w_q, i.w_scale),
        slow=True,
        takes=_int_mm_takes,
    ),
    Peer(
        "int_mm compiled",
        "the same through torch.compile",
        lambda i: _compiled_int_mm()(i.x, i.w_q, i.w_scale),
        # Its division is off by 2 units in the last place, so of q one element in 4e4 by one.
        tolerance=1e-3,
        slow=True,
        takes=_int_mm_takes,
        prepare=_forget_compiled,
    ),
    Peer("cuda mm", "int8_scaled_mm", cuda_mm, prequantized=True),
    Peer(
        "mma.sync mm",
        "int8_scaled_mm held to the mma.sync path",
        cuda_mm,
        prequantized=True,
        gemm_path="sm80",
    ),
    Peer("triton mm", "the Triton backend's", triton_mm, prequantized=True, slow=True),
)
NAMES = tuple(peer.name for peer in PEERS)
OWN = ("cuda", "triton")
OWN_MM = ("cuda mm", "triton mm")


def absent_reason(peer: Peer, device: torch.device) -> str | None:
    """Why a peer can't run on a CUDA device; None if it can."""
    if peer.run in (cuda_linear, cuda_mm):
        reason = _extension.unavailable_reason("cuda")
        if reason is None and peer.gemm_path is not None:
            major, minor = torch.cuda.get_device_capability(device)
            if major != 9:
                reason = f"at capability {major}.{minor} the library takes no other path"
        return reason
    if peer.name.startswith("triton"):
        return triton_backend.unavailable_reason(device)
    if peer.name == "int_mm compiled" and importlib.util.find_spec("triton") is None:
        return "torch.compile needs triton: pip install triton"
    return None


@contextmanager
def held_to(gemm_path: str | None) -> Iterator[None]:
    """Restrict this library's CUDA matmuls to a path while it lasts; None: leave them as they are.

    The path is chosen where a kernel is launched, so a captured graph keeps it.
    """
    if gemm_path is None:
        yield
        return
    before = os.environ.get(GEMM_PATH)
    os.environ[GEMM_PATH] = gemm_path
    try:
        yield
    finally:
        if before is None:
            del os.environ[GEMM_PATH]
        else:
            os.environ[GEMM_PATH] = before

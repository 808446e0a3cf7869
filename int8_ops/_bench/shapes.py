"""What is measured: shapes by suite, the floor of each, and the targets of an H100."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


class Shape(NamedTuple):
    """x ``[M, K]`` times w ``[N, K]`` transposed."""

    m: int
    k: int
    n: int

    def __str__(self) -> str:
        """As tables and messages name it."""
        return f"{self.m}, {self.k}, {self.n}"

    @property
    def weight_bytes(self) -> int:
        """The int8 weight and its float32 scales."""
        return self.n * self.k + 4 * self.n

    @property
    def linear_bytes(self) -> int:
        """What int8_linear must move: bf16 x and y, the weight."""
        return 2 * self.m * self.k + self.weight_bytes + 2 * self.m * self.n

    @property
    def mm_bytes(self) -> int:
        """What int8_scaled_mm must move: int8 x, bf16 y, the weight.

        The scale of a row, 4 bytes, is left out.
        """
        return self.m * (self.k + 2 * self.n) + self.weight_bytes

    @property
    def ops(self) -> int:
        """Multiplications and additions."""
        return 2 * self.m * self.n * self.k


def floor_us(moved_bytes: int, ops: int, copy_bytes_per_s: float, peak_tops: float | None) -> float:
    """The least time, in us: the bytes at copy speed, or the products at the peak if that is known.

    One TOPS is 10^12 operations a second.
    """
    move_us = 1e6 * moved_bytes / copy_bytes_per_s
    return move_us if peak_tops is None else max(move_us, ops / (peak_tops * 1e6))


# Dense int8 peak in TOPS, for the floor of a compute-bound shape. By the name that torch reports.
PEAK_INT8_TOPS = {"H100": 1979.0, "H200": 1979.0}


def peak_tops(device_name: str, asked: float | None = None) -> float | None:
    """The int8 peak of the floor: as asked, else by the device's name, else unknown."""
    if asked is not None:
        return asked
    return next((tops for name, tops in PEAK_INT8_TOPS.items() if name in device_name), None)


class Target(NamedTuple):
    """What an H100 is to reach at a shape, in us.

    ``mm`` is the time of the best CUTLASS int8 GEMM that was found, on an input that is quantized
    already.
    """

    linear_us: float
    mm_us: float


# The targets hold for the part whose name contains this: other clocks and another memory move them.
TARGET_DEVICE = "H100"

# Reconstructions of low-rank latents at prefill, then decode, then whole Llama-3-8B projections.
TARGETS = {
    Shape(32768, 128, 1024): Target(29, 32.1),
    Shape(32768, 256, 1024): Target(32, 35.3),
    Shape(32768, 512, 1024): Target(39, 43.3),
    Shape(32768, 1024, 1024): Target(58, 59.7),
    Shape(32768, 256, 4096): Target(108, 116.4),
    Shape(32768, 512, 4096): Target(125, 143.5),
    Shape(32768, 1024, 4096): Target(205, 211.0),
    Shape(1, 512, 1024): Target(2.5, 3.6),
    Shape(128, 512, 4096): Target(4.0, 4.6),
    Shape(1, 4096, 14336): Target(22, 23.9),
    Shape(256, 4096, 4096): Target(13, 12.2),
    Shape(8192, 4096, 14336): Target(720, 762),
    Shape(8192, 14336, 4096): Target(700, 646),
}
LLAMA = tuple(TARGETS)

SMALL_M_SIZES = ((512, 1024), (512, 4096), (4096, 4096), (4096, 14336))
SMALL_MS = (1, 2, 4, 8, 16, 32, 64)
SMALL_M = tuple(Shape(m, k, n) for k, n in SMALL_M_SIZES for m in SMALL_MS)

SWEEP_M, SWEEP_N = 32768, 4096
SWEEP_KS = (64, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 8192)
SWEEP_K = tuple(Shape(SWEEP_M, k, SWEEP_N) for k in SWEEP_KS)

# Rows and columns of what quantize_per_token is timed on.
QUANTIZE = tuple((32768, cols) for cols in (512, 1024, 2048, 4096, 8192))

# One eager call, the host included: its own cost where the device has nothing to do, and the whole.
HOST_SHAPE = Shape(1, 512, 1024)
EAGER_SHAPE = Shape(1, 4096, 14336)


@dataclass(frozen=True)
class LinearSuite:
    """Shapes of ``int8_linear`` and ``int8_scaled_mm``, and the peers they are measured with."""

    summary: str
    shapes: tuple[Shape, ...]
    quick_shapes: tuple[Shape, ...]
    # Tuning Triton and compiling torch._int_mm take seconds a shape: not in the sweeps.
    slow_peers: bool = False


LINEAR_SUITES = {
    "llama": LinearSuite(
        "low-rank latents, decode and whole projections of Llama-3-8B",
        LLAMA,
        (LLAMA[0], LLAMA[2], LLAMA[7], LLAMA[8], LLAMA[10]),
        slow_peers=True,
    ),
    "small_m": LinearSuite(
        f"M = {SMALL_MS[0]} to {SMALL_MS[-1]} at four weights",
        SMALL_M,
        tuple(shape for shape in SMALL_M if shape.m in (1, 16) and shape.n == 4096),
    ),
    "sweep_k": LinearSuite(
        f"K = {SWEEP_KS[0]} to {SWEEP_KS[-1]} at M = {SWEEP_M}, N = {SWEEP_N}",
        SWEEP_K,
        tuple(shape for shape in SWEEP_K if shape.k in (128, 1536)),
    ),
}
# In the order in which they run: where the time runs out, it is the last that are missing.
SUITES = {
    "llama": LINEAR_SUITES["llama"].summary,
    "quantize": f"quantize_per_token of [{QUANTIZE[0][0]}, {QUANTIZE[0][1]} to {QUANTIZE[-1][1]}]",
    "host": "one eager call at M = 1, the host included",
    "small_m": LINEAR_SUITES["small_m"].summary,
    "sweep_k": LINEAR_SUITES["sweep_k"].summary,
}

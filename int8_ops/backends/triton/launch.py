"""From contiguous tensors to a launch: picks the configuration, tunes it once, launches.

The first call with a new problem on a device times a shortlist of configurations (a second or two
with compilation) and remembers the fastest; ``INT8_OPS_PRINT_CONFIG=1`` tells which. With
``INT8_OPS_TRITON_TUNE=0`` the model's first choice runs untimed. So it does under CUDA graph
capture, where nothing can be timed: warm a shape up before its capture.
"""

# mypy: disable-error-code="no-untyped-call, misc"

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
import triton
from torch import Tensor

from . import configs, kernels
from .configs import DeviceLimits, MatmulConfig, QuantizeConfig

_Config = TypeVar("_Config", MatmulConfig, QuantizeConfig)

_TUNE_WARMUP_MS = 2
_TUNE_MS = 15
_LONG_ROW_BLOCK = 4096
_LONG_ROW_WARPS = 8
_COLUMN_BLOCK = (64, 32)
_COLUMN_WARPS = 4

# True where the kernels run on the CPU under Triton's interpreter (TRITON_INTERPRET=1).
INTERPRETED = not isinstance(kernels.matmul_kernel, triton.runtime.jit.JITFunction)

# The interpreter of some Triton releases rounds an FMA twice; there the kernels divide instead.
FMA_DIVISION = not INTERPRETED

_tuned: dict[Hashable, Any] = {}


def _on(device: torch.device) -> AbstractContextManager[Any]:
    """Triton launches on the current device: make it the tensor's."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)


@functools.cache
def _limits(device: torch.device) -> DeviceLimits:
    if device.type != "cuda":
        return DeviceLimits()
    properties = torch.cuda.get_device_properties(device)
    return DeviceLimits(
        multiprocessors=properties.multi_processor_count,
        smem_bytes=triton.runtime.driver.active.utils.get_device_properties(device.index)[
            "max_shared_mem"
        ],
        has_wgmma=properties.major == 9,
    )


def _fastest(
    key: Hashable, candidates: Sequence[_Config], launch: Callable[[_Config], object]
) -> _Config:
    """Time the candidates; remember and return the fastest."""
    if INTERPRETED:
        # The interpreter pays by the instruction: the fewest programs are the fastest.
        return max(candidates, key=lambda candidate: candidate.elements)
    untimed = os.environ.get("INT8_OPS_TRITON_TUNE") == "0"
    if untimed or torch.cuda.is_current_stream_capturing():
        return candidates[0]
    timed: list[tuple[float, _Config]] = []
    for candidate in candidates:
        try:
            us = 1e3 * float(
                triton.testing.do_bench(
                    functools.partial(launch, candidate),
                    warmup=_TUNE_WARMUP_MS,
                    rep=_TUNE_MS,
                    return_mode="median",
                )
            )
        except triton.runtime.errors.OutOfResources:
            # The epilogue's scratch is Triton's own affair; the model can't see it.
            continue
        timed.append((us, candidate))
    if not timed:
        raise RuntimeError(f"int8_ops triton: no configuration fits this device for {key}")
    us, best = min(timed, key=lambda pair: pair[0])
    _tuned[key] = best
    if os.environ.get("INT8_OPS_PRINT_CONFIG") == "1":
        print(f"int8_ops triton: {key} -> {best} ({us:.1f} us)", file=sys.stderr)
    return best


def quantize_rows(x: Tensor, q: Tensor, scale: Tensor) -> None:
    """Contiguous ``x`` -> ``q`` and ``scale``; the last dimension is a row."""
    cols = x.shape[-1]
    rows = x.numel() // cols
    with _on(x.device):
        if cols > configs.MAX_ROW_IN_REGISTERS:
            kernels.quantize_long_rows_kernel[(rows,)](
                x,
                q,
                scale,
                cols,
                BLOCK_COLS=_LONG_ROW_BLOCK,
                FMA_DIVISION=FMA_DIVISION,
                num_warps=_LONG_ROW_WARPS,
                enable_fp_fusion=False,
            )
            return

        def launch(config: QuantizeConfig) -> None:
            kernels.quantize_rows_kernel[(-(-rows // config.block_rows),)](
                x,
                q,
                scale,
                rows,
                cols,
                BLOCK_ROWS=config.block_rows,
                BLOCK_COLS=config.block_cols,
                FMA_DIVISION=FMA_DIVISION,
                num_warps=config.num_warps,
                enable_fp_fusion=False,
            )

        key = ("quantize", x.device, configs.m_bucket(rows), cols, x.dtype)
        config = _tuned.get(key)
        if config is None:
            config = _fastest(key, configs.quantize_shortlist(rows, cols), launch)
        launch(config)


def quantize_columns(w: Tensor, q: Tensor, scale: Tensor) -> None:
    """Contiguous ``w [rows, cols]`` -> ``q`` and a scale a column."""
    rows, cols = w.shape
    block_rows, block_cols = _COLUMN_BLOCK
    with _on(w.device):
        kernels.quantize_columns_kernel[(-(-cols // block_cols),)](
            w,
            q,
            scale,
            rows,
            cols,
            BLOCK_ROWS=block_rows,
            BLOCK_COLS=block_cols,
            FMA_DIVISION=FMA_DIVISION,
            num_warps=_COLUMN_WARPS,
            enable_fp_fusion=False,
        )


def matmul(
    a: Tensor,
    w: Tensor,
    out: Tensor,
    a_scale: Tensor | None = None,
    w_scale: Tensor | None = None,
    bias: Tensor | None = None,
) -> None:
    """Contiguous ``a [..., K]`` times ``w [N, K]`` into ``out``; int32 sums without scales."""
    n, k = w.shape
    m = a.numel() // k

    def launch(config: MatmulConfig) -> None:
        blocks = -(-m // config.block_m) * -(-n // config.block_n)
        kernels.matmul_kernel[(blocks,)](
            a,
            w,
            out,
            a_scale,
            w_scale,
            bias,
            m,
            n,
            k,
            EVEN_K=k % config.block_k == 0,
            NATIVE_BFLOAT16=not INTERPRETED,
            BLOCK_M=config.block_m,
            BLOCK_N=config.block_n,
            BLOCK_K=config.block_k,
            GROUP_M=config.group_m,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            enable_fp_fusion=False,
        )

    with _on(a.device):
        key = ("matmul", a.device, configs.m_bucket(m), n, k, out.dtype)
        config = _tuned.get(key)
        if config is None:
            candidates = configs.shortlist(m, n, k, out.element_size(), _limits(a.device))
            config = _fastest(key, candidates, launch)
        launch(config)

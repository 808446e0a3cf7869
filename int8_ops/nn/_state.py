"""What modules with int8 buffers share: dtypes that survive casts and loads."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .. import backends


def apply_keeping_dtypes(
    module: nn.Module,
    names: tuple[str, ...],
    base_apply: Callable[..., Any],
    fn: Callable[[Tensor], Tensor],
    recurse: bool,
) -> None:
    """``nn.Module._apply`` that may move the named buffers but never casts them.

    A cast there and back would already have lost bits of a float32 scale, so a buffer that ``fn``
    cast is moved anew from its original.
    """
    buffers = module._buffers
    before = dict(buffers)
    for name in names:
        del buffers[name]
    try:
        base_apply(fn, recurse)
    finally:
        after = dict(buffers)
        buffers.clear()  # refilled in the order before, which is that of the state dict
        buffers.update({**before, **after})
    for name in names:
        original = before[name]
        if original is None:
            continue
        with torch.no_grad():
            moved = fn(original)
        buffers[name] = moved if moved.dtype == original.dtype else original.to(moved.device)


def dtype_errors(
    module: nn.Module,
    state_dict: Mapping[str, Tensor],
    prefix: str,
    expected: Mapping[str, torch.dtype],
    hint: str,
) -> list[str]:
    """One message for each entry whose dtype would be cast, with loss, by loading it."""
    errors = []
    for name, dtype in expected.items():
        value = state_dict.get(prefix + name)
        if value is not None and value.dtype != dtype:
            errors.append(
                f"{type(module).__name__}: expected {prefix}{name} of dtype {dtype}, "
                f"got {value.dtype}; {hint}"
            )
    return errors


def describe_backend(name: str, device: torch.device) -> str:
    """``auto (cpu)``, ``triton``, or the reason a named backend cannot be used there.

    The name alone on meta, where nothing is computed, and for an ``auto`` that finds none.
    """
    if device.type == "meta":
        return name
    if name == "auto":
        try:
            return f"auto ({backends.backend_for(device)})"
        except RuntimeError:  # it is for the call to raise; whoever prints a model wants to see it
            return name
    reason = backends.unavailable_reason(name, device)
    return name if reason is None else f"{name} (unavailable on {device.type}: {reason})"

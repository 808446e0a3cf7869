"""What ``python -m int8_ops`` can do, one module a subcommand, and what they share."""

from __future__ import annotations

import torch

from .. import _extension, backend_for


class CommandError(Exception):
    """A request that cannot be carried out, with the reason and the way out for the user."""


def pick_backend(device: torch.device, name: str) -> str:
    """What ``--backend`` stands for on the device. Raises CommandError if it can't be used."""
    try:
        return backend_for(device, name)
    except (RuntimeError, ValueError) as error:
        raise CommandError(f"--backend {name}: {error}") from error


def pick_device(name: str | None) -> torch.device:
    """``--device``, or CUDA where there is one, else the CPU. Raises CommandError if unusable."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise CommandError(f"--device {name}: {error}") from error
    if device.type not in ("cpu", "cuda"):
        raise CommandError(f"--device must be cpu or cuda[:index], got {name}")
    if device.type == "cuda":
        count = torch.cuda.device_count()
        if not torch.cuda.is_available() or (device.index or 0) >= count:
            raise CommandError(f"--device {name}: torch {torch.__version__} sees {count} of them")
        # Streams, graphs and kernels without a device of their own go to the current one.
        if device.index is not None:
            torch.cuda.set_device(device)
    return device


def check_cpu_isa() -> None:
    """Raises CommandError where INT8_OPS_CPU_ISA names no instruction set of this machine."""
    module = _extension.build_info.module
    if module is None:
        return
    try:
        module.cpu_isa()
    except RuntimeError as error:
        raise CommandError(str(error)) from error


def format_table(headers: list[str], rows: list[list[str]], left: frozenset[int]) -> str:
    """Columns two spaces apart, right-aligned but for those whose index is in ``left``."""
    widths = [max(len(row[i]) for row in [headers, *rows]) for i in range(len(headers))]

    def line(cells: list[str]) -> str:
        padded = [
            cell.ljust(width) if i in left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        return "  ".join(padded).rstrip()

    rule = "  ".join("-" * width for width in widths)
    return "\n".join([line(headers), rule, *(line(row) for row in rows)])

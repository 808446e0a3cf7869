"""What was measured, where and with what: the head of every record."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

from .. import __version__, _extension

# The source tree, if this package is used from one.
TREE = Path(__file__).resolve().parents[2]
SWITCHES = "INT8_OPS_"


def _output_of(*command: str) -> str | None:
    try:
        run = subprocess.run(command, cwd=TREE, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return run.stdout.strip() if run.returncode == 0 else None


def commit() -> str | None:
    """The commit of the tree, marked where the tree differs from it; None outside git.

    An installed package may lie below some other project's tree, whose commit says nothing.
    """
    top = _output_of("git", "rev-parse", "--show-toplevel")
    if top is None or Path(top).resolve() != TREE:
        return None
    head = _output_of("git", "rev-parse", "--short=12", "HEAD")
    if head is None:
        return None
    dirty = _output_of("git", "status", "--porcelain", "--untracked-files=no")
    return f"{head}-dirty" if dirty else head


def _triton_version() -> str | None:
    try:
        import triton
    except ImportError:
        return None
    return str(triton.__version__)


def software_facts() -> dict[str, Any]:
    """Versions, commit, date, and the switches that were set."""
    build = _extension.build_info.module
    return {
        "int8_ops": __version__,
        "built_for": build.info()["cuda_archs"] if build is not None else None,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": _triton_version(),
        "python": platform.python_version(),
        "commit": commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "switches": {key: value for key, value in os.environ.items() if key.startswith(SWITCHES)},
    }


def gpu_facts(device: torch.device) -> dict[str, Any]:
    """Name, memory, driver and clocks of a CUDA device, the last two where nvidia-smi is there."""
    properties = torch.cuda.get_device_properties(device)
    fields = ("driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "power.limit")
    answer = _output_of(
        "nvidia-smi",
        f"--id=GPU-{properties.uuid}",
        f"--query-gpu={','.join(fields)}",
        "--format=csv,noheader",
    )
    values = answer.split(", ") if answer else []
    smi = dict(zip(fields, values, strict=True)) if len(values) == len(fields) else {}
    return {
        "device": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "l2_bytes": properties.L2_cache_size,
        "memory_bytes": properties.total_memory,
        **smi,
    }


def last_level_cache_bytes() -> int:
    """Of this machine's CPU; 32 MiB where it does not tell."""
    path = Path("/sys/devices/system/cpu/cpu0/cache/index3/size")
    size = path.read_text().strip() if path.exists() else "32768K"
    return int(size.rstrip("KM")) << (20 if size.endswith("M") else 10)


def cpu_facts() -> dict[str, Any]:
    """Instruction sets, threads, cores and cache of this machine."""
    return {
        "isa": _extension.build_info.require().cpu_isa(),
        "torch_isa": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "cache_bytes": last_level_cache_bytes(),
    }


def print_facts(facts: dict[str, Any]) -> None:
    """One line a fact."""
    width = max(map(len, facts))
    for name, value in facts.items():
        print(f"{name:>{width}}  {value}", flush=True)

"""Show versions, compiled architectures, devices, instruction sets and backends.

A backend that cannot be used is shown with the reason.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
from typing import Any

import torch

from .. import __version__, _extension, backends

PACKAGES = ("torch", "triton", "transformers", "numpy")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``info``."""
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Carry out ``info``; always 0."""
    facts = collect()
    print(json.dumps(facts, indent=2) if args.json else "\n".join(lines(facts)))
    return 0


def collect() -> dict[str, Any]:
    """Everything ``info`` tells, as JSON-able data. Asks CUDA for its devices."""
    return {
        "int8_ops": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: installed_version(name) for name in PACKAGES},
        "torch_cuda": torch.version.cuda,
        "build": _extension.build_info.module.info() if _extension.build_info.module else None,
        "modules": {
            part.name: part.error or "loaded"
            for part in (_extension.build_info, _extension.core, _extension.cuda)
        },
        "cpu": cpu_facts(),
        "devices": device_facts(),
        "backends": backends.available_backends(),
    }


def installed_version(package: str) -> str | None:
    """The installed version, or None where there is none; nothing is imported."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def cpu_facts() -> dict[str, Any]:
    """The instruction set the kernels use and those this machine could use."""
    facts: dict[str, Any] = {"threads": torch.get_num_threads()}
    module = _extension.build_info.module
    if module is not None:
        facts["isas"] = module.cpu_isas()
        try:
            facts["isa"] = module.cpu_isa()
        except RuntimeError as error:  # INT8_OPS_CPU_ISA names one that is not there
            facts["isa_error"] = str(error)
    return facts


def device_facts() -> list[dict[str, Any]]:
    """Each CUDA device with its capability, and why the compiled kernels do not run on it."""
    if not torch.cuda.is_available():
        return []
    module = _extension.build_info.module
    found = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        major, minor = properties.major, properties.minor
        if module is None:
            reason = _extension.build_info.error
        elif not module.info()["cuda_archs"]:
            reason = "built without CUDA kernels"
        else:
            archs = module.info()["cuda_archs"]
            reason = module.why_not_runnable(archs, major, minor) or None
        found.append(
            {
                "name": properties.name,
                "capability": f"{major}.{minor}",
                "memory_bytes": properties.total_memory,
                "multiprocessors": properties.multi_processor_count,
                "unsupported": reason,
            }
        )
    return found


def lines(facts: dict[str, Any]) -> list[str]:
    """``facts`` for a person: a name, then a value, in two columns."""
    rows = [
        ("int8_ops", facts["int8_ops"]),
        ("python", f"{facts['python']}, {facts['platform']}"),
        *((name, version or "not installed") for name, version in facts["packages"].items()),
        ("torch's CUDA", facts["torch_cuda"] or "none: a CPU build"),
    ]
    build = facts["build"]
    if build is not None:
        archs = build["cuda_archs"].replace(";", ", ")
        cuda = f"CUDA {build['cuda']} for {archs}" if archs else f"no CUDA: {build['cuda_skipped']}"
        rows.append(("built", f"with torch {build['torch']}, {cuda}"))
    rows += [(f"module {name}", state) for name, state in facts["modules"].items()]
    cpu = facts["cpu"]
    if "isas" in cpu:
        selected = cpu.get("isa") or cpu["isa_error"]
        rows.append(("cpu", f"{selected} (it has {', '.join(cpu['isas'])})"))
    rows.append(("threads", str(cpu["threads"])))
    for index, device in enumerate(facts["devices"]):
        rows.append(
            (
                f"cuda:{index}",
                f"{device['name']}, capability {device['capability']}, "
                f"{device['memory_bytes'] / 2**30:.0f} GiB: "
                f"{device['unsupported'] or 'covered by the compiled architectures'}",
            )
        )
    if not facts["devices"]:
        rows.append(("cuda", "torch sees no CUDA device"))
    rows += [
        (f"backend {name}", f"absent: {reason}" if reason else "present")
        for name, reason in facts["backends"].items()
    ]
    width = max(len(name) for name, _ in rows)
    return [f"{name:<{width}}  {value}" for name, value in rows]

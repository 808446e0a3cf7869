"""Builds int8_ops: `pip install --no-build-isolation .`

Three extension modules:
  int8_ops._C       schemas and CPU kernels                always
  int8_ops._C_cuda  CUDA kernels                           with a CUDA build of torch and nvcc
  int8_ops._build   facts of the build, no torch inside    always

Switches (environment):
  INT8_OPS_CUDA=auto|1|0   auto: build CUDA where it can be built; 1: fail where it cannot; 0: never
  TORCH_CUDA_ARCH_LIST     by number, as "8.0+PTX;9.0a"; 9.0 becomes 9.0a. Default "8.0+PTX;9.0a"
  MAX_JOBS                 parallel compilers; default from the cores and the free memory
  INT8_OPS_LINEINFO=1      source lines in the CUDA code, for profilers; they hold the build's path
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
MIN_TORCH = (2, 10)
# TORCH_VERSION 2.10 in torch's stable-ABI encoding: one build runs on every torch from there on.
TORCH_TARGET = "0x020a000000000000"
DEFAULT_ARCHS = "8.0+PTX;9.0a"
# A translation unit of nvcc with its host pass peaks at about this much memory.
GIB_PER_JOB = 3

sys.path.insert(0, str(ROOT))


def stop(*lines: str) -> None:
    sys.exit("\n".join(["", *(f"int8_ops: {line}" for line in lines), ""]))


def version() -> str:
    text = (ROOT / "int8_ops" / "_version.py").read_text()
    return re.search(r'__version__ = "(.+)"', text).group(1)


def import_torch():
    try:
        import torch
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        stop(
            "building needs the torch that it will run with, and none is importable here.",
            "Install torch >= 2.10 first; build isolation hides an installed one, so then run:",
            "pip install --no-build-isolation .",
        )
    found = tuple(int(part) for part in re.findall(r"\d+", torch.__version__)[:2])
    if found < MIN_TORCH:
        stop(
            f"torch >= 2.10 is needed (its stable ABI), found {torch.__version__}.",
            "Upgrade torch, then run:",
            "pip install --no-build-isolation .",
        )
    return torch


def find_toolkit() -> Path | None:
    """The CUDA toolkit's folder: where bin/nvcc and include/cuda_runtime.h both are."""

    def holds_toolkit(path: Path) -> bool:
        return (path / "bin" / "nvcc").exists() and (path / "include" / "cuda_runtime.h").exists()

    named = [Path(os.environ[key]) for key in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(key)]
    for path in named:
        if holds_toolkit(path):
            return path
    nvcc = shutil.which("nvcc")
    if nvcc is not None:
        # An nvcc on PATH may be a wrapper script far from its toolkit; the dry run tells the truth.
        dry = subprocess.run(
            [nvcc, "--dryrun", "-x", "cu", "/dev/null"], capture_output=True, text=True, check=False
        )
        for top in re.findall(r"^#\$ TOP=(.+)$", dry.stdout + dry.stderr, re.MULTILINE):
            path = Path(top.strip()).resolve()
            if holds_toolkit(path):
                return path
        path = Path(nvcc).resolve().parent.parent
        if holds_toolkit(path):
            return path
    usual = Path("/usr/local/cuda")
    return usual if holds_toolkit(usual) else None


def decide_cuda(torch) -> tuple[bool, str]:
    """(build the CUDA module?, why not)."""
    wish = os.environ.get("INT8_OPS_CUDA", "auto").lower()
    if wish not in ("auto", "1", "0"):
        stop(f"INT8_OPS_CUDA must be auto, 1 or 0, got {wish!r}.")
    if wish == "0":
        return False, "INT8_OPS_CUDA=0"
    if torch.version.cuda is None:
        reason = f"torch {torch.__version__} is a CPU build"
        hint = "install a CUDA build of torch"
    elif (toolkit := find_toolkit()) is None:
        reason = "no CUDA toolkit (bin/nvcc with include/cuda_runtime.h) was found"
        hint = "install the toolkit, or point CUDA_HOME at it"
    else:
        os.environ["CUDA_HOME"] = str(toolkit)
        return True, ""
    if wish == "1":
        stop(
            f"INT8_OPS_CUDA=1, but {reason}.",
            f"Either {hint}, or build for the CPU only:",
            "INT8_OPS_CUDA=0 pip install --no-build-isolation .",
        )
    print(f"int8_ops: building for the CPU only: {reason}", file=sys.stderr)
    return False, reason


def arch_list() -> str:
    """TORCH_CUDA_ARCH_LIST with 9.0 made 9.0a: wgmma and setmaxnreg exist only there."""
    wanted = os.environ.get("TORCH_CUDA_ARCH_LIST") or DEFAULT_ARCHS
    parts = [part for part in re.split(r"[;\s]+", wanted) if part]
    odd = [part for part in parts if not re.fullmatch(r"\d+\.\d+[af]?(\+PTX)?", part)]
    if odd:
        stop(f"TORCH_CUDA_ARCH_LIST must hold numbers, as in 8.0+PTX;9.0a, got {odd[0]!r}.")
    return ";".join(re.sub(r"^9\.0(?!a)", "9.0a", part) for part in parts)


def default_jobs() -> int:
    free_gib = 4.0
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        found = re.search(r"MemAvailable:\s+(\d+) kB", meminfo.read_text())
        free_gib = int(found.group(1)) / 2**20 if found else free_gib
    return max(1, min(os.cpu_count() or 1, int(free_gib // GIB_PER_JOB)))


def sources(*patterns: str) -> list[str]:
    found = [path for pattern in patterns for path in sorted(CSRC.glob(pattern))]
    return [str(path.relative_to(ROOT)) for path in found]


torch = import_torch()
build_cuda, cuda_skipped = decide_cuda(torch)
if build_cuda:
    os.environ["TORCH_CUDA_ARCH_LIST"] = arch_list()
os.environ["MAX_JOBS"] = os.environ.get("MAX_JOBS") or str(default_jobs())

# cpp_extension reads CUDA_HOME when it is imported, so only now.
from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension  # noqa: E402

# Messages and binaries name files as the tree and torch do, not as this machine does.
PREFIX_MAPS = [
    f"-ffile-prefix-map={ROOT}=.",
    f"-ffile-prefix-map={Path(torch.__file__).resolve().parent}=torch",
]
# cpp_extension itself defines Py_LIMITED_API (3.10) for every py_limited_api module.
CXX_FLAGS = [
    "-O3",
    "-g0",
    "-std=c++20",
    "-Wall",
    "-fvisibility=hidden",
    "-ffp-contract=off",  # the epilogue rounds after each operation: see csrc/common/numerics.h
    *PREFIX_MAPS,
    f"-DTORCH_TARGET_VERSION={TORCH_TARGET}",
]
NVCC_FLAGS = [
    "-O3",
    "-std=c++20",
    "--expt-relaxed-constexpr",
    "-Xcompiler=-fvisibility=hidden",
    *(f"-Xcompiler={flag}" for flag in PREFIX_MAPS),
    *(["-lineinfo"] if os.environ.get("INT8_OPS_LINEINFO") == "1" else []),
    f"-DTORCH_TARGET_VERSION={TORCH_TARGET}",
]

# One translation unit an instruction set, each with flags of its own: see csrc/cpu/isa.h.
CPU_ISA_FLAGS = {
    "csrc/cpu/avx2.cpp": ["-mavx2", "-mf16c", "-mfma"],
    "csrc/cpu/avx512_vnni.cpp": [
        "-mavx512f",
        "-mavx512bw",
        "-mavx512dq",
        "-mavx512vl",
        "-mavx512vnni",
        "-mf16c",
        # GCC's own AVX-512 headers trip it: their "undefined" vectors are uninitialised on purpose.
        "-Wno-maybe-uninitialized",
    ],
}
IS_X86_64 = platform.machine().lower() in ("x86_64", "amd64")


def build_info_macros() -> list[tuple[str, str]]:
    facts = {
        "INT8_OPS_VERSION": version(),
        "INT8_OPS_BUILD_TORCH": torch.__version__,
        "INT8_OPS_BUILD_CUDA": str(torch.version.cuda) if build_cuda else "",
        "INT8_OPS_BUILD_ARCHS": os.environ["TORCH_CUDA_ARCH_LIST"] if build_cuda else "",
        "INT8_OPS_BUILD_CUDA_SKIPPED": cuda_skipped,
    }
    return [(key, '"{}"'.format(value.replace('"', ""))) for key, value in facts.items()]


class BuildWithIsaUnits(BuildExtension):
    """Compiles the instruction-set units of the CPU kernels with their own flags, then the rest."""

    def build_extensions(self) -> None:
        if not build_cuda:
            self.remove_stale_cuda()
        core = next(ext for ext in self.extensions if ext.name == "int8_ops._C")
        units = CPU_ISA_FLAGS.items() if IS_X86_64 else ()
        with ThreadPoolExecutor(int(os.environ["MAX_JOBS"])) as pool:
            core.extra_objects += pool.map(lambda unit: self.compile_unit(*unit), units)
        super().build_extensions()

    def compile_unit(self, source: str, flags: list[str]) -> str:
        """The object file of `source`, compiled unless it is newer than all it is made of."""
        target = Path(self.build_temp, Path(source).with_suffix(".o"))
        inputs = [source, "setup.py", *sources("cpu/*.h", "common/*.h")]
        if not target.exists() or target.stat().st_mtime <= newest(inputs):
            self.compiler.compile(
                [source],
                output_dir=self.build_temp,
                extra_postargs=[*CXX_FLAGS, "-fPIC", *flags],
            )
        return str(target)

    def remove_stale_cuda(self) -> None:
        """What an earlier build with CUDA left would be imported, or packed into a wheel."""
        for package in (ROOT / "int8_ops", Path(self.build_lib, "int8_ops")):
            for module in package.glob("_C_cuda*.so"):
                module.unlink()


def newest(paths: list[str]) -> float:
    return max((ROOT / path).stat().st_mtime for path in paths)


cpu_sources = [path for path in sources("cpu/*.cpp") if path not in CPU_ISA_FLAGS]
ext_modules = [
    CppExtension(
        "int8_ops._C",
        ["csrc/library.cpp", *cpu_sources],
        extra_compile_args={"cxx": CXX_FLAGS},
        depends=["setup.py", *CPU_ISA_FLAGS, *sources("**/*.h")],
        py_limited_api=True,
    ),
    Extension(
        "int8_ops._build",
        [
            "csrc/build_info/module.cpp",
            "csrc/cpu/isa.cpp",
            "csrc/cuda/arch_list.cpp",
            *sources("cuda/heuristics/*.cpp"),
        ],
        define_macros=build_info_macros(),
        extra_compile_args=CXX_FLAGS,
        depends=["setup.py", "int8_ops/_version.py", *sources("**/*.h")],
        language="c++",
        py_limited_api=True,
    ),
]
if build_cuda:
    ext_modules.append(
        CUDAExtension(
            "int8_ops._C_cuda",
            sources("cuda/**/*.cpp", "cuda/**/*.cu"),
            define_macros=build_info_macros(),
            extra_compile_args={"cxx": [*CXX_FLAGS, "-DUSE_CUDA"], "nvcc": [*NVCC_FLAGS]},
            depends=["setup.py", *sources("**/*.h", "**/*.cuh")],
            py_limited_api=True,
        )
    )

setup(
    ext_modules=ext_modules,
    cmdclass={"build_ext": BuildWithIsaUnits},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)

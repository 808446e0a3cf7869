"""What the CUDA sources compile to: no spills, and a library that holds what it should. No GPU."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sysconfig
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
from torch.utils import cpp_extension

import int8_ops
from int8_ops import _extension

ROOT = Path(__file__).resolve().parents[1]
CUDA = ROOT / "csrc" / "cuda"
SOURCES = [str(path.relative_to(CUDA)) for path in sorted(CUDA.rglob("*.cu"))]
ARCHS = ("sm_80", "sm_90a")
JOBS = 2
REGISTERS_PER_SM = 65_536


def find_nvcc() -> str | None:
    """Where setup.py would look, in its order."""
    homes = [os.environ.get(key) for key in ("CUDA_HOME", "CUDA_PATH")]
    named = [str(Path(home) / "bin" / "nvcc") for home in homes if home]
    for path in (*named, "nvcc", "/usr/local/cuda/bin/nvcc"):
        found = shutil.which(path)
        if found is not None:
            return found
    return None


def nvcc_flags() -> list[str]:
    """setup.py's own flags and those torch adds, without what only the host compiler sees."""
    for node in ast.parse((ROOT / "setup.py").read_text()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "NVCC_FLAGS":
            own = [item.value for item in node.value.elts if isinstance(item, ast.Constant)]
            kept = [flag for flag in own if not flag.startswith("-Xcompiler")]
            return [*kept, *cpp_extension.COMMON_NVCC_FLAGS]
    raise AssertionError("setup.py assigns no NVCC_FLAGS")


def test_flags_are_those_of_the_build() -> None:
    flags = nvcc_flags()
    assert "-O3" in flags
    assert "-std=c++20" in flags
    assert not any("fast" in flag and "math" in flag for flag in flags)


@dataclass(frozen=True)
class Compiled:
    """One source for one architecture: nvcc's exit status, and all that ptxas said."""

    status: int
    log: str

    def functions(self) -> list[tuple[str, str]]:
        """(mangled name, the line on its frame and spills), kernels and out-of-line functions."""
        pattern = r"Function properties for (\S+)\n\s*(.*(?:stack frame).*)"
        return re.findall(pattern, self.log)

    def kernels(self) -> dict[str, int]:
        """Mangled name -> registers a thread."""
        pattern = r"Compiling entry function '(\S+)' for '\w+'\n(?:.*\n)*?.*Used (\d+) registers"
        return {name: int(count) for name, count in re.findall(pattern, self.log)}


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Compiled]:
    nvcc = find_nvcc()
    if nvcc is None:
        pytest.skip("no nvcc: not in CUDA_HOME, on PATH or in /usr/local/cuda")
    flags = nvcc_flags()
    out = tmp_path_factory.mktemp("cubin")

    def compile_one(job: tuple[str, str]) -> Compiled:
        source, arch = job
        cubin = out / f"{source.replace('/', '_')}.{arch}.cubin"
        command = [nvcc, *flags, "-Xptxas=-v", "-cubin", f"-arch={arch}", "-o", str(cubin)]
        run = subprocess.run(
            [*command, str(CUDA / source)], capture_output=True, text=True, timeout=300
        )
        return Compiled(run.returncode, run.stdout + run.stderr)

    jobs = [(source, arch) for source in SOURCES for arch in ARCHS]
    with ThreadPoolExecutor(JOBS) as pool:
        return dict(zip(jobs, pool.map(compile_one, jobs), strict=True))


every_unit = pytest.mark.parametrize(
    ("source", "arch"), [(source, arch) for source in SOURCES for arch in ARCHS]
)


@every_unit
def test_compiles_without_warnings(source: str, arch: str, compiled: dict) -> None:
    unit = compiled[source, arch]
    assert unit.status == 0, unit.log
    assert not re.search(r"\bwarning\b", unit.log, re.IGNORECASE), unit.log


@every_unit
def test_nothing_spills(source: str, arch: str, compiled: dict) -> None:
    unit = compiled[source, arch]
    kernels = unit.kernels()
    functions = unit.functions()
    assert kernels, unit.log
    assert set(kernels) <= {name for name, _ in functions}, unit.log
    clean = "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads"
    spilling = {name: line for name, line in functions if line != clean}
    assert not spilling, f"{source} for {arch}: {spilling}"
    for name, registers in kernels.items():
        print(f"{arch} {registers:4} registers  {name}")


@pytest.mark.parametrize("arch", ARCHS)
def test_every_tile_is_compiled(arch: str, compiled: dict) -> None:
    """Each tile's kernels stand in its own file, and a block of them fits the register file."""
    for index, tile in enumerate(_extension.build_info.require().gemm_tiles()):
        kernels = compiled[f"sm80/instantiations/gemm_tile_{index}.cu", arch].kernels()
        found = {
            (int(i), int(aligned)): count
            for name, count in kernels.items()
            for i, aligned in re.findall(r"11gemm_kernelILi(\d+)ELb([01])E", name)
        }
        expected = {(index, 1)} | ({(index, 0)} if tile["serves_unaligned"] else set())
        assert set(found) == expected
        assert len(kernels) == len(expected)
        for registers in found.values():
            assert -(-registers // 8) * 8 * tile["threads"] <= REGISTERS_PER_SM


# ---- the built library --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def library() -> Path:
    found = sorted(Path(int8_ops.__file__).parent.glob("_C_cuda*.so"))
    if not found:
        pytest.skip("this build has no CUDA module (int8_ops/_C_cuda*.so)")
    assert len(found) == 1, found
    return found[0]


def find_cuobjdump() -> str | None:
    """The toolkit's, or the one that PyPI's nvidia-cuda-cuobjdump or triton brings."""
    nvcc = find_nvcc()
    beside = [str(Path(nvcc).resolve().parent / "cuobjdump")] if nvcc else []
    for path in ("cuobjdump", *beside, "/usr/local/cuda/bin/cuobjdump"):
        on_path = shutil.which(path)
        if on_path is not None:
            return on_path
    for site in (sysconfig.get_path("purelib"), sysconfig.get_path("platlib")):
        for place in ("nvidia/*/bin/cuobjdump", "triton/backends/nvidia/bin/cuobjdump"):
            for found in sorted(Path(site).glob(place)):
                return str(found)
    return None


@pytest.fixture(scope="module")
def cuobjdump(library: Path):
    tool = find_cuobjdump()
    if tool is None:
        pytest.skip("no cuobjdump in the toolkit, and no nvidia-cuda-cuobjdump or triton")

    def run(*args: str) -> str:
        done = subprocess.run(
            [tool, *args, str(library)], capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


def listed(text: str, suffix: str) -> Counter[str]:
    """How many images of each architecture: lines such as "ELF file 1: rows.1.sm_80.cubin"."""
    return Counter(re.findall(rf"\.(sm_\w+)\.{suffix}$", text, re.M))


def built_archs() -> list[str]:
    return [
        part for part in _extension.build_info.require().info()["cuda_archs"].split(";") if part
    ]


def names(archs: list[str]) -> set[str]:
    return {"sm_" + arch.removesuffix("+PTX").replace(".", "") for arch in archs}


def test_library_holds_machine_code_of_every_architecture(cuobjdump) -> None:
    archs = built_archs()
    assert archs, "a build with a CUDA module names its architectures"
    # One image a source and architecture.
    images = listed(cuobjdump("--list-elf"), "cubin")
    assert images == {arch: len(SOURCES) for arch in names(archs)}


def test_library_holds_ptx_where_asked(cuobjdump) -> None:
    wanted = names([arch for arch in built_archs() if arch.endswith("+PTX")])
    images = listed(cuobjdump("--list-ptx"), "ptx")
    assert images == {arch: len(SOURCES) for arch in wanted}


def test_default_build_serves_8_0_9_0_and_newer(cuobjdump) -> None:
    if os.environ.get("TORCH_CUDA_ARCH_LIST") or built_archs() != ["8.0+PTX", "9.0a"]:
        pytest.skip(f"built for {';'.join(built_archs())}, not for the default list")
    assert "sm_80.cubin" in cuobjdump("--list-elf")
    assert "sm_90a.cubin" in cuobjdump("--list-elf")
    assert "sm_80.ptx" in cuobjdump("--list-ptx")


def test_gemm_multiplies_on_tensor_cores(cuobjdump) -> None:
    """Every GEMM kernel multiplies with m16n8k32 on int8, and none uses local memory."""
    for arch in sorted(names(built_archs())):
        sass = cuobjdump("--dump-sass", "--gpu-architecture", arch)
        kernels = dict(part.split("\n", 1) for part in sass.split("Function : ")[1:])
        gemms = [name for name in kernels if "11gemm_kernel" in name]
        tiles = _extension.build_info.require().gemm_tiles()
        assert len(gemms) == sum(1 + tile["serves_unaligned"] for tile in tiles)
        for name in gemms:
            assert re.search(r"\bIMMA\.16832\.S8\.S8\b", kernels[name]), f"{arch}: {name}"
            assert re.search(r"\bLDSM\b", kernels[name]), f"{arch}: {name}"
            local = re.search(r"\b(LDL|STL)\b", kernels[name])
            assert local is None, f"{arch}: {name} uses local memory"


def test_library_links_no_gemm_library(library: Path) -> None:
    readelf = shutil.which("readelf")
    nm = shutil.which("nm")
    if readelf is None or nm is None:
        pytest.skip("no binutils (readelf, nm)")
    dynamic = subprocess.run([readelf, "-dW", library], capture_output=True, text=True, check=True)
    needed = re.findall(r"\(NEEDED\).*\[(.+)\]", dynamic.stdout)
    assert any(name.startswith("libcudart") for name in needed), needed
    assert not [name for name in needed if re.search(r"blas|cudnn|cutlass|nvrtc|triton", name)]
    symbols = "".join(
        subprocess.run([nm, *how, library], capture_output=True, text=True, check=True).stdout
        for how in ([], ["-D"])
    )
    assert "cudaLaunchKernel" in symbols
    assert not re.findall(r"\S*(?:cublas|cutlass|cudnn|nvrtc)\S*", symbols, re.IGNORECASE)

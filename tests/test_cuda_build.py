"""What the CUDA sources compile to: no spills, and a library that holds what it should. No GPU."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sysconfig
from collections import Counter
from collections.abc import Iterable
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
BUILD = _extension.build_info.require()
# Kernels of a tile: of each dtype that x may have, or int8; for each of these a 16-bit or a float32
# result, and int32 sums of int8 alone.
SKINNY_SOURCES = {"a", "f", "6__half", "13__nv_bfloat16"}
HOPPER_VARIANTS = {(source, out) for source in range(4) for out in range(3)} | {(0, 3)}
HOPPER_TILES = {"resident": BUILD.resident_tiles(), "stream": BUILD.stream_tiles()}


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


def hopper_kernels(names: Iterable[str], path: str) -> dict[tuple[int, int, int], str]:
    """(tile, source of rows, dtype of results) -> mangled name."""
    pattern = rf"{path}_kernelILi(\d+)ELNS1_6SourceE(\d)ELNS_5DTypeE(\d)E"
    found = {name: re.search(pattern, name) for name in names}
    return {tuple(map(int, hit.groups())): name for name, hit in found.items() if hit}


def skinny_kernels(names: Iterable[str]) -> dict[tuple[int, str], str]:
    """(tile, T of the rows) -> mangled name."""
    pattern = r"skinny_kernelILi(\d+)E(.+?)EEvNS"
    found = {name: re.search(pattern, name) for name in names}
    return {(int(hit.group(1)), hit.group(2)): name for name, hit in found.items() if hit}


def panel_kernels(names: Iterable[str]) -> dict[tuple[int, str], str]:
    """(tile, T of the rows) -> mangled name."""
    pattern = r"panel_kernelILi(\d+)E(.+?)EEvNS"
    found = {name: re.search(pattern, name) for name in names}
    return {(int(hit.group(1)), hit.group(2)): name for name, hit in found.items() if hit}


def whole(registers: int) -> int:
    """As the hardware hands them out, a thread."""
    return -(-registers // 8) * 8


every_unit = pytest.mark.parametrize(
    ("source", "arch"), [(source, arch) for source in SOURCES for arch in ARCHS]
)


@every_unit
def test_compiles_without_warnings(source: str, arch: str, compiled: dict) -> None:
    unit = compiled[source, arch]
    assert unit.status == 0, unit.log
    assert not re.search(r"\bwarning\b", unit.log, re.IGNORECASE), unit.log
    # What ptxas calls an information: wgmma it has to serialize, registers it does not hand over.
    assert "Potential Performance Loss" not in unit.log, unit.log


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
    for index, tile in enumerate(BUILD.gemm_tiles()):
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
            assert whole(registers) * tile["threads"] <= REGISTERS_PER_SM


@pytest.mark.parametrize("arch", ARCHS)
def test_every_skinny_tile_is_compiled(arch: str, compiled: dict) -> None:
    """And so many blocks fit a multiprocessor as the tile says."""
    registers = compiled["skinny/skinny.cu", arch].kernels()
    kernels = skinny_kernels(registers)
    tiles = BUILD.skinny_tiles()
    assert set(kernels) == {(i, source) for i in range(len(tiles)) for source in SKINNY_SOURCES}
    assert len(registers) == len(kernels)
    for (index, _), name in kernels.items():
        threads = tiles[index]["threads"] * tiles[index]["blocks_per_sm"]
        assert whole(registers[name]) * threads <= REGISTERS_PER_SM, name


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("path", HOPPER_TILES)
def test_every_hopper_tile_is_compiled(path: str, arch: str, compiled: dict) -> None:
    """For every source of rows and every result; what is not for sm_90a is empty."""
    folder = "sm90/instantiations/"
    registers = {
        name: count
        for source in SOURCES
        if source.startswith(f"{folder}{path}_tile_")
        for name, count in compiled[source, arch].kernels().items()
    }
    kernels = hopper_kernels(registers, path)
    tiles = HOPPER_TILES[path]
    assert set(kernels) == {(i, *variant) for i in range(len(tiles)) for variant in HOPPER_VARIANTS}
    assert len(registers) == len(kernels)
    for (index, _, _), name in kernels.items():
        if arch == "sm_90a":
            # A warpgroup that multiplies takes more than this, and gets it from the others.
            assert whole(registers[name]) * tiles[index]["threads"] <= REGISTERS_PER_SM, name
            assert registers[name] >= 128, name
        else:
            assert registers[name] <= 32, name


@pytest.mark.parametrize("k_blocks", [1, 2, 4, 8])
@pytest.mark.parametrize("arch", ARCHS)
def test_the_stationary_kernel_is_compiled(arch: str, k_blocks: int, compiled: dict) -> None:
    """For int8 and 16-bit rows and every result, whatever the cluster."""
    source = f"sm90/instantiations/stationary_{k_blocks}.cu"
    registers = compiled[source, arch].kernels()
    pattern = rf"stationary_kernelILNS1_6SourceE(\d)ELNS_5DTypeE(\d)ELi{k_blocks}E"
    found = {tuple(map(int, re.search(pattern, name).groups())) for name in registers}
    assert found == {(source, out) for source, out in HOPPER_VARIANTS if source < 3}
    assert len(registers) == len(found)
    threads = BUILD.stationary_tiles()[0]["threads"]
    for name, count in registers.items():
        if arch == "sm_90a":
            assert whole(count) * threads <= REGISTERS_PER_SM, name
            assert count >= 128, name
        else:
            assert count <= 32, name


@pytest.mark.parametrize("arch", ARCHS)
def test_every_panel_tile_is_compiled(arch: str, compiled: dict) -> None:
    """And so many blocks fit a multiprocessor as the tile says; without sm_90a it is empty."""
    registers = compiled["sm90/panel.cu", arch].kernels()
    kernels = panel_kernels(registers)
    tiles = BUILD.panel_tiles()
    assert set(kernels) == {(i, source) for i in range(len(tiles)) for source in SKINNY_SOURCES}
    assert len(registers) == len(kernels)
    for (index, _), name in kernels.items():
        if arch == "sm_90a":
            threads = tiles[index]["threads"] * tiles[index]["blocks_per_sm"]
            assert whole(registers[name]) * threads <= REGISTERS_PER_SM, name
        else:
            assert registers[name] <= 32, name


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


@pytest.fixture(scope="module")
def sass(cuobjdump) -> dict[str, dict[str, str]]:
    """Architecture -> mangled name -> instructions, of every kernel in the library."""
    result = {}
    for arch in sorted(names(built_archs())):
        text = cuobjdump("--dump-sass", "--gpu-architecture", arch)
        result[arch] = dict(part.split("\n", 1) for part in text.split("Function : ")[1:])
    return result


def test_no_kernel_uses_local_memory(sass: dict[str, dict[str, str]]) -> None:
    for arch, kernels in sass.items():
        assert kernels, arch
        for name, code in kernels.items():
            assert re.search(r"\b(LDL|STL)\b", code) is None, f"{arch}: {name}"


def test_gemm_multiplies_on_tensor_cores(sass: dict[str, dict[str, str]]) -> None:
    """Every sm80 kernel multiplies with m16n8k32 on int8."""
    for arch, kernels in sass.items():
        gemms = [name for name in kernels if "11gemm_kernel" in name]
        assert len(gemms) == sum(1 + tile["serves_unaligned"] for tile in BUILD.gemm_tiles())
        for name in gemms:
            assert re.search(r"\bIMMA\.16832\.S8\.S8\b", kernels[name]), f"{arch}: {name}"
            assert re.search(r"\bLDSM\b", kernels[name]), f"{arch}: {name}"


def test_skinny_multiplies_on_tensor_cores(sass: dict[str, dict[str, str]]) -> None:
    for arch, kernels in sass.items():
        found = skinny_kernels(kernels)
        assert len(found) == len(BUILD.skinny_tiles()) * len(SKINNY_SOURCES)
        for name in found.values():
            assert re.search(r"\bIMMA\.16832\.S8\.S8\b", kernels[name]), f"{arch}: {name}"


@pytest.mark.parametrize("path", HOPPER_TILES)
def test_hopper_multiplies_by_wgmma(path: str, sass: dict[str, dict[str, str]]) -> None:
    """In sm_90a, as wide as the tile; elsewhere there is nothing in those kernels."""
    for arch, kernels in sass.items():
        found = hopper_kernels(kernels, path)
        assert len(found) == len(HOPPER_TILES[path]) * len(HOPPER_VARIANTS), arch
        for (index, source, _), name in found.items():
            code = kernels[name]
            where = f"{arch}: {name}"
            assert re.search(r"\bIMMA\b", code) is None, where
            if arch != "sm_90a":
                assert "IGMMA" not in code, where
                assert len(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/", code, re.M)) <= 32, where
                continue
            width = HOPPER_TILES[path][index]["block_n"]
            shapes = set(re.findall(r"\bIGMMA\.\S+?(?=\s)", code))
            assert shapes == {f"IGMMA.64x{width}x32.S8.S8"}, where
            assert re.search(r"\bUTMALDG\.2D", code), where
            assert bool(re.search(r"\bFFMA\b", code)) == (source != 0), where  # to quantize


def test_panel_multiplies_by_wgmma(sass: dict[str, dict[str, str]]) -> None:
    for arch, kernels in sass.items():
        found = panel_kernels(kernels)
        assert len(found) == len(BUILD.panel_tiles()) * len(SKINNY_SOURCES), arch
        for (index, _), name in found.items():
            shapes = set(re.findall(r"\bIGMMA\.\S+?(?=\s)", kernels[name]))
            width = BUILD.panel_tiles()[index]["rows"]
            expected = {f"IGMMA.64x{width}x32.S8.S8"} if arch == "sm_90a" else set()
            assert shapes == expected, f"{arch}: {name}"


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

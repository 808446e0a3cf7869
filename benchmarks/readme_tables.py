"""Writes the measured CUDA tables of README.md and benchmarks/README.md from one record.

python benchmarks/readme_tables.py [--record PATH] [--check]

A table stands between `<!-- bench NAME -->` and `<!-- end of bench NAME -->`; what is between them
is this script's, the rest is not touched. `--check` writes nothing and exits with 1 where a file
differs from what would be written.
"""

from __future__ import annotations

import argparse
import difflib
import re
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from int8_ops._bench import record as records
from int8_ops._bench import report
from int8_ops._bench.record import Row
from int8_ops._bench.shapes import LINEAR_SUITES

ROOT = Path(__file__).resolve().parents[1]
# The record that the tables are made from; relative to the root, as the text names it.
RECORD = Path("benchmarks/results/bench_linear_h100.json")
FILES = (Path("README.md"), Path("benchmarks/README.md"))
WIDTH = 100

# What a user of the library calls a peer; the tables of benchmarks/README.md have the short names.
LABELS = {
    "cuda": "`int8_linear`",
    "triton": "our Triton",
    "int_mm": "`_int_mm` + eager",
    "int_mm compiled": "`_int_mm` compiled",
    "cuda mm": "`int8_scaled_mm`",
    "triton mm": "Triton mm",
}


def paragraph(text: str) -> list[str]:
    """Wrapped as the files are."""
    return textwrap.wrap(text, WIDTH, break_long_words=False, break_on_hyphens=False)


def head(record: Mapping[str, Any], name: Path) -> list[str]:
    """Where the figures come from."""
    facts = record["facts"]
    triton = f", Triton {facts['triton']}" if facts.get("triton") else ""
    return paragraph(
        f"{facts['device']}, torch {facts['torch']}{triton}, commit {facts['commit']}, large copy "
        f"{1e-3 * facts['copy_gb_per_s']:.2f} TB/s (`{name.as_posix()}`)."
    )


def quantize_sentence(record: Mapping[str, Any]) -> str:
    """``quantize_per_token`` of the CUDA kernels, in one sentence."""
    told = []
    for line in record.get("quantize", []):
        if "cuda" in line:
            us, rate, percent = report.quantize_cells(line, "cuda")
            told.append(f"[{line['rows']}, {line['cols']}] {us} us, {rate} GB/s ({percent} %)")
    if not told:
        return ""
    return (
        "`quantize_per_token`, bf16, bytes read and written, and as a share of a large copy: "
        f"{'; '.join(told)}."
    )


def host_sentence(record: Mapping[str, Any]) -> str:
    """What an eager call costs, in one sentence."""
    kinds = {
        "host_us": "Host cost of one eager call at M = 1",
        "eager_us": "Whole eager call, host included, at M = 1, 4096 -> 14336",
    }
    told = []
    for key, what in kinds.items():
        us = record.get(key, {})
        if "INT8Linear(cuda)" in us:
            ours, theirs = us["INT8Linear(cuda)"], us["F.linear"]
            told.append(f"{what}: `INT8Linear` {ours:.1f} us, `F.linear` {theirs:.1f} us.")
    return " ".join(told)


def summary_table(record: Mapping[str, Any]) -> list[str]:
    """README.md: the Llama shapes, everything that a user would choose between."""
    found = records.of_suite(records.rows(record), "llama")
    names = report.names_of(found)
    linear = report.linear_columns(names, targets=False)
    ours = {"cuda mm", "triton mm"}
    columns = [column for column in linear if column.head not in ("floor", "mma.sync")]
    columns += [c for c in report.mm_columns(names, targets=False) if c.head in ours]
    legend = (
        "Microseconds a call, bf16 to bf16, quantizing x included; `x bf16` is bf16's time over "
        "`int8_linear`'s, `% floor` the share of its time that the bytes at copy speed, or the "
        "products at peak, would take; `int8_scaled_mm` and `mm` are given x as int8."
    )
    text = [*paragraph(legend), "", *report.markdown_rows(found, columns, LABELS)]
    for sentence in (quantize_sentence(record), host_sentence(record)):
        if sentence:
            text += ["", *paragraph(sentence)]
    return text


def suite_tables(record: Mapping[str, Any]) -> list[str]:
    """benchmarks/README.md: every suite that the record has, with every peer."""
    text: list[str] = []
    for name, suite in LINEAR_SUITES.items():
        found = records.of_suite(records.rows(record), name)
        if found:
            text += ["", f"**`{name}`**: {suite.summary}.", *linear_tables(found)]
    quantized = record.get("quantize", [])
    backends = [name for name in ("cuda", "triton") if any(name in line for line in quantized)]
    if backends:
        heads = [head for name in backends for head in (f"{name} us", "GB/s", "% of copy")]
        lines = [
            [
                f"{line['rows']}, {line['cols']}",
                *(cell for name in backends for cell in report.quantize_cells(line, name)),
            ]
            for line in quantized
        ]
        text += ["", "**`quantize`**: `quantize_per_token`, bf16.", ""]
        text += report.markdown(["rows, columns", *heads], lines)
    host = report.host_lines(record)
    if host:
        text += ["", "**`host`**: one eager call.", ""]
        text += report.markdown(["call", "us", "x F.linear"], host)
    return text[1:]


def linear_tables(found: Sequence[Row]) -> list[str]:
    """The table of int8_linear and, where it was measured, that of int8_scaled_mm."""
    names = report.names_of(found)
    targets = any(row.target is not None for row in found)
    text = ["", *report.markdown_rows(found, report.linear_columns(names, targets=targets))]
    mm = report.mm_columns(names, targets=targets)
    if mm:
        text += ["", "The same with x in int8 already:", "", *report.markdown_rows(found, mm)]
    return text


def plot_links(name: Path) -> list[str]:
    """The plots beside the record, in the folder that has its name, if there are any."""
    folder = ROOT / name.with_suffix("")
    paths = sorted(folder.glob("*.png")) if folder.is_dir() else []
    return [f"![{path.stem}](results/{folder.name}/{path.name})" for path in paths]


BLOCKS: dict[str, Callable[[Mapping[str, Any], Path], list[str]]] = {
    "summary": lambda record, name: [*head(record, name), "", *summary_table(record)],
    "suites": lambda record, name: [*head(record, name), "", *suite_tables(record)],
    "plots": lambda record, name: plot_links(name),
}


def rendered(text: str, record: Mapping[str, Any], name: Path) -> str:
    """``text`` with each block that it has replaced. Raises ValueError where a block has no end."""

    def replace(match: re.Match[str]) -> str:
        block = match["block"]
        if block not in BLOCKS:
            raise ValueError(f"no block is called {block!r}; there are {', '.join(BLOCKS)}")
        lines = BLOCKS[block](record, name)
        body = "".join(f"{line}\n" for line in ["", *lines, ""]) if lines else ""
        return f"{match['begin']}\n{body}{match['end']}"

    pattern = re.compile(
        r"(?P<begin><!-- bench (?P<block>\w+) -->)\n.*?(?P<end><!-- end of bench (?P=block) -->)",
        re.DOTALL,
    )
    result, count = pattern.subn(replace, text)
    if count != len(re.findall(r"<!-- bench \w+ -->", text)):
        raise ValueError("a block is not ended by its own <!-- end of bench NAME -->")
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Write the tables, or check them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--record", type=Path, default=RECORD, help="relative to the root (default: %(default)s)"
    )
    parser.add_argument("--check", action="store_true", help="write nothing; 1 where it would")
    args = parser.parse_args(argv)
    place = (ROOT / args.record).resolve()
    name = place.relative_to(ROOT) if place.is_relative_to(ROOT) else Path(place.name)
    record = records.load(place)
    stale = False
    for file in FILES:
        path = ROOT / file
        before = path.read_text()
        after = rendered(before, record, name)
        if before == after:
            continue
        stale = True
        if args.check:
            sys.stdout.writelines(
                difflib.unified_diff(
                    before.splitlines(keepends=True),
                    after.splitlines(keepends=True),
                    f"{file} as it is",
                    f"{file} as {name} has it",
                )
            )
        else:
            path.write_text(after)
            print(f"written: {file}")
    if not args.check and name != RECORD:
        print(f"{RECORD} is still what --check compares with: RECORD in this script")
    if args.check and stale:
        print("run `python benchmarks/readme_tables.py`")
    return 1 if args.check and stale else 0


if __name__ == "__main__":
    sys.exit(main())

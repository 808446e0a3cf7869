"""The house rules that a grep can hold, over csrc/: `python scripts/check_house_rules.py [ROOT]`.

Prints one `path:line: rule` for each violation and exits with 1 if there is any.

  torch headers stop at the door: kernels and launchers take structs of raw pointers
  asm lives in csrc/cuda/ptx/, one instruction a function
  one launch path: only csrc/cuda/launch.cuh launches a kernel
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

SUFFIXES = {".h", ".cuh", ".hpp", ".c", ".cc", ".cpp", ".cu", ".inc"}
# Comments and string literals, so that a rule's words in prose are not taken for code. Raw strings
# are left out: the tree has none.
NOT_CODE = re.compile(r'//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\\n])*"', re.DOTALL)


@dataclass(frozen=True)
class Rule:
    """A pattern that may occur only in files matching one of `allowed` (globs below csrc/)."""

    name: str
    pattern: re.Pattern[str]
    allowed: tuple[str, ...]
    # An include names its header in quotes or brackets, so it is searched with strings left in.
    in_strings: bool = False

    def allows(self, path: PurePosixPath) -> bool:
        """Whether the pattern may occur in `path`, which is relative to csrc/."""
        return any(path.match(glob) for glob in self.allowed)


RULES = (
    Rule(
        "torch headers only in library.cpp, */ops.cpp, common/checks.h and common/op_impl.h",
        re.compile(r'#\s*include\s*[<"](?:torch|ATen|c10)/'),
        ("/library.cpp", "/*/ops.cpp", "/common/checks.h", "/common/op_impl.h"),
        in_strings=True,
    ),
    Rule("asm only under cuda/ptx/", re.compile(r"\b(?:asm|__asm__|__asm)\b"), ("/cuda/ptx/*",)),
    Rule("<<< only in cuda/launch.cuh", re.compile(r"<<<"), ("/cuda/launch.cuh",)),
)


def blank(text: str, *, keep_strings: bool) -> str:
    """`text` without comments (and strings), each replaced by as many newlines as it held."""

    def replace(match: re.Match[str]) -> str:
        found = match.group()
        return found if keep_strings and found[0] == '"' else "\n" * found.count("\n")

    return NOT_CODE.sub(replace, text)


def violations(root: Path) -> Iterator[str]:
    """Every violation below `root`/csrc, as `path:line: rule`, in the order of the paths."""
    csrc = root / "csrc"
    for path in sorted(csrc.rglob("*")):
        if path.suffix not in SUFFIXES:
            continue
        source = path.read_text(encoding="utf-8")
        relative = PurePosixPath("/", path.relative_to(csrc).as_posix())
        for rule in RULES:
            if rule.allows(relative):
                continue
            code = blank(source, keep_strings=rule.in_strings)
            for match in rule.pattern.finditer(code):
                line = code.count("\n", 0, match.start()) + 1
                yield f"{path.relative_to(root)}:{line}: {rule.name}"


def main(arguments: list[str]) -> int:
    """Check the tree at `arguments[0]`, by default the one that this script belongs to."""
    root = Path(arguments[0]) if arguments else Path(__file__).resolve().parent.parent
    if not (root / "csrc").is_dir():
        print(f"{root}: no csrc/ here", file=sys.stderr)
        return 2
    found = list(violations(root))
    print("\n".join(found) or "house rules: clean")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""The command line, ``python -m int8_ops``: one subcommand a thing to do.

A subcommand is a module of ``int8_ops._commands`` with ``add_arguments(parser)`` and
``run(args) -> int``, the exit code; the first paragraph of its docstring is its help.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from types import ModuleType

from ._commands import CommandError, bench, check, convert, demo, eval, generate, info
from ._version import __version__

COMMANDS: dict[str, ModuleType] = {
    "demo": demo,
    "convert": convert,
    "eval": eval,
    "generate": generate,
    "check": check,
    "bench": bench,
    "info": info,
}


def build_parser() -> argparse.ArgumentParser:
    """The parser with every subcommand; a parsed namespace carries ``run``."""
    parser = argparse.ArgumentParser(
        prog="python -m int8_ops", description="INT8 that pays, for low-rank Llama."
    )
    parser.add_argument("--version", action="version", version=f"int8_ops {__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, module in COMMANDS.items():
        summary = (module.__doc__ or "").partition("\n\n")[0]
        subparser = subparsers.add_parser(
            name,
            help=summary,
            description=module.__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(subparser)
        subparser.set_defaults(run=module.run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command named by ``argv`` (default: the process's own) and return its exit code.

    0: done; 1: ``check`` or ``bench`` found something off; 2: the command could not be carried out
    as asked.
    """
    args = build_parser().parse_args(argv)
    run: Callable[[argparse.Namespace], int] = args.run
    try:
        return run(args)
    except CommandError as error:
        print(f"int8_ops {args.command}: {error}", file=sys.stderr)
        return 2

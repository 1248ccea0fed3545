"""`kinetoscope explain`: what a step trace says, or where two part ways."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from kinetoscope.core.errors import InputError

NAME = "explain"
HELP = "print a step trace as a table, or the first step at which two traces part ways"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("trace", help="a file that `kinetoscope generate --trace` wrote")
    parser.add_argument("other", nargs="?", help="another one, to compare with")
    parser.add_argument(
        "--tolerance", type=float, default=1e-4, metavar="X",
        help="relative difference that two values may have (default: 1e-4)",
    )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """0; with two traces 1 if they part ways."""
    from rich.console import Console
    from rich.table import Table

    from kinetoscope.evaluation.traces import read_trace, table_of

    if not args.tolerance >= 0:
        raise InputError(f"--tolerance={args.tolerance} is below 0")
    first = read_trace(Path(args.trace))
    if args.other is not None:
        return _compare(args, first)
    titles, rows, lines = table_of(first)
    table = Table(box=None, pad_edge=False)
    for title in titles:
        left = title in ("rows", "why")
        table.add_column(title, justify="left" if left else "right", no_wrap=not left, overflow="fold")
    for row in rows:
        table.add_row(*row)
    console = Console()
    if not console.is_terminal:
        console = Console(width=max(100, sum(max(map(len, c)) + 2 for c in zip(titles, *rows, strict=True))))
    console.print(table)
    for line in lines:
        print(line)
    return 0


def _compare(args: argparse.Namespace, first: list[Any]) -> int:
    from kinetoscope.evaluation.traces import executed_differently, largest_differences, parting, read_trace

    second = read_trace(Path(args.other))
    found = parting(first, second, args.tolerance)
    if executed_differently(first, second):
        print("the rows were put into other forwards; only results are compared")
    if found is None:
        print(f"the same to {args.tolerance:g} in all {len(first)} steps")
    elif found.field == "steps":
        print(
            f"the same to {args.tolerance:g} for {found.index} steps, then one ends: {found.a} against {found.b} steps"
        )
    else:
        by = "" if found.difference is None else f" (differs by {found.difference:.2g})"
        record = first[found.index]
        block = "" if record.get("block") is None else f" of block {record['block']}"
        print(f"parted at step {record['step']}{block}, {found.field}: {_short(found.a)} against {_short(found.b)}{by}")
    for field, difference in largest_differences(first, second).items():
        print(f"  {field:16} differs by at most {difference:.2g}")
    return 0 if found is None else 1


def _short(value: Any) -> str:
    """A value of a trace with six digits."""
    if isinstance(value, list):
        return f"[{', '.join(map(_short, value))}]"
    return f"{value:.6g}" if isinstance(value, float) else str(value)

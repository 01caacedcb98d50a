"""`cierzo usage`."""

from __future__ import annotations

import argparse
import sys

import msgspec

from cierzo.engine.frontend.observe.usage_sum import SUMMED, Reader, Sums, files_of, moment


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the files and what to sum."""
    parser.add_argument(
        "files", nargs="+", metavar="FILE", help="what --usage-file names; what was rotated out of it is read too"
    )
    parser.add_argument("--json", action="store_true", help="print an object instead of a table")
    for name, text in (("since", "from this moment on"), ("until", "before this moment")):
        parser.add_argument(
            f"--{name}", type=_moment, metavar="T", help=f"sum what ended {text}: a date and time, ISO 8601, UTC"
        )


def run(arguments: argparse.Namespace) -> int:
    """Sum by tenant. The exit status is 1 if a line was no record; one that was cut short is only told."""
    reader = Reader(_tell)
    sums = reader.sums(files_of(arguments.files), arguments.since, arguments.until)
    if arguments.json:
        told = {"tenants": sums, "bad_lines": reader.num_bad, "cut_lines": reader.num_cut}
        print(msgspec.json.encode(told).decode())
    else:
        print(table(sums))
    if reader.num_bad:
        print(f"cierzo: {reader.num_bad} lines are no records, and are not in the sums", file=sys.stderr)
    return 1 if reader.num_bad else 0


def table(sums: dict[str, Sums]) -> str:
    """The sums as a table, with a line for all tenants together."""
    total = Sums()
    for each in sums.values():
        total.requests += each.requests
        for name in SUMMED:
            setattr(total, name, getattr(total, name) + getattr(each, name))
    heads = ("tenant", "requests", *SUMMED)
    rows = [heads, *(_row(tenant, each) for tenant, each in sums.items()), _row("all", total)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *others in rows:
        cells = [first.ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(others, widths[1:], strict=True))]
        lines.append("  ".join(cells))
    return "\n".join(lines)


def _row(tenant: str, sums: Sums) -> tuple[str, ...]:
    figures = [getattr(sums, name) for name in ("requests", *SUMMED)]
    return (tenant, *(f"{figure:,.1f}" if isinstance(figure, float) else f"{figure:,}" for figure in figures))


def _tell(path: str, number: int, why: str) -> None:
    print(f"cierzo: {path}: line {number} is no record: {why[:200]}", file=sys.stderr)


def _moment(text: str) -> object:
    try:
        return moment(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a date, or date and time, in ISO 8601, got {text!r}") from None

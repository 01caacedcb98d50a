"""From samples to what is told: rows, ratios of paired rounds, goals met or not."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Generic, TypeVar

import msgspec

from cierzo.bench.campaign.store import Store
from cierzo.bench.machine import Ceilings, middle
from cierzo.bench.report import Report
from cierzo.bench.stats import paired_ratio
from cierzo.engine.errors import ConfigError

C = TypeVar("C")
S = TypeVar("S")
R = TypeVar("R")
T = TypeVar("T")


class Row(msgspec.Struct, Generic[C, S, R], frozen=True, kw_only=True):
    """A subject in a cell. values: by round, in the cell's unit. result: of the round in the middle.

    limit: the value if the machine's ceilings alone decided. note: what the figure does not say. error: why there
    is none.
    """

    cell: C
    subject: S
    rounds: list[int] = []
    values: list[float] = []
    limit: float | None = None
    result: R | None = None
    note: str = ""
    error: str = ""


class Ratio(msgspec.Struct, Generic[C, S], frozen=True, kw_only=True):
    """Ratio of one subject's value to another's: the median over the rounds that both ran. None: there are none.

    limit: the ratio if both ran at the device's full rates. goal: a bound on the ratio; whether it was met.
    """

    cell: C
    ours: S
    against: S
    ratio: float | None = None
    rounds: int = 0
    limit: float | None = None
    goal: float | None = None
    met: bool | None = None


class Outcome(msgspec.Struct, Generic[C, S, R], frozen=True, kw_only=True):
    """All that a run says. identity: its samples'. samples: all, where rows do not hold them."""

    identity: dict[str, str]
    goals_are_for: str = ""
    ceilings: list[Ceilings] = []
    rows: list[Row[C, S, R]]
    ratios: list[Ratio[C, S]]
    samples: list[Any] = []


Values = Callable[[C, S], Mapping[int, float]]  # of a subject in a cell, by round


def rows(
    store: Store, places: Iterable[tuple[C, S]], values: Values[C, S], about: Callable[[C, S, Any], dict[str, Any]]
) -> list[Row[C, S, R]]:
    """Every place that was tried. about: what a benchmark tells of a row beyond its values, from cell, subject and
    the result of the round with the median value (of an even number the lower of the two; None without any)."""
    found: list[Row[C, S, R]] = []
    for cell, subject in places:
        by_round, error = values(cell, subject), store.error(cell, subject)
        if by_round or error:
            ordered = sorted(by_round, key=by_round.__getitem__)
            middle = store.measured(cell, subject)[ordered[(len(ordered) - 1) // 2]] if ordered else None
            told = about(cell, subject, middle) | {"error": "" if by_round else error}
            rounds = sorted(by_round)
            found.append(
                Row(cell=cell, subject=subject, rounds=rounds, values=[by_round[n] for n in rounds], **told)
            )
    return found


def ratio(
    cell: C, ours: S, against: S, values: Values[C, S], goal: float | None = None, *, at_least: bool = True
) -> Ratio[C, S]:
    """The ratio of two subjects' values. goal: met by as much, or with `at_least` false by as little."""
    one, other = values(cell, ours), values(cell, against)
    common = sorted(one.keys() & other.keys())
    found: Ratio[C, S] = Ratio(cell=cell, ours=ours, against=against, rounds=len(common), goal=goal)
    if not common:
        return found
    paired = paired_ratio([one[number] for number in common], [other[number] for number in common])
    met = None if goal is None else (paired >= goal if at_least else paired <= goal)
    return msgspec.structs.replace(found, ratio=paired, met=met)


def head(found: Outcome[Any, Any, Any], command: str) -> list[str]:
    """Lines that say what figures belong to: command, identity, and the medians of what the machine could do."""
    lines = [f"{command}, commit {found.identity['commit']}"]
    lines += [f"{name}: {value}" for name, value in found.identity.items() if name != "commit"]
    if found.ceilings:
        one = middle(found.ceilings)
        int8 = "" if one.int8 is None else f", {one.int8.rate:.0f} GOP/s in int8"
        rates = f"{one.read.rate:.1f} GB/s read, {one.bf16.rate:.0f} GFLOP/s in bf16{int8}"
        lines.append(f"ceilings measured in the same run, median: {rates}")
    return lines


def notes(found: Outcome[Any, Any, Any]) -> list[str]:
    """Lines for what figures do not say, and for what has none."""
    lines = [f"{row.cell.name}, {row.subject}: {row.note}" for row in found.rows if row.note]
    return lines + [f"{row.cell.name}, {row.subject}: NOT MEASURED: {row.error}" for row in found.rows if row.error]


def saved(stem: Path, type_: type[T]) -> T:
    """The outcome in `stem`.json, which an earlier run left. Raises ConfigError where there is none."""
    path = Path(f"{stem}.json")
    if not path.exists():
        raise ConfigError(f"nothing was measured: there is no {path}", field="output", value=str(path))
    try:
        return msgspec.convert(msgspec.json.decode(path.read_bytes(), type=Report).results, type_)
    except msgspec.MsgspecError as error:
        raise ConfigError(f"{path}: {error}", field="output", value=str(path)) from error

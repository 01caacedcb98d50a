"""From samples to what is told: rows, ratios of paired rounds, goals met or not; and the files that tell it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

import msgspec

from cierzo.bench.campaign.store import Store
from cierzo.bench.machine import Ceilings, middle
from cierzo.bench.report import Report, write_report
from cierzo.bench.stats import paired_ratio
from cierzo.engine.errors import ConfigError

C = TypeVar("C")
S = TypeVar("S")
R = TypeVar("R")
T = TypeVar("T")
SIMULATED = "simulated:"  # how the device of a simulation begins


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
    """Ratio of one subject's value to another's: the median over the rounds that both ran. limit: the ratio if both
    ran at the device's full rates."""

    cell: C
    ours: S
    against: S
    ratio: float
    rounds: int
    limit: float | None = None


class Goal(msgspec.Struct, Generic[S], frozen=True, kw_only=True):
    """A bound on the ratio of one cell, named, for a pair of subjects."""

    cell: str
    ours: S
    against: S
    at_least: float | None = None
    at_most: float | None = None

    def met(self, ratio: float) -> bool:
        """Whether a ratio keeps the bound."""
        enough = self.at_least is None or ratio >= self.at_least
        return enough and (self.at_most is None or ratio <= self.at_most)


class Verdict(msgspec.Struct, Generic[S], frozen=True, kw_only=True):
    """A goal, and what was measured; None where it was not."""

    goal: Goal[S]
    ratio: float | None = None
    limit: float | None = None
    met: bool | None = None


class Outcome(msgspec.Struct, Generic[C, S, R], frozen=True, kw_only=True):
    """All that a run says. assumed: the shares of a simulated device's rates, and its overheads. samples: those of
    every round, where the rows do not hold them."""

    identity: dict[str, str]
    assumed: str = ""
    goals_are_for: str = ""
    ceilings: list[Ceilings] = []
    rows: list[Row[C, S, R]]
    ratios: list[Ratio[C, S]]
    verdicts: list[Verdict[S]] = []
    samples: list[Any] = []

    @property
    def device(self) -> str:
        """The device that the figures were measured on, or that was simulated."""
        return self.identity["device"].removeprefix(SIMULATED)

    @property
    def is_simulation(self) -> bool:
        """Whether no device has run this."""
        return self.identity["device"].startswith(SIMULATED)


Values = Callable[[C, S], Mapping[int, float]]  # of a subject in a cell, by round


def rows(
    store: Store,
    places: Sequence[tuple[C, S]],
    values: Values[C, S],
    complete: Callable[[Row[C, S, Any]], Row[C, S, R]],
) -> list[Row[C, S, R]]:
    """Every place that was tried. complete: fills in what a benchmark tells of a row beyond its values, the result
    being JSON until then."""
    found = []
    for cell, subject in places:
        by_round, error = values(cell, subject), store.error(cell, subject)
        if by_round or error:
            numbers = sorted(by_round)
            row: Row[C, S, Any] = Row(
                cell=cell,
                subject=subject,
                rounds=numbers,
                values=[by_round[number] for number in numbers],
                result=_middle(store.measured(cell, subject), by_round),
                error="" if by_round else error,
            )
            found.append(complete(row))
    return found


def _middle(results: Mapping[int, Any], by_round: Mapping[int, float]) -> Any:
    """The result of the round with the median value; of an even number the lower of the two."""
    ordered = sorted(by_round, key=by_round.__getitem__)
    return results[ordered[(len(ordered) - 1) // 2]] if ordered else None


def ratio(
    cell: C, ours: S, against: S, values: tuple[Mapping[int, float], Mapping[int, float]]
) -> Ratio[C, S] | None:
    """The ratio of two subjects' values; None where no round has both."""
    one, other = values
    common = sorted(one.keys() & other.keys())
    if not common:
        return None
    paired = paired_ratio([one[number] for number in common], [other[number] for number in common])
    return Ratio(cell=cell, ours=ours, against=against, ratio=paired, rounds=len(common))


def verdicts(goals: Sequence[Goal[S]], ratios: Sequence[Ratio[Any, S]]) -> list[Verdict[S]]:
    """Each goal beside the ratio of its cell and pair, if there is one."""
    by_pair = {(one.cell.name, one.ours, one.against): one for one in ratios}
    said = []
    for goal in goals:
        one = by_pair.get((goal.cell, goal.ours, goal.against))
        if one is None:
            said.append(Verdict(goal=goal))
        else:
            said.append(Verdict(goal=goal, ratio=one.ratio, limit=one.limit, met=goal.met(one.ratio)))
    return said


def ceilings_line(found: Sequence[Ceilings]) -> list[str]:
    """The medians of what the machine could do, as a line; none where it was not measured."""
    if not found:
        return []
    one = middle(found)
    rates = f"{one.read.rate:.1f} GB/s read, {one.bf16.rate:.0f} GFLOP/s in bf16"
    return [f"ceilings measured in the same run, median: {rates}"]


def tell(
    name: str, outcome: Outcome[Any, Any, Any], text: str, stem: Path, picture: Callable[[Path], None], **about: Any
) -> None:
    """Print the text, and write `stem`.txt, .json and .png. about: what a report says besides (bench/report.py)."""
    print(f"\n{text}")
    stem.parent.mkdir(parents=True, exist_ok=True)
    with_suffix(stem, ".txt").write_text(text + "\n", encoding="utf-8")
    write_report(with_suffix(stem, ".json"), name, results=outcome, **about)
    try:
        picture(with_suffix(stem, ".png"))
    except ConfigError as error:
        print(f"no picture: {error}")


def saved(stem: Path, type_: type[T]) -> T | None:
    """The outcome in `stem`.json, which an earlier run left; None where there is none. Raises ConfigError."""
    path = with_suffix(stem, ".json")
    if not path.exists():
        return None
    try:
        return msgspec.convert(msgspec.json.decode(path.read_bytes(), type=Report).results, type_)
    except msgspec.MsgspecError as error:
        raise ConfigError(f"{path}: {error}", field="output", value=str(path)) from error


def with_suffix(stem: Path, suffix: str) -> Path:
    """`stem` with a suffix behind it, whatever dots its name has."""
    return stem.parent / (stem.name + suffix)

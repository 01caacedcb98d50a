"""Panels as a PNG: what all benchmarks' pictures have in common."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from cierzo.engine.errors import ConfigError

WARM = ("#b3362b", "#e08a5b", "#d4a017", "#f2b8a0")
COLD = ("#22577a", "#38a3a5", "#80b918", "#9aa6b2", "#6d6875", "#b5838d", "#457b9d", "#84a98c")
T = TypeVar("T", bound=Hashable)
Draw = Callable[[Any], None]  # onto a matplotlib axis
Legend = dict[str, str]  # name -> colour


def find_matplotlib(path: Path) -> Any:
    """Import matplotlib, which draws `path`. Raises ConfigError without it."""
    try:
        import matplotlib
    except ImportError as error:
        raise ConfigError(f"{path} needs matplotlib: pip install 'cierzo[bench]'", field="output") from error
    return matplotlib


def plot(
    path: Path, title: str, panels: Sequence[Draw], columns: int, inches: tuple[float, float], legend: Legend
) -> None:
    """Write a PNG of panels, `columns` in a line, each of this width and height.

    Raises ConfigError without matplotlib, or where there is nothing to show.
    """
    matplotlib = find_matplotlib(path)
    if not panels:
        raise ConfigError(f"nothing was measured that {path} could show", field="output", value=path)
    matplotlib.use("Agg")
    from matplotlib import patches, pyplot

    columns = min(columns, len(panels))
    lines = -(-len(panels) // columns)
    size = (inches[0] * columns, inches[1] * lines + 1.0)
    figure, axes = pyplot.subplots(lines, columns, figsize=size, squeeze=False, layout="constrained")
    for axis, draw in zip(axes.flat, panels, strict=False):
        draw(axis)
        axis.tick_params(labelsize=7)
        axis.spines[["top", "right"]].set_visible(False)
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    handles = [patches.Patch(color=color) for color in legend.values()]
    figure.legend(handles, list(legend), loc="outside lower center", ncols=3, fontsize=8)
    figure.suptitle(title, fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def colors(subjects: Iterable[T], is_warm: Callable[[T], bool]) -> dict[T, str]:
    """A colour for each subject: ours warm, theirs cold."""
    warm, cold = itertools.cycle(WARM), itertools.cycle(COLD)
    return {subject: next(warm if is_warm(subject) else cold) for subject in dict.fromkeys(subjects)}

"""Choice of a step's tokens where some of its sequences have a grammar.

Whoever has none is chosen for when the step is launched, as ever. So is a sequence whose mask is known then. All
others are chosen for once the step before is collected: that gives the tokens which their masks depend on.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import TYPE_CHECKING

from torch import Tensor

from cierzo.engine.worker.grammars import Constraint, await_masks

if TYPE_CHECKING:
    from cierzo.engine.worker.sampling import Sampled, Sampler


class Choosing:
    """Choice of a step's M tokens, in one part or two.

    logits fp32 [M,N], which stay until the next step is launched; row i is for the sequence in slots[i], at
    position positions[i]. pending: rows whose last token is one that the step before chooses. constraints: by row,
    of those with a grammar.
    """

    def __init__(
        self,
        sampler: Sampler,
        logits: Tensor,
        slots: list[int],
        positions: list[int],
        pending: Collection[int],
        constraints: dict[int, Constraint],
    ) -> None:
        self._sampler, self._logits = sampler, logits
        self._slots, self._positions = slots, positions
        self._pending = pending
        self._constraints = constraints
        self._later = [row for row in constraints if row in pending]
        self._parts: list[tuple[list[int], Callable[[], Sampled]]] = []
        self._failures: dict[int, str] = {}
        self._late: set[int] = set()
        self._error: BaseException | None = None

    def begin(self) -> None:
        """Choose for all whose masks do not depend on the step before."""
        later = {*self._later}
        self._launch([row for row in range(len(self._slots)) if row not in later], self._pending, later=False)

    def finish(self, unchosen: Collection[int]) -> None:
        """Choose for all others, the step before having been collected. unchosen: slots that it chose nothing for.
        What goes wrong is this step's, and comes when its results are asked for."""
        rows, self._later = self._later, []
        self._late |= {row for row in rows if self._slots[row] in unchosen}
        try:
            self._launch([row for row in rows if row not in self._late], (), later=True)
        except BaseException as error:
            self._error = error

    def all(self) -> Sampled:
        """Choose for all, and wait for the results."""
        self.begin()
        return self.sampled()

    def sampled(self) -> Sampled:
        """Wait for the results; rows that were late have none."""
        from cierzo.engine.worker.sampling import Sampled

        if self._error is not None:
            raise self._error
        assert not self._later, "the step before was not collected"
        whole = Sampled([-1] * len(self._slots), failures=self._failures, late=self._late)
        for rows, results in self._parts:
            whole.take(rows, results())
        return whole

    def _launch(self, rows: list[int], pending: Collection[int], *, later: bool) -> None:
        """Choose for rows, but those whose mask is not there."""
        constraints = {row: self._constraints[row] for row in rows if row in self._constraints}
        if constraints:
            await_masks(constraints.values())
            late = {row for row, one in constraints.items() if not one.settle() or one.state == "ended"}
            failed = {row: one.error for row, one in constraints.items() if row not in late and one.error}
            self._late |= late
            self._failures |= failed
            rows = [row for row in rows if row not in late and row not in failed]
        if not rows:
            return
        whole = len(rows) == len(self._slots)
        at = {row: index for index, row in enumerate(rows)}
        results = self._sampler.launch(
            self._logits,
            [self._slots[row] for row in rows],
            [self._positions[row] for row in rows],
            {at[row] for row in pending if row in at},
            rows=None if whole else rows,
            later=later,
        )
        self._parts.append((rows, results))

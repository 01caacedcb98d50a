"""The sampler: what each running sequence asked for, by slot, and how a step's logits become tokens.

State is numpy, a few values per slot; token histories exist only for sequences with penalties. The arithmetic
and its order are those of `kernels/ops/sampling.py`.

From logits to tokens nothing waits for the device: what the host knows goes there in one copy, what it wants to
know comes back in one, and is read when the step is collected.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cierzo.engine.worker.edits import Arrays, Edits, TokenHistory, apply, arrays_of, edits_of
from cierzo.engine.worker.grammars import Constraint, follow_all
from cierzo.engine.worker.masks import NOTHING_LEFT, Masks
from cierzo.engine.worker.staging import Staging
from cierzo.kernels.ops import sampling as ops
from cierzo.scheduler.plan import Admission, TokenLogprobs

NOT_FINITE = "the model's logits are not finite (NaN or infinity)"
_KEYS = ("temperature", "top_k", "top_p", "min_p", "seed", "sample", "position")  # of a drawn row


@dataclass(slots=True)
class Sampled:
    """Sampled tokens, an entry for each row of logits.

    failures: by row, why its token means nothing. late: rows whose token was not chosen, as their mask was not
    there. followers: those that are still to be told their row's token, see `remember`; constraints: the same, by
    row, with the number of the admission that they are of.
    """

    token_ids: list[int]
    logprobs: list[list[TokenLogprobs] | None] | None = None
    failures: dict[int, str] = field(default_factory=dict)
    followers: list[tuple[int, TokenHistory | Masks]] = field(default_factory=list)
    late: set[int] = field(default_factory=set)
    constraints: dict[int, tuple[Constraint, int]] = field(default_factory=dict)

    def itself(self) -> Sampled:
        """Return this object: the results of a step that has nothing to wait for."""
        return self

    def remember(self) -> None:
        """Tell the tokens to penalties, masks and grammars: once, when the step can fail no more."""
        told = {
            row: constraint
            for row, (constraint, admission) in self.constraints.items()
            if row not in self.failures and admission == constraint.num_admissions
        }
        if told:
            rows = [*told]
            self.late |= {rows[index] for index in follow_all([(told[row], self.token_ids[row]) for row in rows])}
            self.failures |= {row: constraint.error for row, constraint in told.items() if constraint.error}
        for row, follower in self.followers:
            if row not in self.late:
                follower.append(self.token_ids[row])

    def take(self, rows: list[int], part: Sampled) -> None:
        """Take over the results of some rows, in their order."""
        for row, token_id in zip(rows, part.token_ids, strict=True):
            self.token_ids[row] = token_id
        if part.logprobs is not None:
            self.logprobs = self.logprobs or [None] * len(self.token_ids)
            for row, entry in zip(rows, part.logprobs, strict=True):
                self.logprobs[row] = entry
        self.failures |= {rows[index]: reason for index, reason in part.failures.items()}
        self.followers += [(rows[index], follower) for index, follower in part.followers]
        self.constraints |= {rows[index]: constraint for index, constraint in part.constraints.items()}


@dataclass(slots=True, frozen=True)
class _Launched:
    """Work that a launch leaves for the time when its results are there.

    results: "token_ids" int64 [M], "peaks" fp32 [M]; of edited rows "edited_peaks", those of the edited logits; of
    Q reports "own" fp32 [Q], the tokens' log-probabilities, "top" fp32 [Q,C], the largest, "top_ids" int64 [Q,C].
    followers, constraints: by row, the token is for them.
    """

    results: Callable[[], dict[str, NDArray[Any]]]
    edited: list[int]
    reports: list[int]
    counts: list[int]
    followers: list[tuple[int, TokenHistory | Masks]]
    constraints: dict[int, tuple[Constraint, int]]

    def sampled(self) -> Sampled:
        """Wait for the results and report them."""
        found = self.results()
        finite = np.isfinite(found["peaks"])
        failed = {} if finite.all() else dict.fromkeys(np.flatnonzero(~finite).tolist(), NOT_FINITE)
        if self.edited:
            finite[self.edited] &= np.isfinite(found["edited_peaks"])
            for row in np.flatnonzero(~finite).tolist() if not finite.all() else ():
                held = self.constraints.get(row)
                beside = f" of those that the grammar permits {held[0].place}" if held else ""
                failed.setdefault(row, f"{NOTHING_LEFT}{beside}")
        chosen: list[int] = found["token_ids"].tolist()
        logprobs: list[list[TokenLogprobs] | None] | None = None
        if self.reports:
            logprobs = [None] * len(chosen)
            reported = zip(self.reports, self.counts, found["own"].tolist(), strict=True)
            for index, (row, count, own) in enumerate(reported):
                if finite[row]:
                    top = found["top_ids"][index, :count].tolist(), found["top"][index, :count].tolist()
                    logprobs[row] = [TokenLogprobs(chosen[row], own, *top)]
        return Sampled(chosen, logprobs, failed, self.followers, constraints=self.constraints)


class Sampler:
    """Sampling state of all slots, and the one call per step that uses it.

    staging: how arrays get to a device of its own and results back; without it the device is the host. later: the
    same, for rows that are chosen for after the others of their step, whose memory may still be read then.
    """

    def __init__(
        self,
        max_running: int,
        device: torch.device | str = "cpu",
        staging: Staging | None = None,
        later: Staging | None = None,
    ) -> None:
        self._staging, self._later = staging, later
        self._temperature = np.zeros(max_running, np.float64)
        self._top_k = np.zeros(max_running, np.int64)
        self._top_p = np.ones(max_running, np.float64)
        self._min_p = np.zeros(max_running, np.float64)
        self._seed = np.zeros(max_running, np.int64)
        self._sample = np.zeros(max_running, np.int64)
        self._num_logprobs = np.full(max_running, -1, np.int64)
        self._edits: list[Edits | None] = [None] * max_running
        self._bound: set[int] = set()  # slots whose sequences have a grammar
        self._plain = [True] * max_running  # the largest logit it is, and nothing else is asked for
        self.chosen = torch.zeros(
            max_running, dtype=torch.int64, device=device
        )  # what `launch` gave each slot last

    def admit(self, slot: int, sample: int, admission: Admission) -> None:
        """A sequence (sample number `sample` of its request) takes `slot`; whatever was there is forgotten."""
        params = admission.sampling
        self._temperature[slot] = params.temperature
        self._top_k[slot] = params.top_k
        self._top_p[slot] = params.top_p
        self._min_p[slot] = params.min_p
        self._seed[slot] = np.uint64((params.seed or 0) & (2**64 - 1)).astype(np.int64)
        self._sample[slot] = sample
        self._num_logprobs[slot] = -1 if params.logprobs is None else params.logprobs
        self._edits[slot] = edits = edits_of(admission)
        self._plain[slot] = params.temperature == 0 and params.logprobs is None and edits is None
        self._bound.discard(slot)
        if edits is not None and edits.constraint is not None:
            self._bound.add(slot)

    def constraints(self, slots: list[int]) -> dict[int, Constraint]:
        """By row, the grammars of the sequences in these slots."""
        if not self._bound:
            return {}
        edits = ((row, self._edits[slot]) for row, slot in enumerate(slots) if slot in self._bound)
        return {row: edit.constraint for row, edit in edits if edit is not None and edit.constraint is not None}

    def sample(self, logits: Tensor, slots: list[int], positions: list[int]) -> Sampled:
        """Choose a token for each of M rows; row i is for the sequence in slots[i], at position positions[i].

        logits fp32 [M,N], raw; may be overwritten. A row whose logits are not finite is reported in `failures`.
        """
        if all(self._plain[slot] for slot in slots):  # at one sequence, every array operation counts
            values, token_ids = ops.peaks(logits)
            failed = {row: NOT_FINITE for row, value in enumerate(values.tolist()) if not math.isfinite(value)}
            return Sampled(token_ids.tolist(), None, failed)
        return self.launch(logits, slots, positions)()

    def launch(
        self,
        logits: Tensor,
        slots: list[int],
        positions: list[int],
        pending: Collection[int] = (),
        *,
        rows: list[int] | None = None,
        later: bool = False,
    ) -> Callable[[], Sampled]:
        """Sample without waiting for the device: `chosen` has the tokens, the function waits and gives them all.

        A launch may come before the function of the one before is called: `pending` are the rows whose sequence has
        its last token from that one. rows: of the logits, those that are meant, where not all are. later: others of
        their step were chosen for before. Sequences with a grammar have its mask by now.
        """
        staging = self._later if later else self._staging
        at = np.array(slots, np.int64)
        edits = [(row, edit) for row, slot in enumerate(slots) if (edit := self._edits[slot]) is not None]
        host: Arrays = {} if rows is None else {"rows": np.array(rows, np.int64)}
        usable = np.ones(len(at), np.bool_)  # that may be drawn from: a device of its own takes what comes
        if staging is None:
            logits = logits if rows is None else logits[torch.from_numpy(host["rows"])]
            peaks, token_ids = ops.peaks(logits)
            usable = np.isfinite(peaks.numpy())
        reports = np.flatnonzero((self._num_logprobs[at] >= 0) & usable)
        random = np.flatnonzero((self._temperature[at] > 0) & usable)
        host |= {"slots": at, "reports": reports, **self._keys(random, at, positions)}
        if edits:
            host |= arrays_of(edits, slots, positions, pending)
        arrays = _on_device(host, staging)
        if staging is not None:
            logits = logits if rows is None else logits[arrays["rows"]]
            peaks, token_ids = ops.peaks(logits)
        results = {"token_ids": token_ids, "peaks": peaks}
        scores = ops.log_probabilities(logits[arrays["reports"]]) if reports.size else None
        if edits:
            apply(logits, arrays, self.chosen)
            edited_logits = logits if len(edits) == len(at) else logits[arrays["edited"]]
            results["edited_peaks"], ids = ops.peaks(edited_logits)
            token_ids.index_copy_(0, arrays["edited"], ids)
            if staging is None:  # once more, where it costs nothing to know
                usable[host["edited"]] &= np.isfinite(results["edited_peaks"].numpy())
                random = random[usable[random]]
                arrays |= _on_device(self._keys(random, at, positions), None)
        if random.size:
            candidates = logits if len(random) == len(at) else logits[arrays["random"]]
            token_ids.index_copy_(0, arrays["random"], ops.draw(candidates, *(arrays[key] for key in _KEYS)))
        self.chosen.index_copy_(0, arrays["slots"], token_ids)
        counts: list[int] = self._num_logprobs[at[reports]].tolist()
        if scores is not None:
            results["own"] = scores.gather(1, token_ids[arrays["reports"]][:, None])[:, 0]
            results["top"], results["top_ids"] = ops.top_tokens(scores, max(counts))
        followers = [(row, follower) for row, edit in edits for follower in edit.followers]
        bound = [(row, edit.constraint) for row, edit in edits if edit.constraint is not None]
        constraints = {row: (constraint, constraint.num_admissions) for row, constraint in bound}
        edited = [row for row, _ in edits]
        host_results = _on_host(results, staging)
        return _Launched(host_results, edited, reports.tolist(), counts, followers, constraints).sampled

    def _keys(self, random: NDArray[np.int64], at: NDArray[np.int64], positions: list[int]) -> Arrays:
        """The rows `random`, and the parameters that each is drawn with."""
        if not random.size:
            return {}
        slots = at[random]
        state = (self._temperature, self._top_k, self._top_p, self._min_p, self._seed, self._sample)
        values = (*(array[slots] for array in state), np.array(positions, np.int64)[random])
        return {"random": random, **dict(zip(_KEYS, values, strict=True))}


def _on_device(host: Arrays, staging: Staging | None) -> dict[str, Tensor]:
    if staging is None:
        return {name: torch.from_numpy(array) for name, array in host.items()}
    return dict(zip(host, staging.to_device([*host.values()]), strict=True))


def _on_host(results: dict[str, Tensor], staging: Staging | None) -> Callable[[], dict[str, NDArray[Any]]]:
    if staging is None:
        return lambda: {name: tensor.numpy() for name, tensor in results.items()}
    arrive = staging.to_host([*results.values()])
    return lambda: dict(zip(results, arrive(), strict=True))

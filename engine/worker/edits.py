"""Changes that a sequence makes to its logits before a token is chosen: bias, penalties, masks.

Everything that the host knows of a step's edits is laid out as arrays, which go to the device in one copy; there
they are applied. What the host may not know yet is the last token, if the step before is still choosing it: its
place in the penalties, and what it means for the masks, is found on the device.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cierzo.engine.worker.grammars import Constraint
from cierzo.engine.worker.masks import Masks
from cierzo.kernels.ops import sampling as ops
from cierzo.scheduler.params import SamplingParams
from cierzo.scheduler.plan import Admission

Arrays = dict[str, NDArray[Any]]


class TokenHistory:
    """The distinct tokens that a sequence has seen, and how often each stands in its output."""

    def __init__(self, prompt: Sequence[int], output: Sequence[int]) -> None:
        seen = np.unique(np.array([*prompt, *output], np.int64))
        self._size = len(seen)
        self._token_ids = seen
        self._counts = np.zeros(len(seen), np.int64)
        self._index = {token_id: index for index, token_id in enumerate(seen.tolist())}
        for token_id in output:
            self._counts[self._index[token_id]] += 1

    def append(self, token_id: int) -> None:
        """Count a new output token."""
        index = self._index.setdefault(token_id, self._size)
        if index == self._size:
            if index == len(self._token_ids):
                self._token_ids, self._counts = (
                    np.concatenate([array, np.zeros(max(64, index), np.int64)])
                    for array in (self._token_ids, self._counts)
                )
            self._token_ids[index] = token_id
            self._size += 1
        self._counts[index] += 1

    @property
    def token_ids(self) -> NDArray[np.int64]:
        """int64 [J], distinct."""
        return self._token_ids[: self._size]

    @property
    def output_counts(self) -> NDArray[np.int64]:
        """int64 [J], 0 for tokens of the prompt alone."""
        return self._counts[: self._size]


@dataclass(slots=True)
class Edits:
    """Changes of one sequence to its logits before a token is chosen. Empty arrays: none."""

    bias_ids: NDArray[np.int64]
    bias: NDArray[np.float32]
    penalties: tuple[float, float, float]  # repetition, presence, frequency
    history: TokenHistory | None
    stop_ids: NDArray[np.int64]
    first_stop_tokens: int  # known tokens from which on a stop token may end the sequence, itself counted
    masks: Masks | None
    followers: list[TokenHistory | Masks]  # history and masks: all that each chosen token is told to
    constraint: Constraint | None


def edits_of(admission: Admission) -> Edits | None:
    """Return what the parameters change in the logits; None for nothing."""
    params = admission.sampling
    penalties = (params.repetition_penalty, params.presence_penalty, params.frequency_penalty)
    penalised, masks = penalties != (1.0, 0.0, 0.0), Masks.of(admission)
    constraint: Constraint | None = admission.constraint
    if constraint is not None:
        constraint.admit(admission.output_token_ids)
    if not (params.logit_bias or penalised or params.min_tokens or masks or constraint):
        return None
    history = TokenHistory(admission.prompt_token_ids, admission.output_token_ids) if penalised else None
    return Edits(
        bias_ids=np.array(list(params.logit_bias), np.int64),
        bias=np.array(list(params.logit_bias.values()), np.float32),
        penalties=penalties,
        history=history,
        stop_ids=_stop_ids(params, admission.eos_token_ids),
        first_stop_tokens=len(admission.prompt_token_ids) + params.min_tokens,
        masks=masks,
        followers=[one for one in (history, masks) if one is not None],
        constraint=constraint,
    )


def _stop_ids(params: SamplingParams, eos_token_ids: tuple[int, ...]) -> NDArray[np.int64]:
    """The tokens that `scheduler.stop` ends on."""
    eos = () if params.ignore_eos else eos_token_ids
    return np.array(sorted({*eos, *params.stop_token_ids}), np.int64)


def arrays_of(
    edited: list[tuple[int, Edits]], slots: list[int], positions: list[int], pending: Collection[int]
) -> Arrays:
    """The edits of a step's M rows, for `apply`. `edited`: rows, ascending, and their edits.

    positions: of the token that a row is about to choose. pending: rows whose last token no history has yet.
    """
    seen = [(row, edit, edit.history) for row, edit in edited if edit.history is not None]
    early = [(row, edit.stop_ids) for row, edit in edited if positions[row] + 1 < edit.first_stop_tokens]
    arrays: Arrays = {"edited": np.array([row for row, _ in edited], np.int64)}
    arrays |= _sparse("bias", [(row, edit.bias_ids, edit.bias) for row, edit in edited])
    arrays |= _sparse("seen", [(row, history.token_ids, history.output_counts) for row, _, history in seen])
    masked = [(row, edit.masks) for row, edit in edited if edit.masks is not None]
    bound = [(row, edit.constraint.mask) for row, edit in edited if edit.constraint is not None]
    if bound:
        arrays["bound"] = np.array([row for row, _ in bound], np.int64)
        arrays["bits"] = np.concatenate([mask for _, mask in bound])
    if masked or early:
        arrays |= _masks(masked, early, slots, pending)
    if seen:
        penalties = np.zeros((3, len(slots)), np.float32)
        for row, edit, _ in seen:
            penalties[:, row] = edit.penalties
        arrays |= dict(zip(("repetition", "presence", "frequency"), penalties, strict=True))
    late = [row for row, _, _ in seen if row in pending]
    if late:
        arrays["late"] = np.array(late, np.int64)
        arrays["late_slots"] = np.array([slots[row] for row in late], np.int64)
    return arrays


def _masks(
    masked: list[tuple[int, Masks]],
    early: list[tuple[int, NDArray[np.int64]]],
    slots: list[int],
    pending: Collection[int],
) -> Arrays:
    """Arrays of what may not be chosen, and of what must be. early: rows, and what may not end them yet."""
    found = [(row, *masks.banned(row in pending)) for row, masks in masked]
    arrays = _sparse("banned", [*early, *((row, token_ids) for row, token_ids, _ in found)])
    after = [(row, pairs[:, 1], pairs[:, 0]) for row, _, pairs in found if len(pairs)]
    arrays |= _sparse("after", after)
    if after:
        arrays["after_slots"] = np.array(slots, np.int64)[arrays["after_rows"]]
    kept = [(row, masks.allowed) for row, masks in masked if len(masks.allowed)]
    arrays |= _sparse("kept", kept)
    if kept:
        arrays["restricted"] = np.array([row for row, _ in kept], np.int64)
    forced = [(row, one) for row, masks in masked if (one := masks.forced(row in pending)) is not None]
    if forced:
        columns = [(row, one.token_id, slots[row], one.last, one.is_last) for row, one in forced]
        names = [f"forced_{name}" for name in ("rows", "ids", "slots", "last", "is_last")]
        arrays |= dict(zip(names, np.array(columns, np.int64).T, strict=True))
    return arrays


def _sparse(name: str, entries: Sequence[tuple[int, NDArray[Any], *tuple[NDArray[Any], ...]]]) -> Arrays:
    """The rows' token ids, and their values if they have any, laid end to end; nothing where there are none."""
    counts = [len(entry[1]) for entry in entries]
    if not any(counts):
        return {}
    rows, *columns = zip(*entries, strict=True)
    arrays = {f"{name}_rows": np.repeat(np.array(rows, np.int64), counts)}
    for kind, column in zip(("ids", "values"), columns, strict=False):
        arrays[f"{name}_{kind}"] = np.concatenate(column)
    return arrays


def apply(logits: Tensor, arrays: Mapping[str, Tensor], chosen: Tensor) -> None:
    """Bias, penalties and masks, in this order, in place. logits fp32 [M,N].

    chosen int64 [max_running]: the token that each slot's sequence was given last.
    """
    if "bias_rows" in arrays:
        ops.add_bias(logits, arrays["bias_rows"], arrays["bias_ids"], arrays["bias_values"])
    if "seen_rows" in arrays:
        _penalise(logits, arrays, chosen)
    if "bound" in arrays:
        rows = arrays["bound"]
        ops.mask_bits(logits, rows, arrays["bits"].view(len(rows), -1))
    if "restricted" in arrays:
        rows, token_ids = arrays["kept_rows"], arrays["kept_ids"]
        kept = logits[rows, token_ids]
        logits.index_fill_(0, arrays["restricted"], -math.inf)
        logits[rows, token_ids] = kept
    if "banned_rows" in arrays:
        ops.mask_tokens(logits, arrays["banned_rows"], arrays["banned_ids"])
    if "after_rows" in arrays:
        _ban_after(logits, arrays, chosen)
    if "forced_rows" in arrays:
        _force(logits, arrays, chosen)


def _penalise(logits: Tensor, arrays: Mapping[str, Tensor], chosen: Tensor) -> None:
    """Penalties by the histories. A token that they lack is penalised apart, as often as it stands in the output:
    its logit is put back to what it was, lest it be penalised twice."""
    rows, token_ids, counts = arrays["seen_rows"], arrays["seen_ids"], arrays["seen_values"]
    penalties = [arrays[name] for name in ("repetition", "presence", "frequency")]
    late = arrays.get("late")
    if late is None:
        ops.apply_penalties(logits, rows, token_ids, counts, *penalties)
        return
    last = chosen[arrays["late_slots"]]
    before = logits[late, last]
    ops.apply_penalties(logits, rows, token_ids, counts, *penalties)
    logits[late, last] = before
    by_row = torch.full((logits.shape[0],), -1, dtype=torch.int64, device=logits.device)
    by_row[late] = last
    again = torch.where(by_row[rows] == token_ids, counts, 0)
    times = torch.zeros_like(by_row).index_add_(0, rows, again)[late] + 1  # whole numbers: in any order
    ops.apply_penalties(logits, late, last, times, *penalties)


def _ban_after(logits: Tensor, arrays: Mapping[str, Tensor], chosen: Tensor) -> None:
    """Ban tokens that may not follow the one chosen last, where it is that one. A token that several may not be
    followed by has several entries, of which one that holds is enough: hence a sum, in which the others are 0."""
    rows, token_ids = arrays["after_rows"], arrays["after_ids"]
    holds = chosen[arrays["after_slots"]] == arrays["after_values"]
    bans = torch.zeros_like(rows, dtype=logits.dtype).masked_fill_(holds, -math.inf)
    logits.index_put_((rows, token_ids), bans, accumulate=True)


def _force(logits: Tensor, arrays: Mapping[str, Tensor], chosen: Tensor) -> None:
    """Leave one token to choose, where the condition on the last one holds; it may have been masked before."""
    rows = arrays["forced_rows"]
    holds = (chosen[arrays["forced_slots"]] == arrays["forced_last"]) == arrays["forced_is_last"].bool()
    before = logits[rows]
    alone = torch.full_like(before, -math.inf).scatter_(1, arrays["forced_ids"][:, None], 0.0)
    logits[rows] = torch.where(holds[:, None], alone, before)

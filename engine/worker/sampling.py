"""The sampler: what each running sequence asked for, by slot, and how a step's logits become tokens.

State is numpy, a few values per slot; token histories exist only for sequences with penalties. The arithmetic
and its order are those of `kernels/ops/sampling.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cierzo.kernels.ops import sampling as ops
from cierzo.scheduler.params import SamplingParams
from cierzo.scheduler.plan import Admission, TokenLogprobs

NOT_FINITE = "the model's logits are not finite (NaN or infinity), or min_tokens leaves no token to choose"


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
    """What one sequence changes in its logits before a token is chosen. Empty arrays: nothing."""

    bias_ids: NDArray[np.int64]
    bias: NDArray[np.float32]
    penalties: tuple[float, float, float]  # repetition, presence, frequency
    history: TokenHistory | None
    stop_ids: NDArray[np.int64]
    first_stop_tokens: int  # known tokens from which on a stop token may end the sequence, itself counted


@dataclass(slots=True)
class Sampled:
    """One entry per row of logits; `failures` maps rows to the reason why their token means nothing."""

    token_ids: list[int]
    logprobs: list[list[TokenLogprobs] | None] | None = None
    failures: dict[int, str] = field(default_factory=dict)

    def itself(self) -> Sampled:
        """For those who wait for nothing."""
        return self


class Sampler:
    """Sampling state of all slots, and the one call per step that uses it."""

    def __init__(self, max_running: int, device: torch.device | str = "cpu") -> None:
        self._device = torch.device(device)
        self._temperature = np.zeros(max_running, np.float64)
        self._top_k = np.zeros(max_running, np.int64)
        self._top_p = np.ones(max_running, np.float64)
        self._min_p = np.zeros(max_running, np.float64)
        self._seed = np.zeros(max_running, np.int64)
        self._sample = np.zeros(max_running, np.int64)
        self._num_logprobs = np.full(max_running, -1, np.int64)
        self._edits: list[Edits | None] = [None] * max_running
        self._plain = [True] * max_running  # the largest logit it is, and nothing else is asked for

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
        self._edits[slot] = edits = _edits(admission)
        self._plain[slot] = params.temperature == 0 and params.logprobs is None and edits is None

    def launch(
        self, logits: Tensor, slots: list[int], positions: list[int]
    ) -> tuple[Tensor, Callable[[], Sampled]]:
        """The same as `sample`, without waiting for the device: tokens, int64 [M], there, and what gives the rest.

        Rows that need the host in between (edits that count earlier tokens, log-probabilities) make it wait.
        """
        if any(self._edits[slot] is not None or self._num_logprobs[slot] >= 0 for slot in slots):
            sampled = self.sample(logits, slots, positions)
            return self._on_device(np.array(sampled.token_ids, np.int64)), sampled.itself
        values, token_ids = ops.peaks(logits)
        at = np.array(slots, np.int64)
        random = np.flatnonzero(self._temperature[at] > 0)
        if random.size:
            self._draw(logits, token_ids, random, at, np.array(positions, np.int64))
        arrived = to_host(values, token_ids)

        def sampled_later() -> Sampled:
            peaks, tokens = arrived()
            failed = {row: NOT_FINITE for row, value in enumerate(peaks.tolist()) if not math.isfinite(value)}
            return Sampled(tokens.tolist(), None, failed)

        return token_ids, sampled_later

    def sample(self, logits: Tensor, slots: list[int], positions: list[int]) -> Sampled:
        """Choose a token for each of M rows; row i is for the sequence in slots[i], at position positions[i].

        logits fp32 [M,N], raw; may be overwritten. A row whose logits are not finite is reported in `failures`.
        """
        values, token_ids = ops.peaks(logits)
        if all(self._plain[slot] for slot in slots):  # at one sequence, every array operation counts
            failed = {row: NOT_FINITE for row, value in enumerate(values.tolist()) if not math.isfinite(value)}
            return Sampled(token_ids.tolist(), None, failed)
        at = np.array(slots, np.int64)
        finite = np.isfinite(values.cpu().numpy())
        reports = np.flatnonzero((self._num_logprobs[at] >= 0) & finite)
        scores = ops.log_probabilities(logits[self._on_device(reports)]) if reports.size else None
        edited = self._edit(logits, slots, positions)
        if edited:
            rows = self._on_device(np.array(edited))
            values[rows], token_ids[rows] = ops.peaks(logits[rows])
            finite &= np.isfinite(values.cpu().numpy())
        random = np.flatnonzero((self._temperature[at] > 0) & finite)
        if random.size:
            self._draw(logits, token_ids, random, at, np.array(positions, np.int64))
        chosen: list[int] = token_ids.tolist()
        self._remember(slots, chosen)
        logprobs = None if scores is None else self._report(scores, reports, at, chosen)
        return Sampled(chosen, logprobs, dict.fromkeys(np.flatnonzero(~finite).tolist(), NOT_FINITE))

    def _on_device(self, array: NDArray[Any]) -> Tensor:
        return torch.from_numpy(array).to(self._device)

    def _draw(
        self, logits: Tensor, token_ids: Tensor, random: NDArray[np.int64], at: NDArray[np.int64], positions: Any
    ) -> None:
        """Overwrite the tokens of the rows `random` with drawn ones."""
        rows, slots = self._on_device(random), at[random]
        state: tuple[NDArray[Any], ...] = (
            self._temperature,
            self._top_k,
            self._top_p,
            self._min_p,
            self._seed,
            self._sample,
        )
        parameters = [self._on_device(values) for values in (*(array[slots] for array in state), positions[random])]
        candidates = logits if len(random) == len(at) else logits[rows]
        token_ids[rows] = ops.draw(candidates, *parameters)

    def _edit(self, logits: Tensor, slots: list[int], positions: list[int]) -> list[int]:
        """Apply bias, penalties and masks, in this order; the rows that were changed."""
        rows = [row for row, slot in enumerate(slots) if self._edits[slot] is not None]
        if not rows:
            return rows
        edits = [edits for row in rows if (edits := self._edits[slots[row]]) is not None]
        self._sparse(ops.add_bias, logits, rows, [edit.bias_ids for edit in edits], [edit.bias for edit in edits])
        self._penalise(logits, rows, edits)
        early = [positions[row] + 1 < edit.first_stop_tokens for row, edit in zip(rows, edits, strict=True)]
        stops = [
            edit.stop_ids[: edit.stop_ids.size * is_early] for edit, is_early in zip(edits, early, strict=True)
        ]
        self._sparse(ops.mask_tokens, logits, rows, stops)
        return rows

    def _sparse(self, operation: Any, logits: Tensor, rows: list[int], ids: list[Any], *values: list[Any]) -> None:
        """Call `operation(logits, rows, token_ids, *values)` on the rows' entries laid end to end."""
        counts = [len(row_ids) for row_ids in ids]
        if any(counts):
            flat = [np.repeat(np.array(rows, np.int64), counts), *(np.concatenate(part) for part in (ids, *values))]
            operation(logits, *(self._on_device(array) for array in flat))

    def _penalise(self, logits: Tensor, rows: list[int], edits: list[Edits]) -> None:
        seen = [
            (row, edit, edit.history) for row, edit in zip(rows, edits, strict=True) if edit.history is not None
        ]
        if not seen:
            return
        penalties = np.zeros((3, logits.shape[0]), np.float32)
        for row, edit, _ in seen:
            penalties[:, row] = edit.penalties
        by_row = [self._on_device(values) for values in penalties]

        def apply(logits: Tensor, at: Tensor, token_ids: Tensor, counts: Tensor) -> None:
            ops.apply_penalties(logits, at, token_ids, counts, *by_row)

        histories = [history for _, _, history in seen]
        ids = [history.token_ids for history in histories]
        self._sparse(apply, logits, [row for row, _, _ in seen], ids, [h.output_counts for h in histories])

    def _remember(self, slots: list[int], chosen: list[int]) -> None:
        for slot, token_id in zip(slots, chosen, strict=True):
            edits = self._edits[slot]
            if edits is not None and edits.history is not None:
                edits.history.append(token_id)

    def _report(
        self, scores: Tensor, reports: NDArray[np.int64], at: NDArray[np.int64], chosen: list[int]
    ) -> list[list[TokenLogprobs] | None]:
        """Log-probabilities of the rows `reports`, to which the rows of `scores` belong."""
        counts = self._num_logprobs[at[reports]].tolist()
        values, token_ids = (part.tolist() for part in ops.top_tokens(scores, max(counts)))
        tokens = [chosen[row] for row in reports.tolist()]
        own = scores[torch.arange(len(tokens)), torch.tensor(tokens)].tolist()
        found: list[list[TokenLogprobs] | None] = [None] * len(chosen)
        for index, row in enumerate(reports.tolist()):
            count = counts[index]
            top = token_ids[index][:count], values[index][:count]
            found[row] = [TokenLogprobs(tokens[index], own[index], *top)]
        return found


def to_host(*tensors: Tensor) -> Callable[[], tuple[Tensor, ...]]:
    """Begin to copy; the function waits for the copies' end."""
    if tensors[0].device.type != "cuda":
        return lambda: tensors
    copies = tuple(torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True) for tensor in tensors)
    for copy, tensor in zip(copies, tensors, strict=True):
        copy.copy_(tensor, non_blocking=True)
    done = torch.cuda.Event()
    done.record()

    def wait() -> tuple[Tensor, ...]:
        done.synchronize()
        return copies

    return wait


def _edits(admission: Admission) -> Edits | None:
    """What the parameters change in the logits; None for nothing."""
    params = admission.sampling
    penalties = (params.repetition_penalty, params.presence_penalty, params.frequency_penalty)
    penalised = penalties != (1.0, 0.0, 0.0)
    if not (params.logit_bias or penalised or params.min_tokens):
        return None
    return Edits(
        bias_ids=np.array(list(params.logit_bias), np.int64),
        bias=np.array(list(params.logit_bias.values()), np.float32),
        penalties=penalties,
        history=TokenHistory(admission.prompt_token_ids, admission.output_token_ids) if penalised else None,
        stop_ids=_stop_ids(params, admission.eos_token_ids),
        first_stop_tokens=len(admission.prompt_token_ids) + params.min_tokens,
    )


def _stop_ids(params: SamplingParams, eos_token_ids: tuple[int, ...]) -> NDArray[np.int64]:
    """The tokens that `scheduler.stop` ends on."""
    eos = () if params.ignore_eos else eos_token_ids
    return np.array(sorted({*eos, *params.stop_token_ids}), np.int64)

"""Launchers of sampling (sampling.cu, draw.cu, masks.cu), with the arguments of ops/sampling.py.

Nothing here waits for the device, so entries of an edit that lie outside the logits are left out without an error.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cierzo.kernels.check import require
from cierzo.kernels.cuda.launch.kernel import Kernel, divide_up
from cierzo.kernels.cuda.launch.launcher import MOST_THREADS, launch

MOST_VOCAB = 1 << 18  # probabilities as integers up to 2^44 then add up to less than 2^63
MOST_TOP = 1024  # tokens that top_tokens sorts in shared memory
_ROW = {"logits": "*f32", "stride": "i64", "vocab": "i32"}
_EDIT = {
    "logits": "*f32",
    **dict.fromkeys(("stride", "width", "rows", "vocab"), "i64"),
    "at_rows": "*i64",
    "token_ids": "*i64",
    "entries": "i64",
}
_EDIT_THREADS = 256
_TOKENS_MASKED = 16  # of a row by each thread
_DRAW_THREADS = 512  # at most: a block's 8 values a thread are then a piece of 4096, whose sums fit in 32 bits
_DRAW_VALUES = 8  # of a row by each thread
_CUT_THREADS = 128  # for what a list has, a few hundred as a rule
# Of all rows: up to so many, smaller pieces occupy a card better. device_memory.py counts them.
_FEW_VALUES = 1 << 20
_ROW_WORDS, _PIECE_WORDS = 5218, 3  # of 8 bytes: draw.cu's memory between launches, of a row and of a piece


def _kernel(name: str, types: dict[str, str]) -> Kernel:
    return Kernel("sampling.cu", name, types)


_ADD_BIAS = _kernel("sample_add_bias", {**_EDIT, "bias": "*f32"})
_MASK_TOKENS = _kernel("sample_mask_tokens", _EDIT)
_APPLY_PENALTIES = _kernel(
    "sample_apply_penalties",
    {**_EDIT, "output_counts": "*i64", **dict.fromkeys(("repetition", "presence", "frequency"), "*f32")},
)
_PEAKS = _kernel("sample_peaks", {**_ROW, "values": "*f32", "ids": "*i64"})
_SCRATCH = {"scratch": "*i64", "words": "i64"}
_FILTERS = {"temperatures": "*f64", "top_ks": "*i64", "top_ps": "*f64"}
_KEYS = dict.fromkeys(("seeds", "samples", "positions"), "*i64")
_HIGHEST, _BINS, _COLLECT, _CUT, _PIECES, _CHOOSE = _DRAW = tuple(
    Kernel("draw.cu", f"sample_draw_{name}", types)
    for name, types in {
        "highest": {**_ROW, **_SCRATCH},
        "bins": {**_ROW, **_FILTERS, **_SCRATCH},
        "collect": {**_ROW, **_FILTERS, **_SCRATCH},
        "cut": {**_ROW, **_FILTERS, "min_ps": "*f64", **_SCRATCH, "pieces": "i32"},
        "pieces": {**_ROW, "temperatures": "*f64", **_KEYS, **_SCRATCH},
        "choose": {"vocab": "i32", **_SCRATCH, "pieces": "i32", "token_ids": "*i64"},
    }.items()
)
_LOG_PROBABILITIES = _kernel("sample_log_probabilities", {**_ROW, "out": "*f32"})
_TOP_TOKENS = _kernel("sample_top_tokens", {**_ROW, "count": "i32", "values": "*f32", "ids": "*i64"})
_MASK_BITS = Kernel(  # in a source of its own
    "masks.cu",
    "sample_mask_bits",
    {
        "logits": "*f32",
        **dict.fromkeys(("stride", "rows", "vocab"), "i64"),
        "at_rows": "*i64",
        "bits": "*i32",
        "words": "i64",
    },
)
KERNELS = (_ADD_BIAS, _MASK_TOKENS, _APPLY_PENALTIES, _PEAKS, *_DRAW, _LOG_PROBABILITIES, _TOP_TOKENS, _MASK_BITS)


# --- edits -------------------------------------------------------------------------------------------------


def add_bias(logits: Tensor, rows: Tensor, token_ids: Tensor, bias: Tensor) -> None:
    """See ops/sampling.py."""
    _edit(_ADD_BIAS, logits, rows, token_ids, bias=bias)


def apply_penalties(
    logits: Tensor,
    rows: Tensor,
    token_ids: Tensor,
    output_counts: Tensor,
    repetition: Tensor,
    presence: Tensor,
    frequency: Tensor,
) -> None:
    """See ops/sampling.py."""
    by_row = {"repetition": repetition, "presence": presence, "frequency": frequency}
    _edit(_APPLY_PENALTIES, logits, rows, token_ids, output_counts=output_counts, **by_row)


def mask_tokens(logits: Tensor, rows: Tensor, token_ids: Tensor) -> None:
    """See ops/sampling.py."""
    _edit(_MASK_TOKENS, logits, rows, token_ids)


def mask_bits(logits: Tensor, rows: Tensor, bits: Tensor) -> None:
    """See ops/sampling.py."""
    require("mask_bits", logits.stride(1) == 1, f"logits are edited in place, but have strides {logits.stride()}")
    launch(
        _MASK_BITS,
        grid=(divide_up(logits.shape[1], _EDIT_THREADS * _TOKENS_MASKED), rows.numel()),
        threads=_EDIT_THREADS,
        logits=logits,
        stride=logits.stride(0),
        rows=logits.shape[0],
        vocab=logits.shape[1],
        at_rows=rows.contiguous(),
        bits=bits.contiguous(),
        words=bits.shape[1],
    )


def _edit(kernel: Kernel, logits: Tensor, rows: Tensor, token_ids: Tensor, **more: Tensor) -> None:
    values: dict[str, Any] = {name: value.contiguous() for name, value in more.items()}
    launch(
        kernel,
        grid=(divide_up(rows.numel(), _EDIT_THREADS),),
        threads=_EDIT_THREADS,
        logits=logits,
        stride=logits.stride(0),
        width=logits.stride(1),
        rows=logits.shape[0],
        vocab=logits.shape[1],
        at_rows=rows.contiguous(),
        token_ids=token_ids.contiguous(),
        entries=rows.numel(),
        **values,
    )


# --- a block a row -----------------------------------------------------------------------------------------


def peaks(logits: Tensor) -> tuple[Tensor, Tensor]:
    """See ops/sampling.py."""
    logits = _rows("peaks", logits)
    values = torch.empty(logits.shape[0], dtype=torch.float32, device=logits.device)
    ids = torch.empty(logits.shape[0], dtype=torch.int64, device=logits.device)
    _launch_rows(_PEAKS, logits, values=values, ids=ids)
    return values, ids


def draw(
    logits: Tensor,
    temperatures: Tensor,
    top_ks: Tensor,
    top_ps: Tensor,
    min_ps: Tensor,
    seeds: Tensor,
    samples: Tensor,
    positions: Tensor,
) -> Tensor:
    """See ops/sampling.py. Draws the reference's tokens; rows of meaningless logits get some token too."""
    logits = _rows("draw", logits)
    rows, vocab = logits.shape
    token_ids = torch.empty(rows, dtype=torch.int64, device=logits.device)
    most = _DRAW_THREADS if rows * vocab > _FEW_VALUES else _DRAW_THREADS // 4
    threads = min(most, 32 * divide_up(vocab, 32 * _DRAW_VALUES))
    pieces = divide_up(vocab, threads * _DRAW_VALUES)
    words = draw_words(pieces)
    scratch = torch.empty((rows, words), dtype=torch.int64, device=logits.device)
    there: dict[str, Any] = {"scratch": scratch, "words": words}
    row: dict[str, Any] = {"logits": logits, "stride": logits.stride(0), "vocab": vocab}
    temperatures = temperatures.contiguous()
    filters: dict[str, Any] = {
        "temperatures": temperatures,
        "top_ks": top_ks.contiguous(),
        "top_ps": top_ps.contiguous(),
    }
    keys: dict[str, Any] = {
        "seeds": seeds.contiguous(),
        "samples": samples.contiguous(),
        "positions": positions.contiguous(),
    }
    grid = (pieces, rows)
    launch(_HIGHEST, grid=grid, threads=threads, **row, **there)
    launch(_BINS, grid=grid, threads=threads, **row, **filters, **there)
    launch(_COLLECT, grid=grid, threads=threads, **row, **filters, **there)
    min_ps = min_ps.contiguous()
    launch(_CUT, grid=(rows,), threads=_CUT_THREADS, **row, **filters, min_ps=min_ps, **there, pieces=pieces)
    launch(_PIECES, grid=grid, threads=threads, **row, temperatures=temperatures, **keys, **there)
    launch(_CHOOSE, grid=(rows,), threads=32, vocab=vocab, **there, pieces=pieces, token_ids=token_ids)
    return token_ids


def draw_words(pieces: int) -> int:
    """Words of 8 bytes that a draw from a row of so many pieces leaves from one launch to the next."""
    return _ROW_WORDS + pieces * _PIECE_WORDS


def log_probabilities(logits: Tensor) -> Tensor:
    """See ops/sampling.py. Rounded once, from a sum with an error of at most 2^-45 a token."""
    logits = _rows("log_probabilities", logits)
    out = torch.empty(tuple(logits.shape), dtype=torch.float32, device=logits.device)
    _launch_rows(_LOG_PROBABILITIES, logits, out=out)
    return out


def top_tokens(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """See ops/sampling.py. For more than 1024 tokens of a row torch sorts the whole row."""
    if count > MOST_TOP:
        values, ids = scores.sort(dim=1, descending=True, stable=True)
        return values[:, :count].contiguous(), ids[:, :count].contiguous()
    scores = _rows("top_tokens", scores)
    values = torch.empty((scores.shape[0], count), dtype=torch.float32, device=scores.device)
    ids = torch.empty((scores.shape[0], count), dtype=torch.int64, device=scores.device)
    if count:
        _launch_rows(_TOP_TOKENS, scores, count=count, values=values, ids=ids)
    return values, ids


def _rows(operation: str, logits: Tensor) -> Tensor:
    """Logits with contiguous rows."""
    vocab = logits.shape[1]
    require(operation, 0 < vocab <= MOST_VOCAB, f"logits have N = {vocab}, must be 1 .. {MOST_VOCAB}")
    return logits if logits.stride(1) == 1 else logits.contiguous()


def _launch_rows(kernel: Kernel, logits: Tensor, **arguments: Any) -> None:
    """Launch a block for each row, with at least four values for each thread; results do not depend on their
    number."""
    rows, vocab = logits.shape
    threads = min(MOST_THREADS, 32 * divide_up(vocab, 128))
    launch(kernel, grid=(rows,), threads=threads, logits=logits, stride=logits.stride(0), vocab=vocab, **arguments)

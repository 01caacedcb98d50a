"""Launchers of the router and of the grouping by expert (route.cu), with the arguments of ops/moe.py."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from cierzo.kernels.check import require
from cierzo.kernels.cuda.launch.kernel import Kernel, divide_up, is_aligned
from cierzo.kernels.cuda.launch.launcher import MOST_SHARED_BYTES, launch
from cierzo.kernels.formats.packed import Matrix

MOST_EXPERTS = 256  # experts of the router: eight for each lane
MOST_TOP_K = 32  # one for each lane
MOST_GROUPED = MOST_SHARED_BYTES // 8  # experts: shared memory holds one warp's counters and each expert's start
WIDE_ROWS = 256  # from so many rows of a step on, wide tiles of logits give every multiprocessor a block
MOST_ALONE = 8192  # pairs that one block groups: 2048 tokens of 4 experts each
_MOST_BLOCKS = 128
_TILES = 32  # tiles of 32 pairs for a block at least, if there are several blocks
_ROWS = 8  # rows of a tile of logits
_WARPS = 4
_WARP = 32
_KINDS = {torch.float32: "f32", torch.bfloat16: "bf16"}

_LOGITS = {
    (x, weight): Kernel(
        "route.cu",
        f"route_logits_{x}_{weight}",
        {
            "x": f"*{x}",
            "x_stride": "i64",
            "x_aligned": "i32",
            "weight": f"*{weight}",
            "weight_stride": "i64",
            "weight_aligned": "i32",
            "logits": "*f32",
            "rows": "i32",
            "experts": "i32",
            "width": "i32",
            "wide": "i32",
        },
    )
    for x in _KINDS.values()
    for weight in _KINDS.values()
}
_CHOOSE = Kernel(
    "route.cu",
    "route_choose",
    {
        "logits": "*f32",
        "ids": "*i64",
        "weights": "*f32",
        **dict.fromkeys(("rows", "experts", "top_k", "groups", "top_groups", "renormalise"), "i32"),
        "scale": "f32",
    },
)
_GROUPS = {
    (x, weight): Kernel(
        "route.cu",
        f"route_groups_{x}_{weight}",
        {
            "x": f"*{x}",
            "x_stride": "i64",
            "x_aligned": "i32",
            "weight": f"*{weight}",
            "weight_stride": "i64",
            "weight_aligned": "i32",
            "logits": "*f32",
            "ids": "*i64",
            "weights": "*f32",
            "order": "*i64",
            "starts": "*i64",
            "tickets": "*i32",
            **dict.fromkeys(("rows", "width", "experts", "top_k", "groups", "top_groups", "renormalise"), "i32"),
            "scale": "f32",
        },
    )
    for x in _KINDS.values()
    for weight in _KINDS.values()
}
_SIZES = {"pairs": "i32", "each": "i32", "experts": "i32"}
_COUNT = Kernel("route.cu", "count_by_expert", {"ids": "*i64", "counts": "*i32", **_SIZES})
_GROUP = Kernel(
    "route.cu", "group_by_expert", {"ids": "*i64", "counts": "*i32", "order": "*i64", "starts": "*i64", **_SIZES}
)
KERNELS = (*_LOGITS.values(), *_GROUPS.values(), _CHOOSE, _COUNT, _GROUP)


def route(
    x: Tensor,
    weight: Matrix,
    top_k: int,
    groups: int,
    top_groups: int,
    renormalise: bool,
    scale: float,
    ids: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """See ops/moe.py. At most 256 experts; x and weight fp32 or bf16. Two launches: logits, choice."""
    weight = _checked(x, weight, top_k)
    rows, experts = x.shape[0], weight.shape[0]
    logits = _logits(x, weight)
    if ids is None:
        ids = torch.empty((rows, top_k), dtype=torch.int64, device=x.device)
    weights = torch.empty((rows, top_k), dtype=torch.float32, device=x.device)
    launch(
        _CHOOSE,
        grid=(divide_up(rows, _WARPS),),
        threads=_WARPS * _WARP,
        logits=logits,
        ids=ids,
        weights=weights,
        rows=rows,
        experts=experts,
        top_k=top_k,
        groups=groups,
        top_groups=top_groups,
        renormalise=renormalise,
        scale=scale,
    )
    return ids, weights


def route_groups(
    x: Tensor,
    weight: Matrix,
    top_k: int,
    groups: int,
    top_groups: int,
    renormalise: bool,
    scale: float,
    ids: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See ops/moe.py. One launch for fewer than WIDE_ROWS rows, with the bits of `route` and `group_by_expert`."""
    rows = x.shape[0]
    if not 0 < rows < WIDE_ROWS:
        ids, weights = route(x, weight, top_k, groups, top_groups, renormalise, scale, ids)
        return ids, weights, *group_by_expert(ids, weight.shape[0])
    weight = _checked(x, weight, top_k)
    x, weight = _contiguous(x), _contiguous(weight)
    experts, width = weight.shape
    if ids is None:
        ids = x.new_empty(rows, top_k, dtype=torch.int64)
    weights = x.new_empty(rows, top_k, dtype=torch.float32)
    order = x.new_empty(rows * top_k, dtype=torch.int64)
    starts = x.new_empty(experts + 1, dtype=torch.int64)
    launch(
        _GROUPS[_KINDS[x.dtype], _KINDS[weight.dtype]],
        grid=(divide_up(rows, _ROWS), divide_up(experts, _WARPS)),
        threads=_WARPS * _WARP,
        shared_bytes=4 * (_WARPS + 1) * experts,
        x=x,
        x_stride=x.stride(0),
        x_aligned=is_aligned(x, 4),
        weight=weight,
        weight_stride=weight.stride(0),
        weight_aligned=is_aligned(weight, 4),
        logits=x.new_empty(rows, experts, dtype=torch.float32),
        ids=ids,
        weights=weights,
        order=order,
        starts=starts,
        tickets=_tickets(x.device),
        rows=rows,
        width=width,
        experts=experts,
        top_k=top_k,
        groups=groups,
        top_groups=top_groups,
        renormalise=renormalise,
        scale=scale,
    )
    return ids, weights, order, starts


@cache
def _tickets(device: torch.device) -> Tensor:
    """Counters of a device, by which blocks of a launch know that they are the last: zeros between launches, which
    follow one another on one stream."""
    return torch.zeros(divide_up(WIDE_ROWS, _ROWS) + 1, dtype=torch.int32, device=device)


def _contiguous(matrix: Tensor) -> Tensor:
    """The matrix, a row's values side by side."""
    return matrix.contiguous() if matrix.shape[1] and matrix.stride(1) != 1 else matrix


def _checked(x: Tensor, weight: Matrix, top_k: int) -> Tensor:
    """The router's matrix. Raises ArgumentError for what the kernels do not take."""
    if not isinstance(weight, Tensor):
        require("route", False, "weight is packed for the CPU")
        raise AssertionError
    for name, value in (("x", x), ("weight", weight)):
        if value.dtype not in _KINDS:
            require("route", False, f"{name} must be float32 or bfloat16, has dtype {value.dtype}")
    experts = weight.shape[0]
    if experts > MOST_EXPERTS or top_k > MOST_TOP_K:
        require("route", experts <= MOST_EXPERTS, f"weight has {experts} experts, at most {MOST_EXPERTS}")
        require("route", False, f"top_k is {top_k}, at most {MOST_TOP_K}")
    return weight


def _logits(x: Tensor, weight: Tensor) -> Tensor:
    """Logits fp32 [T,E]. The steps of a logit do not depend on the other rows, nor on the width of the tiles."""
    rows, width = x.shape
    experts = weight.shape[0]
    x, weight = _contiguous(x), _contiguous(weight)
    logits = torch.empty((rows, experts), dtype=torch.float32, device=x.device)
    wide = rows >= WIDE_ROWS  # a block is then two rows of warps, and each warp has 4 experts
    down, across = (2, 4) if wide else (1, 1)
    launch(
        _LOGITS[_KINDS[x.dtype], _KINDS[weight.dtype]],
        grid=(divide_up(rows, _ROWS * down), divide_up(experts, _WARPS * across)),
        threads=down * _WARPS * _WARP,
        x=x,
        x_stride=x.stride(0),
        x_aligned=is_aligned(x, 4),
        weight=weight,
        weight_stride=weight.stride(0),
        weight_aligned=is_aligned(weight, 4),
        logits=logits,
        rows=rows,
        experts=experts,
        width=width,
        wide=wide,
    )
    return logits


def group_by_expert(expert_ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """See ops/moe.py. Up to 8192 pairs in one launch of one block; more in two launches, one that counts and one
    that places. Both give the same. Ids that are not an expert's are left out: nothing here waits for the device.
    """
    limit = f"num_experts is {num_experts}, must be 1 .. {MOST_GROUPED}"
    require("group_by_expert", 1 <= num_experts <= MOST_GROUPED, limit)
    ids = expert_ids.contiguous()
    pairs = ids.numel()
    order = torch.empty(pairs, dtype=torch.int64, device=ids.device)
    starts = torch.empty(num_experts + 1, dtype=torch.int64, device=ids.device)
    tiles = divide_up(pairs, _WARP)
    each = tiles if pairs <= MOST_ALONE else max(_TILES, divide_up(tiles, _MOST_BLOCKS))
    blocks = divide_up(tiles, each) if tiles else 1
    warps = min(max(1, each), 32 if blocks == 1 else 8, MOST_SHARED_BYTES // (4 * num_experts) - 1)
    counts = torch.empty((blocks, num_experts), dtype=torch.int32, device=ids.device) if blocks > 1 else None

    def run(kernel: Kernel, **arguments: Tensor | None) -> None:
        shared_bytes = 4 * (warps + 1) * num_experts
        sizes = {"pairs": pairs, "each": each, "experts": num_experts}
        launch(kernel, grid=(blocks,), threads=warps * _WARP, shared_bytes=shared_bytes, **arguments, **sizes)

    if counts is not None:
        run(_COUNT, ids=ids, counts=counts)
    run(_GROUP, ids=ids, counts=counts, order=order, starts=starts)
    return order, starts

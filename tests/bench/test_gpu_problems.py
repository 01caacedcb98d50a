"""Figures that the compile report gives of a kernel besides its code: work of a step, and cards' limits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import pytest

from cierzo.bench.gpu import compiled
from cierzo.bench.gpu.calls import random_experts
from cierzo.bench.gpu.cases import SMALL3, SMALL4
from cierzo.bench.gpu.compiled import Compiled, _told
from cierzo.bench.gpu.configurations import configurations
from cierzo.bench.gpu.problems import STEPS, problems
from cierzo.engine.cost import operations
from cierzo.engine.cost.data_sheets import DATA_SHEETS
from cierzo.engine.cost.sizes import ModelSizes

DECODE, PREFILL = STEPS


class Work(NamedTuple):
    """Bytes and operations of a launch."""

    num_bytes: float
    flops: float = 0


def found_works(configuration: Any) -> dict[str, Work]:
    return {step: Work(work.num_bytes, work.operations) for step, work in problems(configuration)}


def works(*purposes: str) -> Iterator[dict[str, Work]]:
    """Works of the kernels of those purposes, by step."""
    known = dict(configurations())
    yield from (found_works(known[purpose]) for purpose in purposes)


CONTEXT = 4096  # tokens: a row at the end of 64 such contexts, or all rows of one
ROWS = {"decode 64": 64, "prefill 4096": CONTEXT}
WEIGHT_BYTES = {"plain": (2.0, 0), "fp8": (1.0, 4), "nvfp4": (0.5 + 1 / 16, 4)}  # of a weight, of a row's scale
PAGE_BYTES = {"*bf16": 2, "*fp8e4nv": 1}
Known = Any  # a kernel's sizes, or the types of what it points to, by name
IN_DECODE = {"sum_parts", "mla_attend", "gqa_attend", "plan", "prefixes", "combine"}
IN_PREFILL = {"gather", "expand", "flash"}


def launched(name: str, c: Known, step: str) -> bool:
    """Say if a step has the kernel. Products of each head are of generated rows, parts of k are apart for few."""
    if step == "decode 64":
        return name not in IN_PREFILL
    return name not in IN_DECODE and not (name == "linear" and (c["X_HEAD"] or c["APART"]))


def row(values: int, pointer: str) -> int:
    """Bytes of a row of activations: bf16, or codes and a scale."""
    return values + 4 if pointer == "*fp8e4nv" else 2 * values


def matrix(c: Known) -> int:
    """Bytes of weights [ROWS, K]."""
    each, scale = WEIGHT_BYTES[c["FORMAT"]]
    return int(c["ROWS"] * (c["K"] * each + scale))


def normed(t: Known) -> str:
    """The type of a norm's results: FP8 codes if any argument is one, else bf16."""
    return "*fp8e4nv" if "*fp8e4nv" in t.values() else "*bf16"


def pairs(step: str, window: int = 0) -> int:
    """Number of pairs of a row and a token that the row sees."""
    seen = [CONTEXT] * 64 if step == "decode 64" else range(1, CONTEXT + 1)
    return sum(min(tokens, window) if window else tokens for tokens in seen)


def splits(c: Known) -> int:
    """Number of splits, of 512 tokens each: a context of 4,096 has 8; a window of 128 may touch 2."""
    return {0: 8, 128: 2}[c.get("WINDOW", 0)]


def linear(c: Known, t: Known, step: str) -> Work:
    """A dense product; one of each head; the output head, of a row for each sequence; parts of k, apart."""
    rows, n, k = ROWS[step], c["ROWS"], c["K"]
    if c["X_HEAD"]:
        return Work(2 * (32 * n * k + rows * 32 * (n + k)), 2 * rows * 32 * n * k)
    if c["APART"]:
        return Work(matrix(c) + rows * (row(k, t["x_ptr"]) + c["PARTS"] * n * 4), 2 * rows * n * k)
    if t["out_ptr"] == "*fp32":
        rows = {"decode 64": 64, "prefill 4096": 1}[step]
        return Work(matrix(c) + rows * (2 * k + 4 * n), 2 * rows * n * k)
    written = row(n // 2 if c["PAIRED"] else n, t["out_ptr"])
    return Work(matrix(c) + rows * (row(k, t["x_ptr"]) + written), 2 * rows * n * k)


def experts(c: Known, step: str, read: int, written: int) -> Work:
    """The experts that the tokens of a step chose, and the shared one; read, written: bytes of a token's rows."""
    chosen = len(random_experts(SMALL4, {size.name: size for size in STEPS}[step]).unique())
    return Work((chosen + 1) * matrix(c) + ROWS[step] * (read + written), 2 * ROWS[step] * 5 * c["ROWS"] * c["K"])


def gate_up(c: Known, t: Known, step: str) -> Work:
    """Codes are a row for each of five experts, whose scales differ; in bf16 all five read the token's one row."""
    read = row(c["K"], t["x_ptr"]) * (5 if t["x_ptr"] == "*fp8e4nv" else 1)
    return experts(c, step, read, 5 * row(c["ROWS"] // 2, t["inner_ptr"]))


def mla_attend(c: Known, t: Known, step: str) -> Work:
    """Queries and latents in; of each split a row's sums, its largest score and its sum of weights out."""
    width, rank = c["R"] + c["P"], c["R"]
    moved = 64 * CONTEXT * width * PAGE_BYTES[t["pages_ptr"]] + 64 * c["H"] * 2 * width
    moved += 64 * c["H"] * splits(c) * (rank + 2) * 4
    return Work(moved, 2 * pairs(step) * c["H"] * (width + rank))


def gqa_attend(c: Known, t: Known, step: str) -> Work:
    """Queries, and keys and values of HK heads in, as much of a context as a window leaves."""
    heads, read = c["HK"] * c["G"], 64 * min(CONTEXT, c["WINDOW"] or CONTEXT)
    moved = read * 2 * c["HK"] * c["D"] * PAGE_BYTES[t["k_pages_ptr"]] + 64 * heads * 2 * c["D"]
    moved += 64 * heads * splits(c) * (c["D"] + 2) * 4
    return Work(moved, 4 * pairs(step, c["WINDOW"]) * heads * c["D"])


def flash(c: Known, t: Known, step: str) -> Work:
    """Queries and results; each head's keys and values, and what keys share; sums of a first piece in and out."""
    values = CONTEXT * c["H"] * (c["A"] + c["B"] + c["V"]) + CONTEXT * (c["HK"] * (c["A"] + c["V"]) + c["B"])
    carried = 2 * CONTEXT * c["H"] * (c["V"] + 2) * 4 if c["CARRIED"] else 0
    return Work(2 * values + carried, 2 * pairs(step, c["WINDOW"]) * c["H"] * (c["A"] + c["B"] + c["V"]))


# What a launch of each kernel moves and computes, from the sizes and types that it is compiled for.
BY_HAND: dict[str, Callable[[Known, Known, str], Work]] = {
    "rms_norm": lambda c, t, step: Work(ROWS[step] * (2 * c["D"] + row(c["D"], normed(t))) + 2 * c["D"]),
    "add_rms_norm": lambda c, t, step: Work(ROWS[step] * (6 * c["D"] + row(c["D"], normed(t))) + 2 * c["D"]),
    "rope_tables": lambda c, t, step: Work(ROWS[step] * (8 + 2 * c["F"] * 4)),
    "apply_rope": lambda c, t, step: Work(ROWS[step] * (c["H"] * 2 * c["F"] * 4 + 2 * c["F"] * 4)),
    "write_normed_latents": lambda c, t, step: Work(
        ROWS[step] * ((c["R"] + 2 * c["F"]) * (2 + PAGE_BYTES[t["pages_ptr"]]) + 2 * c["F"] * 4) + 2 * c["R"]
    ),
    "rotate_and_write": lambda c, t, step: Work(
        ROWS[step] * 2 * c["F"] * (c["HQ"] * 4 + 2 * c["HK"] * (2 + PAGE_BYTES[t["k_pages_ptr"]]) + 4)
    ),
    "linear": linear,
    "quantise_rows": lambda c, t, step: Work(ROWS[step] * (2 * c["D"] + c["D"] + 4)),
    "quantise_pairs": lambda c, t, step: Work(ROWS[step] * (2 * c["D"] + 5 * (c["D"] + 4))),
    "expert_gate_up": gate_up,
    "expert_down": lambda c, t, step: experts(
        c, step, 5 * row(c["K"], t["inner_ptr"]), 5 * row(c["ROWS"], t["outputs_ptr"])
    ),
    "sum_slots": lambda c, t, step: Work(ROWS[step] * (2 * (5 + 1) * c["D"] + 4 * 4)),
    "sum_parts": lambda c, t, step: Work(64 * c["N"] * (c["PARTS"] * 4 + 2)),
    "mla_attend": mla_attend,
    "gqa_attend": gqa_attend,
    # Items of four numbers; each sequence's first item, start and context; each row's sequence.
    "plan": lambda c, t, step: Work(4 * (64 * splits(c) * 4 + 3 * 64 + 2 + 64)),
    # Of each sequence two tables of blocks, its start and context, three mates, M members.
    "prefixes": lambda c, t, step: Work(4 * 64 * (2 * CONTEXT // 32 + 2 + 3 + c["M"])),
    "combine": lambda c, t, step: Work(64 * c["HK"] * c["G"] * (splits(c) * (c["W"] + 2) * 4 + 2 * c["W"])),
    "gather": lambda c, t, step: Work(
        CONTEXT * c["HK"] * c["W"] * (2 if c["KEYS"] else 1) * (PAGE_BYTES[t["pages_ptr"]] + 2)
    ),
    "expand": lambda c, t, step: Work(
        2 * (CONTEXT * (c["R"] + c["N"]) + c["R"] * c["N"]), 2 * CONTEXT * c["R"] * c["N"]
    ),
    "flash": flash,
}


def test_every_kernel_has_the_problem_that_its_sizes_give() -> None:
    seen = set()
    for purpose, configuration in configurations():
        name, constants, types = configuration.name, configuration.constants, configuration.types
        expected = {step: BY_HAND[name](constants, types, step) for step in ROWS if launched(name, constants, step)}
        assert found_works(configuration) == expected, purpose
        seen.add(name)
    assert seen == set(BY_HAND)


@pytest.mark.parametrize(
    ("attend", "combine", "model", "page_bytes"),
    [
        ("mla_decode 32 heads, fp8 pages", "mla_decode 32 heads, combine", SMALL4, 1),
        ("gqa_decode 32/8 heads, bf16 pages", "gqa_decode 32/8 heads, combine", SMALL3, 2),
    ],
)
def test_parts_of_decoding_add_up_to_the_operation(
    attend: str, combine: str, model: ModelSizes, page_bytes: int
) -> None:
    """Partial results lie between them, written by one and read by the other."""
    first, second = (found["decode 64"] for found in works(attend, combine))
    entry_bytes = model.page_values * page_bytes
    if model.rank:
        whole = operations.mla_decode(model, *DECODE.queries(), entry_bytes)
    else:
        whole = operations.gqa(model, *DECODE.queries(), entry_bytes)
    between = 64 * model.heads * 8 * ((model.rank or model.head_dim) + 2) * 4
    assert first.num_bytes + second.num_bytes == whole.num_bytes + 2 * between
    assert first.flops + second.flops == whole.operations


@pytest.mark.parametrize("format", ["bf16", "fp8", "nvfp4"])
def test_parts_of_the_experts_add_up_to_the_operation(format: str) -> None:
    names = (f"small4 expert_gate_up {format}", f"small4 expert_down {format}")
    for size in STEPS:
        up, down = (found[size.name] for found in works(*names))
        distinct = len(random_experts(SMALL4, size).unique())
        whole = operations.expert_mlp(SMALL4, size.rows, distinct, format)
        assert up.flops + down.flops == whole.operations
        rows = size.rows * 5  # of four experts and the shared one
        between = rows * (2 * 2048 + 4096) * 2 - size.rows * 4096 * 2  # inner, twice; outputs, which the sum reads
        assert up.num_bytes + down.num_bytes == whole.num_bytes + between


def test_rows_of_codes_are_half_as_wide_and_have_a_scale() -> None:
    wide, codes = works("small4 o_proj fp8", "small4 o_proj fp8 x fp8")
    assert wide["decode 64"].num_bytes - codes["decode 64"].num_bytes == 64 * (4096 - 4)
    wide, codes = works("small4 expert_down fp8", "small4 expert_down fp8 x fp8")
    assert wide["decode 64"].num_bytes - codes["decode 64"].num_bytes == 64 * 5 * (2048 - 4)
    by_row, static = works("small4 shared_gate_up fp8 x fp8", "small4 shared_gate_up fp8 x fp8, static")
    assert by_row["decode 64"].num_bytes - static["decode 64"].num_bytes == 64 * (2048 - 4)
    (pairs,) = works("small4 experts, static")
    assert pairs["decode 64"] == Work(64 * (4096 * 2 + 5 * 4100))


def test_parts_of_a_prompts_attention_add_up_to_the_operation() -> None:
    parts = ("expand keys", "expand values", "flash")
    flops = sum(
        found["prefill 4096"].flops for found in works(*(f"mla_prefill 16 heads, {part}" for part in parts))
    )
    model = replace(SMALL4, heads=16)
    assert flops == operations.mla_prefill(model, *PREFILL.queries(), 0).operations


def test_work_of_products() -> None:
    (o_proj, paired, head, absorb) = works(
        "small4 o_proj bf16", "small4 shared_gate_up bf16", "small4 lm_head bf16", "small4 absorb bf16"
    )
    weights, rows = 4096 * 4096 * 2, 64 * 4096 * 2
    assert o_proj["decode 64"] == Work(weights + 2 * rows, 2 * 64 * 4096 * 4096)
    assert paired["decode 64"] == Work(weights + rows + rows // 2, 2 * 64 * 4096 * 4096)
    assert head["decode 64"] == Work(131_072 * 4096 * 2 + rows + 64 * 131_072 * 4, 2 * 64 * 4096 * 131_072)
    assert set(absorb) == {"decode 64"}


def test_the_limits_of_cards() -> None:
    h100, h200 = DATA_SHEETS.values()
    o_proj = {size.name: operations.linear(ModelSizes(), size.rows, 4096, 4096, "bf16") for size in STEPS}
    num_bytes = 2 * (4096 * 4096 + 2 * 64 * 4096)
    assert h100.limit_s(o_proj["decode 64"], fp8=False) == (num_bytes / 3.35e12, "memory")
    assert h200.limit_s(o_proj["decode 64"], fp8=False) == (num_bytes / 4.8e12, "memory")
    assert h100.limit_s(o_proj["prefill 4096"], fp8=False) == (2 * 4096**3 / 989.5e12, "arithmetic")
    assert h100.limit_s(o_proj["prefill 4096"], fp8=True) == (2 * 4096**3 / 1979e12, "arithmetic")


def test_the_table_tells_loads_by_width() -> None:
    instructions = {
        "LDG.E.128.CONSTANT": 2, "LDG.E": 1, "LDG.E.U8": 3, "LDGSTS.E.BYPASS.128": 4, "LDGSTS.E": 5,
        "UTMALDG.2D": 6, "HGMMA.64x64x16.F32.BF16": 7, "STG.E.128": 9,
    }  # fmt: skip
    shown = _told(Compiled(1, 0, 0, instructions))
    assert shown == "LDG.128 2 LDG.32 1 LDG.8 3 LDGSTS.128 4 LDGSTS.32 5 UTMALDG 6 HGMMA 7"


def test_the_report_gives_every_step_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    (known,) = [one for purpose, one in configurations() if purpose == "small4 o_proj bf16"]
    for instruction in ("HGMMA.64x64x16", "QGMMA.64x64x32"):
        compiled.print_limits([("small4 o_proj bf16", known, Compiled(1, 0, 0, {instruction: 1}))])
        lines = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("linear ")]
        assert [line[4:6] for line in lines] == [["decode", "64"], ["prefill", "4096"]]
        assert lines[0][6:] == ["34.603", "2.147", "10.33", "7.21", "memory"]
        time = "138.90" if instruction.startswith("H") else "69.45"
        assert lines[1][6:] == ["100.663", "137.439", time, time, "arithmetic"]


@pytest.mark.parametrize(("capability", "status"), [(80, 0), (90, 1)])
def test_fp8_is_missing_only_from_cards_that_have_none(
    capability: int, status: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (known,) = [one for purpose, one in configurations() if purpose == "small4 o_proj bf16"]
    error = f"CompilationError: type {compiled.NO_E4M3} in this architecture"
    monkeypatch.setattr(compiled, "compile_all", lambda _: [("small4 o_proj fp8", known, None, error)])
    assert compiled.main(["--capability", str(capability)]) == status
    assert ("DOES NOT COMPILE" in capsys.readouterr().out) == bool(status)

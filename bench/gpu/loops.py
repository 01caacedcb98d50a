"""The loops of a GPU kernel, read from its machine code as `nvdisasm -c` prints it, and what one turn costs.

    main_loop(code).classes()   {"FP32": 128, "LOP3": 96, "MMA": 8, "WAIT": 3, ...}, of one turn of one warp

A loop is a natural loop of the flow of control: branches back to a block that every way into the loop passes. So
blocks that the compiler moved behind the loop belong to it, predicated blocks count whole (`skipped` says how many
instructions may be passed over), and a poll of a barrier is a loop of its own inside, one turn of which counts.

The *main loop* is chosen by its matrix instructions. Of the loops with some outside loops within them, it is one
with those of whole tiles of the source, and one around no other such loop; of these the one with the most, and of
two alike the first, such as attention's without a mask. Where a kernel multiplies outside its loops alone, as does
one whose few steps were unrolled, it has no main loop: its loops only prepare. Where it has no matrix instruction,
the main loop is the one that loads most bytes.

What the compiler took out in front and behind (the first and last turns of a pipeline) is `outside`, with the rest
of the kernel. A routine that a kernel calls counts nowhere. What this cannot follow is a ValueError: code with
gaps, cut short, or of several functions; a branch to no label; a loop with more than one entrance; and for the main
loop any loop with a call.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

# Class of an instruction -> its opcodes without modifiers, or with the first one. Conversions of one value (F2F)
# and of a pair (F2FP) run on different units; a WAIT stalls for work under way, a BARRIER for other warps.
CLASSES = {
    "FP32": ("FFMA", "FMUL", "FADD"),
    "HALF2": ("HFMA2", "HMUL2", "HADD2", "HMNMX2", "HSET2", "HSETP2"),
    "IMAD": ("IMAD",),
    "LOP3": ("LOP3",),
    "SHF": ("SHF",),
    "PRMT": ("PRMT",),
    "F2F": ("F2F", "F2I", "I2F", "FRND"),  # one value a thread
    "F2FP": ("F2FP", "I2FP", "F2IP"),  # packs or unpacks two values a thread
    "ALU": (
        "IADD3", "IADD", "ISETP", "LEA", "SEL", "FSEL", "FSETP", "FMNMX", "IMNMX", "VIADD", "VIMNMX", "VIADDMNMX",
        "MOV", "SGXT", "BMSK", "PLOP3", "P2R", "R2P", "IABS", "CS2R", "FSET", "FCHK",
    ),
    "MUFU": ("MUFU", "POPC", "FLO", "BREV"),
    "LDS": ("LDS", "LDSM"),
    "STS": ("STS", "STSM"),
    "LDG": ("LDG", "LD"),
    "LDGSTS": ("LDGSTS",),
    "UTMALDG": ("UTMALDG", "UBLKCP"),
    "STG": ("STG", "ST", "RED", "ATOM", "ATOMG", "UTMASTG"),
    "LOCAL": ("LDL", "STL"),
    "SHFL": ("SHFL", "REDUX", "VOTE", "MATCH"),
    "MMA": ("HGMMA", "QGMMA", "IGMMA", "HMMA", "QMMA", "IMMA", "UTCHMMA", "UTCQMMA", "UTCIMMA", "UTCOMMA"),
    "WAIT": ("WARPGROUP.DEPBAR", "DEPBAR", "SYNCS.PHASECHK"),
    "BARRIER": ("BAR", "WARPSYNC"),
    "FENCE": ("WARPGROUP", "LDGDEPBAR", "SYNCS", "MEMBAR", "FENCE", "ERRBAR", "CCTL"),  # and what closes a group
    "CONTROL": ("BRA", "BRX", "BRXU", "BSSY", "BSYNC", "BREAK", "EXIT", "CALL", "RET", "NOP", "ELECT", "NANOSLEEP"),
}  # fmt: skip
CLASS_OF = {opcode: name for name, opcodes in CLASSES.items() for opcode in opcodes}
LOADS = ("LDG", "LDGSTS", "UTMALDG")
WIDTHS = ("128", "64", "U16", "S16", "U8", "S8")  # of a load, as modifiers; without one it has 32 bits
TILE_BITS = 1 << 20  # stands for those of a TMA copy
WARP_GROUP = 4  # warps that execute a GMMA together
_LINE = re.compile(
    r"^\s*/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)\s*(.*?)\s*;|^\s*([.$\w]+):", re.MULTILINE
)
INSTRUCTION_BYTES = 16
BRANCHES = ("BRA", "BRX", "BRXU", "JMP", "JMX", "JMXU")
_SECTION = re.compile(r"^\s*\.section\s+\.text\.([^,\s]+)", re.MULTILINE)
_LABEL = re.compile(r"\.L\w+")
_SHAPE = re.compile(r"\.(?:(\d+)x(\d+)x(\d+)|16(8)(4|8|16|32|64|128))\b")


def class_of(name: str) -> str:
    """Class of an instruction, such as "LOP3" of "LOP3.LUT"; "UNIFORM" of a warp's scalar unit; else "REST"."""
    opcode, *modifiers = re.split(r"[. ]", name)
    known = CLASS_OF.get(".".join([opcode, *modifiers[:1]])) or CLASS_OF.get(opcode)
    return known or ("UNIFORM" if opcode.startswith(("U", "R2UR", "S2UR", "VOTEU")) else "REST")


def products(name: str) -> int:
    """Multiplications of a matrix instruction, of one warp: a GMMA's are those of four. 0 of any other."""
    found = _SHAPE.search(name) if class_of(name) == "MMA" else None
    if found is None:
        return 0
    m, n, k, narrow, deep = (int(part or 0) for part in found.groups())
    return m * n * k // WARP_GROUP if m else 16 * narrow * deep


def width(name: str) -> str:
    """A memory access by the bits that a thread moves: "LDG.128" of "LDG.E.128.CONSTANT"; a TMA copy as it is."""
    opcode, *modifiers = name.split(".")
    if opcode.startswith("U"):
        return opcode
    return f"{opcode}.{next((part.lstrip('US') for part in modifiers if part in WIDTHS), '32')}"


@dataclass(frozen=True, slots=True)
class Loop:
    """A loop: instructions of one turn of one warp by opcode with modifiers, and those outside it.

    A wait's name holds how many groups may stay under way: "WARPGROUP.DEPBAR.LE 0" lets none. depth: loops around
    it. skipped: instructions that a branch within the loop may pass over. place: (which, of how many) of the
    function's loops, by their first instructions, from 1 on. around: of main loops, instructions of a turn of the
    loops around it that are in no loop within these; they are `outside`, too.
    """

    instructions: dict[str, int]
    outside: dict[str, int]
    depth: int = 0
    skipped: int = 0
    place: tuple[int, int] = (1, 1)
    around: dict[str, int] = field(default_factory=dict)

    @property
    def issued(self) -> int:
        """Instructions of one turn of one warp."""
        return sum(self.instructions.values())

    @property
    def everything(self) -> dict[str, int]:
        """Instructions of the function, the loop's among them."""
        return dict(Counter(self.instructions) + Counter(self.outside))

    @property
    def products(self) -> int:
        """Multiplications of the tensor cores in one turn, of one warp."""
        return _products(self.instructions)

    @property
    def mma(self) -> dict[str, int]:
        """Matrix instructions of one turn by name, "HGMMA.64x64x16.F32.BF16"."""
        return {name: number for name, number in self.instructions.items() if class_of(name) == "MMA"}

    @property
    def drains(self) -> int:
        """Waits of one turn that let no matrix instruction stay under way."""
        return self.instructions.get("WARPGROUP.DEPBAR.LE 0", 0)

    def classes(self) -> dict[str, int]:
        """Instructions of one turn of one warp by class; classes without one are left out."""
        return classes(self.instructions)

    def widths(self) -> dict[str, int]:
        """Loads of one turn by width: {"LDG.128": 4, "UTMALDG": 1}."""
        loads = ((name, number) for name, number in self.instructions.items() if class_of(name) in LOADS)
        return _sums((width(name), number) for name, number in loads)


def classes(instructions: Mapping[str, int]) -> dict[str, int]:
    """Instructions by class."""
    return _sums((class_of(name), number) for name, number in instructions.items())


def functions(code: str) -> dict[str, str]:
    """Machine code by function, of a disassembly that may hold several."""
    starts = [(found.start(), found[1]) for found in _SECTION.finditer(code)]
    return {name: code[start:end] for (start, name), (end, _) in pairwise([*starts, (len(code), "")])}


def main_loop(code: str, tile: int = 1) -> Loop | None:
    """The loop that does the work of a function; None if it has no loop, or multiplies outside its loops alone.

    tile: multiplications of one warp in a tile of the source, if it is known. Raises ValueError for what it cannot
    follow, such as code of several functions: hand over one of `functions`.
    """
    found = _found(code)
    for loop, _, _ in found:  # whichever it is: what it calls may be the work
        if called := [name for name in loop.instructions if name.startswith("CALL")]:
            raise ValueError(f"a loop of {loop.issued} instructions has a {called[0]}, whose routine nobody counts")
    if not whole(code).mma:
        return max(found, key=lambda one: _loaded(one[1]), default=(None,))[0]  # of equals the first
    multiplying = [one for one in found if _products(one[1])]
    fitting = [one for one in multiplying if one[0].products % tile == 0] or multiplying
    inmost = [one for one in fitting if not any(other[2] < one[2] for other in fitting)]
    main, _, body = max(inmost, key=lambda one: _products(one[1]), default=(None, None, set[int]()))
    outer = [own for _, own, blocks in found if body < blocks]
    return replace(main, around=dict(sum(outer, Counter[str]()))) if main else None


def whole(code: str) -> Loop:
    """The instructions of a function that run, each once: what counts for one without a loop."""
    blocks, follow = _blocks(code)
    return Loop(dict(sum((blocks[block] for block in _reached(follow, 0)), Counter[str]())), {})


def loops(code: str) -> list[Loop]:
    """Every loop of a function, in the order of their first instructions; an outer one before those within it."""
    return [loop for loop, *_ in _found(code)]


def _sums(pairs: Iterable[tuple[str, int]]) -> dict[str, int]:
    found: Counter[str] = Counter()
    for name, number in pairs:
        found[name] += number
    return dict(found)


def _products(instructions: Mapping[str, int]) -> int:
    return sum(products(name) * number for name, number in instructions.items())


def _loaded(instructions: Mapping[str, int]) -> tuple[int, int]:
    """Bits that a thread loads, and instructions."""
    loads = ((name, number) for name, number in instructions.items() if class_of(name) in LOADS)
    return sum(_bits(name) * number for name, number in loads), sum(instructions.values())


def _bits(name: str) -> int:
    """Bits that a load moves for a thread; a TMA copy, which moves a tile, more than any."""
    return int(width(name).split(".")[1]) if "." in width(name) else TILE_BITS


def _found(code: str) -> list[tuple[Loop, Counter[str], set[int]]]:
    """Loops, the instructions of each that are in no loop within it, and its blocks."""
    if len(functions(code)) > 1:
        raise ValueError(f"code of {len(functions(code))} functions, not of one: {', '.join(functions(code))}")
    blocks, follow = _blocks(code)
    bodies = _bodies(follow)

    def count(numbers: Iterable[int]) -> Counter[str]:
        return sum((blocks[number] for number in numbers), Counter[str]())

    everything = count(_reached(follow, 0))
    result = []
    for number_of, (header, body) in enumerate(bodies.items(), 1):
        inner = [other for other in bodies.values() if other < body]
        depth = sum(body < other for other in bodies.values())
        turn = count(body)
        within = [[after for after in row if number in body and after in body] for number, row in enumerate(follow)]
        last = [number for number in body if header in follow[number]]
        passed = [one for one in body - {header} if _reached(within, header, without=one).intersection(last)]
        place = number_of, len(bodies)
        loop = Loop(dict(turn), dict(everything - turn), depth, count(passed).total(), place)
        result.append((loop, count(body.difference(*inner)), body))
    return result


def _bodies(follow: Sequence[Sequence[int]]) -> dict[int, set[int]]:
    """Blocks of each natural loop by its first one, in its order. `follow`: of each block those after it."""
    live = _reached(follow, 0)
    before = [[one for one in live if number in follow[one]] for number in range(len(follow))]
    bodies: dict[int, set[int]] = {}
    onward = [list(row) for row in follow]
    for header in sorted(live):
        elsewhere = _reached(follow, 0, without=header)
        for last in before[header]:
            if last not in elsewhere:  # every way there passes the header: this edge goes back
                bodies.setdefault(header, {header}).update(_reached(before, last, without=header))
                onward[last] = [one for one in onward[last] if one != header]
    for one in sorted(live):
        if any(one in _reached(onward, after) for after in onward[one]):
            raise ValueError(f"a loop by way of block {one} of {len(follow)} has more than one entrance")
    return bodies


def _reached(follow: Sequence[Sequence[int]], start: int, without: int = -1) -> set[int]:
    """Blocks on the ways from a block, itself included, that do not touch `without`."""
    found: set[int] = set()
    ahead = [start]
    while ahead:
        one = ahead.pop()
        if one != without and one not in found:
            found.add(one)
            ahead += follow[one]
    return found


def _blocks(code: str) -> tuple[list[Counter[str]], list[list[int]]]:
    """Instructions of each stretch of code that is entered only at its start, and the stretches that may follow."""
    labels: dict[str, int] = {}
    lines: list[tuple[str, str, str]] = []
    for found in _LINE.finditer(code):
        place, predicate, name, operands, label = (part or "" for part in found.groups())
        if label in labels:
            raise ValueError(f"the label {label} twice: code of several functions")
        if label:
            labels[label] = len(lines)
        elif int(place, 16) != len(lines) * INSTRUCTION_BYTES:
            raise ValueError(f"an instruction at 0x{place}, not at 0x{len(lines) * INSTRUCTION_BYTES:04x}")
        else:
            lines.append((predicate, name, operands))
    jumps: dict[int, tuple[list[int], bool]] = {}  # line -> lines that it names, and whether the next may follow
    joins: dict[str, list[str]] = {}  # register -> where a warp joins again, as BSSY had it note
    for number, (predicate, name, operands) in enumerate(lines):
        opcode, named = name.split(".")[0], _LABEL.findall(operands)
        falls = predicate != "" or re.match(r"!?U?P\w|U?R\w|~", operands) is not None  # EXIT P1; BRA P1, `(.L_x_1)
        if opcode == "BSSY":
            joins[operands.split(",")[0]] = named
        elif opcode == "BSYNC":
            named = joins.get(operands, [])
            jumps[number] = [labels[one] for one in named], predicate != "" or not named
        elif opcode in (*BRANCHES, "EXIT", "KILL", "RET"):
            if missing := [one for one in named if one not in labels]:
                raise ValueError(f"a branch to {missing[0]}, which the code does not have")
            if opcode in BRANCHES and not named:
                raise ValueError(f"a branch to no label: {name} {operands}")
            falls = falls if opcode in ("BRA", "EXIT") else predicate != ""  # others name registers to go to
            jumps[number] = [labels[one] for one in named if opcode in BRANCHES], falls
    targets = [target for found, _ in jumps.values() for target in found]
    starts = sorted({0, *labels.values(), *targets, *(number + 1 for number in jumps)} - {len(lines)})
    block_of = {start: block for block, start in enumerate(starts)}
    blocks, follow = [], []
    for start, end in pairwise([*starts, len(lines)]):
        named, falls = jumps.get(end - 1, ([], True))
        blocks.append(Counter(_full_name(name, operands) for _, name, operands in lines[start:end]))
        # beyond the last line: a block that is not there
        follow.append([block_of.get(one, len(starts)) for one in [*named, *([end] if falls else [])]])
    if not lines or len(starts) in _reached([*follow, []], 0):
        raise ValueError(f"code of {len(lines)} instructions that is cut short: it goes on behind the last")
    return blocks, [[one for one in row if one < len(starts)] for row in follow]


def _full_name(name: str, operands: str) -> str:
    """Name of an instruction; of a wait also how many groups may stay under way."""
    found = re.search(r"0x([0-9a-f]+)$", operands) if "DEPBAR.LE" in name else None
    return f"{name} {int(found[1], 16)}" if found else name

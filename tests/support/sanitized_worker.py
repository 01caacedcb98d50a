"""Runs native calls from its standard input under sanitizers (sanitized.py). No torch, no numpy: nothing of theirs.

A call is (symbol, threads, regions, fixups, how many of the regions are structs of arguments). Each region becomes
an allocation of exactly its size, so that AddressSanitizer sees the first byte beyond it; a region that was not
aligned to 16 bytes is not aligned here.
"""

from __future__ import annotations

import ctypes
import pickle
import sys

Region = tuple[bytes, int]
Fixup = tuple[int, int, int, int]

malloc = ctypes.CDLL(None)
malloc.posix_memalign.argtypes = (ctypes.POINTER(ctypes.c_void_p), ctypes.c_size_t, ctypes.c_size_t)
malloc.free.argtypes = (ctypes.c_void_p,)


def allocate(size: int, place: int) -> tuple[int, int]:
    """(what to free, where `size` bytes begin that lie to 64, or at least to 16, as address `place` does)."""
    block = ctypes.c_void_p()
    alignment = next(power for power in (64, 32, 16) if place % power == place % 16)
    slack = place % 16
    malloc.posix_memalign(ctypes.byref(block), alignment, size + slack)
    assert block.value is not None
    return block.value, block.value + slack


def run(
    library: ctypes.CDLL, symbol: str, threads: int, regions: list[Region], fixups: list[Fixup], num_structs: int
) -> list[bytes]:
    """Call it; the regions afterwards, without the structs: they hold pointers."""
    blocks, places = zip(*(allocate(len(data), place) for data, place in regions), strict=True)
    for (data, _), address in zip(regions, places, strict=True):
        ctypes.memmove(address, data, len(data))
    for region, offset, target, inside in fixups:
        ctypes.c_void_p.from_address(places[region] + offset).value = places[target] + inside
    function = getattr(library, symbol)
    function.argtypes = (ctypes.c_void_p, ctypes.c_int)
    function(places[0], threads)
    tensors = list(zip(regions, places, strict=True))[num_structs:]
    after = [ctypes.string_at(address, len(data)) for (data, _), address in tensors]
    for block in blocks:
        malloc.free(block)
    return after


def main() -> None:
    """Until the input ends."""
    library = ctypes.CDLL(sys.argv[1])
    library.cierzo_abi.restype = ctypes.c_char_p
    if library.cierzo_abi().decode() != sys.argv[2]:
        sys.exit("the sanitized library is of another version than the one in use")
    while True:
        try:
            call = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        pickle.dump(run(library, *call), sys.stdout.buffer)
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()

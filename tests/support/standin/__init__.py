"""A stand-in for a card: Triton's own compiler and launcher on a libcuda of ours, with the interpreter's values.

    library.py  libcuda.c and device.c, compiled by gcc and bound: streams, events, recordings, memory
    driver.py   Triton's driver on it; a launch that runs is checked, and goes to
    twin.py     a process that interprets the same kernels, on the same memory at the same addresses
    memory.py   torch's tensors in the card's memory; what torch does with them takes its turn in the queue
    machine.py  torch.cuda, as far as the engine and benchmarks use it
    lent.py     the benchmarks of a lent card, for its rehearsal

Work waits in a queue until the host waits for a stream or an event; memory is poison until it is written, and again
when it was freed; a recording replays its launches with the addresses that they had. So it finds: what the driver
would refuse (grids, threads, registers, shared memory, tensor maps), parameters that are not what the machine code
takes, addresses that are nobody's any more, pinned and scratch memory used again too early, a host that waits
where it must not or reads what is not there yet, and a recording that depends on what has gone.

What it cannot show:

- Speed: nothing here takes the time that it takes on a card. No occupancy, L2, clocks, power, nor launch latency.
- Values of machine code: the interpreter computes from the source. What ptxas made of it, the order and rounding
  within an MMA, fused multiply-adds, approximate functions, FTZ: none of it runs. (The cubin's parameters are read,
  its instructions are not.)
- Races: a launch runs program after program, alone. Missing barriers, atomics that contend, two streams that really
  overlap, the memory model, and launches that depend on each other without being in order (PDL) are not seen.
- Writes of a kernel that stay within the blocks that it was given: these are not checked against tensors.
- The driver: limits that libcuda.c does not list, other versions of it, its own memory, fragmentation, MPS, several
  cards, ECC. A tensor map's rules are those of the manual. Swizzles, promotion and fill of a map are not executed.
- CuPy and NVRTC: CUDA C++ runs on fibers (cuda_on_cpu.py), its launches do not pass through this libcuda; nor do
  torch's operations, which are the CPU's own and so differ from cuBLAS and from torch's CUDA kernels in bits.
- torch's caching allocator: here no memory is given out twice, there it is, in the order of a stream.
"""

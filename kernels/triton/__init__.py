"""GPU kernels in Triton, each beside its launcher. Needs the package triton; nothing imports it on a CPU."""

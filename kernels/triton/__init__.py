"""GPU kernels in Triton, each beside its launcher. Needs the package triton; engines on a CPU do not import it."""

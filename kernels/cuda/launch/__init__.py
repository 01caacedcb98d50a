"""The operations' arguments -> launches of CUDA C++ kernels, one file per file of ops/."""

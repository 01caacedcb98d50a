"""Launchers of the CUDA C++ kernels, one file for each file of ops/."""

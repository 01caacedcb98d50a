"""CUDA C++ kernels: the sources beside this file, which NVRTC compiles at first use (launch/device.py)."""

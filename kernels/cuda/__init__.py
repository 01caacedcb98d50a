"""CUDA C++ kernels: sources beside this file, compiled at first use by NVRTC (launch/device.py)."""

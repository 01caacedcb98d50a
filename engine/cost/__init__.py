"""What a step must read and compute, what a device can do, and so how long a step takes. No torch, no model.

device.py     a device: bandwidth, rates, memory, and the shares of them that kernels reach
work.py       a step of a model as operations, each with its bytes and operations
step_time.py  a step's work on a device, in seconds
step_model.py the same for an engine's configuration, and sums over many steps
"""

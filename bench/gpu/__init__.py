"""The command for a machine with a GPU, which may be lent for minutes: `python -m cierzo.bench.gpu kernels|models`.

Nothing needs to be installed for the kernels but torch, triton, cupy and numpy; models also take msgspec and uvloop
(`make gpu-bundle` fetches them beforehand, and compiles the kernels). A run ends in time, each operation is
measured in a process of its own, results go to a file after every cell, and a run that was stopped goes on there.
"""

import time

BEGAN = time.monotonic()  # a run's time counts from here: importing torch takes seconds of it

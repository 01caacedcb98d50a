"""The one command for a machine with a GPU: `PYTHONPATH=src python -m cierzo.bench.gpu`, or `make gpu`.

Nothing needs to be installed for the parts that run kernels but torch, triton, cupy and numpy; the served parts
also take msgspec and uvloop (`make gpu-bundle` fetches them beforehand). Parts take at most eight minutes each,
results go to a file after every cell, and a run that was stopped goes on where it was.
"""

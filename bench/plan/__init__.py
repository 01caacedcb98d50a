"""`cierzo plan`: what a workload comes to on a device that need not be here, and what to change.

command.py    `cierzo plan`: arguments, tables, pictures
search.py     plans: the highest load within limits, and which change helps most
forecast.py   requests a second, latencies and what limits, of one workload on one device
batching.py   the steps that a workload comes to under an engine's limits
calibrate.py  this machine's CPU as a device; check.py, plans for it against measurements
"""

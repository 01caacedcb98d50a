"""`cierzo plan`: what a workload would come to on a device that need not be here, and what to change.

batching.py   which steps a workload comes to, by the engine's limits; course.py, what is kept of them
forecast.py   what follows: requests per second, latencies, what limits
search.py     the plans that are tried, and the best of them
command.py    `cierzo plan`: arguments, tables, pictures
calibrate.py  this machine's CPU as a device; check.py holds plans for it against measurements
"""

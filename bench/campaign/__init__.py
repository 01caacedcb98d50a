"""A benchmark campaign: subjects measured in cells, in rounds, resumably; headline, peers and gpu define theirs.

store.py and loop.py need nothing but the standard library: a machine with a GPU need not have msgspec.
"""

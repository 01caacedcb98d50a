"""A benchmark campaign: subjects measured in cells, in rounds, resumably; headline, peers and gpu define theirs.

store.py    samples on disk, a line of JSON each, behind the line that says what they belong to
loop.py     rounds, subjects in alternation, a session for each, failures recorded
outcome.py  rows with medians and spread, ratios of paired rounds, verdicts on goals; text, JSON and picture written
table.py    grids as text
plot.py     panels as a PNG
options.py  the command line

store.py and loop.py need nothing but the standard library: a machine with a GPU need not have msgspec.
"""

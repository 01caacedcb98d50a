"""Seeded simulation of the whole server in one process and virtual time: `python -m simulation SEED` in tests/."""

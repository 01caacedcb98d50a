"""Chaos on a real server: processes that are killed, clients that leave, do not read, or come in hordes."""

"""The jobs that wait for an encoder process: tenants take turns, and of a tenant's jobs the shortest goes first."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Generic, Protocol, TypeVar


class Waiting(Protocol):
    """A job that waits. rank: of its tenant's the lowest goes first."""

    length_bytes: int
    rank: float
    tenant: str


T = TypeVar("T", bound=Waiting)


class JobQueue(Generic[T]):
    """Whoever was given the fewest bytes has the next turn. A tenant that begins to wait starts where the others
    are, so that nobody gains by asking for little, nor by many jobs at once."""

    def __init__(self) -> None:
        self._waiting: dict[str, dict[T, None]] = {}  # by tenant, of those that have some
        self._given: dict[str, float] = {}  # bytes, by tenant
        self._level = 0.0  # bytes that whoever had the last turn had been given before it

    def __iter__(self) -> Iterator[T]:
        return (job for jobs in self._waiting.values() for job in jobs)

    def __contains__(self, job: T) -> bool:
        return job in self._waiting.get(job.tenant, ())

    def add(self, job: T) -> None:
        """Have a job wait."""
        if (jobs := self._waiting.get(job.tenant)) is None:
            jobs = self._waiting[job.tenant] = {}
            self._given[job.tenant] = max(self._given.get(job.tenant, 0.0), self._level)
        jobs[job] = None

    def discard(self, job: T) -> None:
        """Have a job wait no more, if it does."""
        if (jobs := self._waiting.get(job.tenant)) is not None:
            jobs.pop(job, None)
            if not jobs:
                del self._waiting[job.tenant]

    def take(self, most_bytes: float) -> T | None:
        """Take the job that is due next, of those with at most so many bytes; None if there is none."""
        due: T | None = None
        for jobs in self._waiting.values():
            fitting = (job for job in jobs if job.length_bytes <= most_bytes)
            first = min(fitting, key=lambda job: job.rank, default=None)
            if first is not None and (due is None or self._given[first.tenant] < self._given[due.tenant]):
                due = first
        if due is None:
            return None
        self.discard(due)
        self._level = max(self._level, self._given[due.tenant])
        self._given[due.tenant] += due.length_bytes
        self._given = {
            name: count for name, count in self._given.items() if name in self._waiting or count > self._level
        }
        return due

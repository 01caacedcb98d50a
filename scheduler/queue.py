"""Who waits, in which order: a heap that allows removal, and the gates that hold newcomers back."""

from __future__ import annotations

import heapq
from collections.abc import Iterator

from cierzo.scheduler.plan import Constraint, RequestKey
from cierzo.scheduler.request import Request

HeapEntry = tuple[float, int, Request]
COMPACT_ABOVE = 64  # dead entries


class RequestHeap:
    """Requests by an ascending (number, unique number); O(log n) for each operation, removal included.

    A removed request's entry stays in the heap as a dead one until it surfaces, or until dead entries outnumber
    the living: memory follows the number of living ones. It holds nothing but the request's key: a request may have
    megabytes of images.
    """

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, RequestKey]] = []
        self._live: dict[RequestKey, HeapEntry] = {}

    def __len__(self) -> int:
        return len(self._live)

    def __iter__(self) -> Iterator[Request]:
        """The living, in the order in which they came."""
        return (entry[2] for entry in self._live.values())

    def __contains__(self, key: RequestKey) -> bool:
        return key in self._live

    def push(self, request: Request, order: tuple[float, int]) -> None:
        """Add a request that is not in the heap."""
        assert request.key not in self._live, f"request {request.key} is queued twice"
        self._live[request.key] = (*order, request)
        heapq.heappush(self._heap, (*order, request.key))

    def first(self) -> HeapEntry | None:
        """The least entry, or None."""
        while self._heap:
            number, unique, key = self._heap[0]
            entry = self._live.get(key)
            if entry is not None and entry[1] == unique and entry[0] == number:
                return entry
            heapq.heappop(self._heap)
        return None

    def discard(self, request: Request) -> bool:
        """Remove a request if it is there; whether it was."""
        if self._live.pop(request.key, None) is None:
            return False
        if len(self._heap) > 2 * len(self._live) + COMPACT_ABOVE:
            self._heap = [(number, unique, key) for key, (number, unique, _) in self._live.items()]
            heapq.heapify(self._heap)
        return True


class GrammarGate:
    """Sequences that are held until their grammars are made."""

    def __init__(self) -> None:
        self._held: dict[RequestKey, Request] = {}

    def __len__(self) -> int:
        return len(self._held)

    def enter(self, request: Request) -> None:
        """Hold a newcomer."""
        self._held[request.key], request.is_held = request, True

    def made(self, key: RequestKey, constraint: Constraint) -> Request | None:
        """Let go of a sequence; None if it is over, or has its key from one that is."""
        request = self._held.get(key)
        if request is None or request.new.constraint is not constraint:
            return None
        request.is_held = False
        return self._held.pop(key)

    def ended(self, request: Request) -> None:
        """Forget a request, if it is held, and have its grammar forgotten."""
        self._held.pop(request.key, None)
        if request.new.constraint is not None:
            request.new.constraint.drop()

    def check(self, live: dict[RequestKey, Request]) -> None:
        """Assert that whoever is held lives."""
        for key, request in self._held.items():
            assert live.get(key) is request, f"{key} is held, and dead"


class SiblingGate:
    """Samples of one request share a prompt: one of them, the leader, computes it while the others are held.

    The others then find the prompt's blocks in the prefix index. A leader that ends early hands the lead on.
    """

    def __init__(self) -> None:
        self._leaders: dict[int, Request] = {}
        self._held: dict[int, dict[RequestKey, Request]] = {}
        self._num_held = 0

    def __len__(self) -> int:
        return self._num_held

    def enter(self, request: Request) -> bool:
        """Whether the newcomer may queue now, as the leader; else it is held."""
        request_id = request.key[0]
        if request_id not in self._leaders:
            self._leaders[request_id] = request
            return True
        self._held.setdefault(request_id, {})[request.key] = request
        self._num_held += 1
        return False

    def prompt_computed(self, request: Request) -> list[Request]:
        """The leader's prompt is in the cache: those who may queue now. Empty for any other request."""
        request_id = request.key[0]
        if self._leaders.get(request_id) is not request:
            return []
        del self._leaders[request_id]
        released = list(self._held.pop(request_id, {}).values())
        self._num_held -= len(released)
        return released

    def ended(self, request: Request) -> Request | None:
        """A request is over, at whatever point: the new leader, who may queue now, if there is one."""
        request_id = request.key[0]
        held = self._held.get(request_id, {})
        if held.pop(request.key, None) is not None:
            self._num_held -= 1
            if not held:
                del self._held[request_id]
            return None
        if self._leaders.get(request_id) is not request:
            return None
        if not held:
            del self._leaders[request_id]
            return None
        heir = held.pop(next(iter(held)))
        self._num_held -= 1
        if not held:
            del self._held[request_id]
        self._leaders[request_id] = heir
        return heir

    def check(self, live: dict[RequestKey, Request]) -> None:
        """Assert that whoever is held has a living leader, so that someone will let it go."""
        for request_id, held in self._held.items():
            assert held, f"request {request_id} keeps an empty list of held siblings"
            leader = self._leaders.get(request_id)
            assert leader is not None, f"siblings of {request_id} are held by no one"
            assert live.get(leader.key) is leader, f"siblings of {request_id} are held by a dead leader"
        assert self._num_held == sum(map(len, self._held.values())), f"{self._num_held} held, {self._held}"

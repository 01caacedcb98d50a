"""The search for the stream that kills cores, and which streams a new core gets meanwhile. Pure bookkeeping.

After a death all streams come back at once. A stream shows life by making LIFE_TOKENS new tokens, on one core or on
several, or by ending: generation is exact, so a stream that kills its core does so at the same place each time.
Streams that two cores in a row had and saw no life of are suspects. They are searched by halves: a new core first
gets all others; once these have shown life, so that a death cannot be theirs, it gets one half, while the other
half is held. If it dies, that half is halved again; if the half lives, the held ones follow, a group at a time. A
single suspect of which MAX_DEATHS cores in a row died is found; those that are held then form one group, as a
second killer would be among them.

New streams join at any time. Those that a core had when it died of a group under test are no suspects by that; they
are among the first that the next core gets, before the group: if it is one of them that kills, it is seen then.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from typing import Generic, TypeVar

T = TypeVar("T", bound=Hashable)

LIFE_TOKENS = 3  # of each sample; the step behind the first one may have been under way when a core died
MAX_DEATHS = 2  # of cores, in a row, that died while a suspect was alone under test


class Recovery(Generic[T]):
    """Tell it what happens (`sent`, `made`, `ended`, `died`), and ask whom a new core may have."""

    def __init__(self) -> None:
        self._lifeless: dict[T, int] = {}  # what the core has, and tokens until it counts as alive
        self._needed: dict[T, int] = {}  # such tokens of streams that the core before had, lifeless
        self._before: set[T] = set()  # what the core before had when it died, lifeless
        self._first: set[T] = set()  # must show life before the group under test is sent
        self._group: dict[T, None] = {}  # under test, in order of arrival; those that have shown no life yet
        self._group_sent = False
        self._held: list[dict[T, None]] = []  # groups for later, the next one last
        self._lonely_deaths = 0  # of cores, in a row, that had the group's only member

    @property
    def searching(self) -> bool:
        """Whether there are suspects: the deaths of cores meanwhile are steps of the search, which ends."""
        return bool(self._group)

    @property
    def num_suspects(self) -> int:
        """Streams that are under test or held."""
        return len(self._group) + sum(map(len, self._held))

    @property
    def group(self) -> list[T]:
        """The streams under test, or to be tested next, in order of arrival."""
        return [*self._group]

    def may_go(self, stream: T) -> bool:
        """Whether the core may have it now; a suspect's time comes by `due`."""
        return stream not in self._group and not any(stream in group for group in self._held)

    # --- what happens ----------------------------------------------------------------------------------

    def sent(self, stream: T, num_samples: int) -> None:
        """The core has been given a stream, of which so many samples run."""
        tokens = LIFE_TOKENS * num_samples
        self._lifeless[stream] = min(tokens, self._needed.pop(stream, tokens))

    def made(self, stream: T, num_tokens: int, *, ended: bool) -> bool:
        """A sample made tokens, or ended; True if the stream has shown life by this, and `due` may have news."""
        left = self._lifeless.get(stream)
        if left is None:
            return False
        left -= LIFE_TOKENS if ended else num_tokens
        if left > 0:
            self._lifeless[stream] = left
            return False
        del self._lifeless[stream]
        self._clear(stream)
        return True

    def ended(self, stream: T) -> None:
        """A stream has ended, or is not to be computed any more."""
        self._lifeless.pop(stream, None)
        self._needed.pop(stream, None)
        self._before.discard(stream)
        for group in self._held:
            if stream in group:
                del group[stream]
        self._held = [group for group in self._held if group]
        self._clear(stream)

    def died(self) -> T | None:
        """The core is gone. Returns the stream that has killed it and those before it, if that is certain now."""
        lifeless = [*self._lifeless]
        self._needed |= self._lifeless
        self._lifeless = {}
        found = None
        if self._group and self._group_sent:
            suspects = [*self._group]
            if len(suspects) == 1:
                self._lonely_deaths += 1
            else:
                self._halve(suspects)
            if self._lonely_deaths == MAX_DEATHS:
                found = suspects[0]
                self._take_all_held()
        else:
            suspects = [stream for stream in lifeless if stream in self._before]
            if suspects:
                self._suspect(suspects, alone=len(lifeless) == 1)
        self._before = set(lifeless).difference(suspects)
        self._group_sent = False
        return found

    # --- whom the core gets ----------------------------------------------------------------------------

    def restart(self, streams: Iterable[T]) -> list[T]:
        """A new core is up, and `streams` want to go on: those that it gets now. The others follow by `due`."""
        now = [stream for stream in streams if self.may_go(stream)]
        self._first = set(now)
        return now

    def due(self) -> list[T]:
        """Suspects that the core is to be given now; each is told once for a core."""
        if not self._group or self._group_sent or self._first:
            return []
        self._group_sent = True
        return [*self._group]

    # --- inside ----------------------------------------------------------------------------------------

    def _clear(self, stream: T) -> None:
        """A stream is no suspect (any more)."""
        self._first.discard(stream)
        if stream in self._group:
            del self._group[stream]
            if not self._group:
                self._next_group()

    def _next_group(self) -> None:
        self._group = self._held.pop() if self._held else {}
        self._group_sent = False
        self._lonely_deaths = 0

    def _take_all_held(self) -> None:
        self._held = [{stream: None for group in reversed(self._held) for stream in group}]
        self._next_group()

    def _suspect(self, suspects: list[T], *, alone: bool) -> None:
        """Two cores in a row died of these; a group that was to be tested waits."""
        if self._group:
            self._held.append(self._group)
        if len(suspects) > 1:
            self._halve(suspects)
            return
        self._group = dict.fromkeys(suspects)
        self._lonely_deaths = int(alone)

    def _halve(self, suspects: list[T]) -> None:
        middle = (len(suspects) + 1) // 2
        self._held.append(dict.fromkeys(suspects[middle:]))
        self._group = dict.fromkeys(suspects[:middle])
        self._lonely_deaths = 0

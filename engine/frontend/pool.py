"""A limit that all tenants share: half of it is kept for them, divided by weight, and the other half is for whoever
comes first. So nobody can take so much that another one is refused while it has less than its part.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from cierzo.engine.errors import Overloaded
from cierzo.engine.frontend.tenants import Tenant


@dataclass(slots=True, eq=False)
class _Part:
    """Amounts that a tenant has, and that are kept for it."""

    used: int = 0
    kept: int = 0


class Pool:
    """Something of which all tenants together may have `limit`. Who takes some gives it back.

    num: that is taken.
    """

    __slots__ = ("_common", "_excess", "_limit", "_name", "_num_kept", "_parts", "num")

    def __init__(self, name: str, limit: int) -> None:
        self.num = 0
        self._name, self._limit = name, limit
        self._parts: dict[str, _Part] = {}  # of whoever has some, or is kept some
        self._num_kept = 0  # tenants
        self._common, self._excess = limit, 0  # for whoever comes first, and what is taken of it

    def divide(self, tenants: Iterable[Tenant]) -> None:
        """Keep a part for each of these tenants, by weight; others have what is common."""
        weights = {tenant.name: tenant.weight for tenant in tenants}
        total = sum(weights.values())
        used = {name: part.used for name, part in self._parts.items() if part.used}
        half = self._limit / 2
        self._parts = {name: _Part(used.pop(name, 0), int(half * w / total)) for name, w in weights.items()}
        self._parts |= {name: _Part(count) for name, count in used.items()}
        self._num_kept = len(weights)
        self._common = self._limit - sum(part.kept for part in self._parts.values())
        self._excess = sum(max(0, part.used - part.kept) for part in self._parts.values())

    def used(self, tenant: str) -> int:
        """Count what a tenant has."""
        return self._part(tenant).used

    def over(self, tenant: str) -> int:
        """Count what a tenant has beyond the part that is kept for it."""
        part = self._part(tenant)
        return max(0, part.used - part.kept)

    def has_more_than_its_part(self, tenant: str) -> bool:
        """Whether a tenant has more than is kept for it; where there is no other one, all is everybody's."""
        return self._num_kept < 2 or self.over(tenant) > 0

    def require(self, tenant: str, count: int, retry_after_s: float) -> None:
        """Raise Overloaded if a tenant cannot have so much more."""
        part = self._part(tenant)
        after = part.used + count
        if after <= part.kept or self._excess + after - max(part.used, part.kept) <= self._common:
            return
        others = self._num_kept > 1  # of whom a tenant learns nothing here
        raise Overloaded(
            f"{self._name} is {self._limit}{', for all tenants together' if others else ''}",
            field=self._name,
            limit=f"{self._limit}, for all tenants together" if others else self._limit,
            value=after if others else self.num + count,
            retry_after_s=retry_after_s,
        )

    def add(self, tenant: str, count: int) -> None:
        """Take so much for a tenant, or (less than 0) give it back."""
        part = self._parts.get(tenant)
        if part is None:
            part = self._parts[tenant] = _Part()
        before, kept = part.used, part.kept
        after = part.used = before + count
        assert after >= 0, (self._name, tenant, before, count)
        self.num += count
        if before > kept or after > kept:
            self._excess += max(after, kept) - max(before, kept)
        if not after and not kept:
            del self._parts[tenant]

    def _part(self, tenant: str) -> _Part:
        return self._parts.get(tenant) or _NONE


_NONE = _Part()

"""A limit that all tenants share: half of it is kept for them, divided by weight, and the other half is for whoever
comes first. So nobody can take so much that another one is refused while it has less than its part.
"""

from __future__ import annotations

from collections.abc import Iterable

from cierzo.engine.errors import Overloaded
from cierzo.engine.frontend.tenants import Tenant


class Pool:
    """Something of which all tenants together may have `limit`. Who takes some gives it back."""

    __slots__ = ("_common", "_excess", "_limit", "_name", "_reserved", "_used", "num")

    def __init__(self, name: str, limit: int) -> None:
        self.num = 0  # that is taken
        self._name, self._limit = name, limit
        self._used: dict[str, int] = {}
        self._reserved: dict[str, int] = {}
        self._common, self._excess = limit, 0  # for whoever comes first, and what is taken of it

    def divide(self, tenants: Iterable[Tenant]) -> None:
        """Keep a part for each of these tenants, by weight; others have what is common."""
        weights = {tenant.name: tenant.weight for tenant in tenants}
        total = sum(weights.values())
        self._reserved = {name: int(self._limit / 2 * weight / total) for name, weight in weights.items()}
        self._common = self._limit - sum(self._reserved.values())
        self._excess = sum(max(0, used - self._reserved.get(name, 0)) for name, used in self._used.items())

    def used(self, tenant: str) -> int:
        """Count what a tenant has."""
        return self._used.get(tenant, 0)

    def over(self, tenant: str) -> int:
        """Count what a tenant has beyond the part that is kept for it."""
        return max(0, self._used.get(tenant, 0) - self._reserved.get(tenant, 0))

    def has_more_than_its_part(self, tenant: str) -> bool:
        """Whether a tenant has more than is kept for it; where there is no other one, all is everybody's."""
        return len(self._reserved) < 2 or self.over(tenant) > 0

    def require(self, tenant: str, count: int, retry_after_s: float) -> None:
        """Raise Overloaded if a tenant cannot have so much more."""
        after = self._used.get(tenant, 0) + count
        reserved = self._reserved.get(tenant, 0)
        if after <= reserved:
            return
        more = after - reserved - self.over(tenant)
        if self._excess + more <= self._common:
            return
        kept = self._limit - reserved - self._common
        others = f", of which {kept} are kept for other tenants"
        shared = self.num + count <= self._limit
        raise Overloaded(
            f"{self._name} is {self._limit}{others if shared else ''}",
            field=self._name,
            limit=reserved + self._common - self._excess + self.over(tenant) if shared else self._limit,
            value=after if shared else self.num + count,
            retry_after_s=retry_after_s,
        )

    def add(self, tenant: str, count: int) -> None:
        """Take so much for a tenant, or (less than 0) give it back."""
        used = self._used.get(tenant, 0)
        reserved = self._reserved.get(tenant, 0)
        after = used + count
        assert after >= 0, (self._name, tenant, used, count)
        self.num += count
        self._excess += max(0, after - reserved) - max(0, used - reserved)
        if after:
            self._used[tenant] = after
        else:
            self._used.pop(tenant, None)

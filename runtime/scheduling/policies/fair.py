"""Fair among tenants: who got least goes first.

Source: Sheng et al., Fairness in Serving Large Language Models (OSDI 2024), arXiv:2401.00588,
algorithm 2: the virtual token counter.
"""

import heapq
from collections import Counter, defaultdict, deque
from collections.abc import Sequence

from ..plan import LinesKind
from ..snapshot import RunningRequest, Snapshot, WaitingRequest

PROMPT_COST, OUTPUT_COST = 1, 2
"""Of a token. One that was found computed costs nothing."""


class Fair:
    """The backlogged tenant with the least counter is admitted next; the one with most gives way.

    A counter is a tenant's service over its weight, and the scheduler's to keep. Within a tenant,
    who came first goes first.

    **Places.** Where none is free, the tenant whose turn it is takes one from a tenant that got no
    less, and that has as many of them for its weight even afterwards. What runs counts as nothing
    for who takes one: so several requests of a light tenant, that come at once, need not wait for
    each other's costs to be made up for. Nobody waits for another's long outputs, and no place goes
    to and fro.
    """

    name = "fair"
    lines: LinesKind = "tenant"

    def rank(self, priority: int, waited_s: float) -> float:
        return -waited_s

    def newcomers(self, snapshot: Snapshot, count: int) -> Sequence[WaitingRequest]:
        lines: dict[str, deque[WaitingRequest]] = defaultdict(deque)
        for request in snapshot.waiting:
            lines[request.tenant].append(request)
        # Equal counters in the order in which they are shown.
        heap = [
            (snapshot.tenants[tenant].counter, place, tenant) for place, tenant in enumerate(lines)
        ]
        heapq.heapify(heap)
        num_left = {tenant: snapshot.tenants[tenant].num_waiting for tenant in lines}
        found: list[WaitingRequest] = []
        while heap and len(found) < count:
            counter, place, tenant = heap[0]
            if not lines[tenant]:  # its line goes on behind what is shown, and nobody else is next
                break
            request = lines[tenant].popleft()
            found.append(request)
            num_left[tenant] -= 1
            if num_left[tenant]:
                counter += _prompt_cost(request) / snapshot.tenants[tenant].weight
                heapq.heapreplace(heap, (counter, place, tenant))
            else:
                heapq.heappop(heap)
        return found

    def ranked(self, running: Sequence[RunningRequest]) -> Sequence[RunningRequest]:
        return running

    def goes_before(
        self, snapshot: Snapshot, newcomer: WaitingRequest, request: RunningRequest
    ) -> bool:
        return newcomer.tenant != request.tenant and _got_no_more(
            snapshot, newcomer.tenant, request.tenant
        )

    def loser(self, snapshot: Snapshot) -> RunningRequest:
        counters = {tenant: share.counter for tenant, share in snapshot.tenants.items()}
        most = max(counters[request.tenant] for request in snapshot.running)
        return next(r for r in snapshot.running[::-1] if counters[r.tenant] == most)

    def claims(self, snapshot: Snapshot) -> Sequence[tuple[WaitingRequest, RunningRequest]]:
        """One at most: counters then say anew whose turn it is."""
        if snapshot.short is not None:
            claimants = [r for r in snapshot.waiting if r.key == snapshot.short]
        elif snapshot.num_free <= 0:
            claimants = _first_of_each(snapshot)
        else:
            return ()
        for claimant in claimants:
            loser = self._claimed(snapshot, claimant)
            if loser is not None:
                return ((claimant, loser),)
        return ()

    def _claimed(self, snapshot: Snapshot, claimant: WaitingRequest) -> RunningRequest | None:
        """Whose place a request may take: the last admitted of the tenant that has most."""
        num_places = Counter(request.tenant for request in snapshot.running)

        def part(tenant: str, more: int) -> float:
            return (num_places[tenant] + more) / snapshot.tenants[tenant].weight

        losers = [
            request
            for request in snapshot.running
            if request.tenant != claimant.tenant
            and part(claimant.tenant, 1) <= part(request.tenant, -1)
            and _got_no_more(snapshot, claimant.tenant, request.tenant)
        ]
        if not losers:
            return None
        most = max(part(request.tenant, 0) for request in losers)
        loser = next(r for r in losers[::-1] if part(r.tenant, 0) == most)
        num_pages = snapshot.pages_obtainable + snapshot.num_pages(loser.num_tokens)
        return loser if snapshot.num_pages(claimant.num_tokens) <= num_pages else None


def _first_of_each(snapshot: Snapshot) -> list[WaitingRequest]:
    """Of each tenant that is shown the first in line; who got least comes first."""
    first: dict[str, WaitingRequest] = {}
    for request in snapshot.waiting:
        first.setdefault(request.tenant, request)
    return [first[tenant] for tenant in sorted(first, key=lambda one: _got(snapshot, one))]


def _got(snapshot: Snapshot, tenant: str) -> float:
    """A tenant's counter without the tokens of what it runs."""
    share = snapshot.tenants[tenant]
    num_tokens = sum(r.num_tokens for r in snapshot.running if r.tenant == tenant)
    return share.counter - num_tokens / share.weight


def _got_no_more(snapshot: Snapshot, tenant: str, other: str) -> bool:
    return _got(snapshot, tenant) <= snapshot.tenants[other].counter


def _prompt_cost(request: WaitingRequest) -> int:
    """What admitting it will add to its tenant's counter, unless some of it is found."""
    return 0 if request.was_admitted else PROMPT_COST * request.num_tokens

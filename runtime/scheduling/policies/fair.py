"""Fair among tenants: who got least goes first.

Source: Sheng et al., Fairness in Serving Large Language Models (OSDI 2024), arXiv:2401.00588,
algorithm 2: the virtual token counter.
"""

import heapq
from collections import defaultdict, deque
from collections.abc import Sequence

from ..plan import LinesKind
from ..snapshot import RunningRequest, Snapshot, WaitingRequest

PROMPT_COST, OUTPUT_COST = 1, 2
"""Of a token. One that was found computed costs nothing."""


class Fair:
    """The backlogged tenant with the least counter is admitted next; the one with most gives way.

    A counter is a tenant's service over its weight, and the scheduler's to keep. Within a tenant,
    who came first goes first.
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

    def goes_before(self, newcomer: WaitingRequest, request: RunningRequest) -> bool:
        return False

    def loser(self, snapshot: Snapshot) -> RunningRequest:
        counters = {tenant: share.counter for tenant, share in snapshot.tenants.items()}
        most = max(counters[request.tenant] for request in snapshot.running)
        return next(r for r in snapshot.running[::-1] if counters[r.tenant] == most)

    def claims(self, snapshot: Snapshot) -> Sequence[tuple[WaitingRequest, RunningRequest]]:
        return ()


def _prompt_cost(request: WaitingRequest) -> int:
    """What admitting it will add to its tenant's counter, unless some of it is found."""
    return 0 if request.was_admitted else PROMPT_COST * request.num_tokens

"""Dynamic SplitFuse: decodes first, then chunks of prompts, within a token budget.

Source: DeepSpeed-FastGen, arXiv:2401.08671, section 3.
"""

from collections.abc import Sequence

from ..plan import Order, Plan, Share
from ..snapshot import RunningRequest, Snapshot, WaitingRequest
from .fcfs import Fcfs


class SplitFuse:
    """One token for each request that decodes, and chunks of prompts in what is left.

    Prompts under way go before new ones, unless the order says that a newcomer goes before them.
    When memory runs short, one request gives its slot up, the last admitted if the order says no
    other; what that frees is for those that needed it, so the step admits nobody else.
    """

    name = "splitfuse"

    def __init__(self, order: Order | None = None) -> None:
        self.order: Order = order or Fcfs()

    def plan(self, snapshot: Snapshot) -> Plan:
        if snapshot.is_short_of_a_running_one:
            if len(snapshot.running) == 1:
                return Plan()  # there is nobody to give way
            return self._plan(snapshot, (), [self.order.loser(snapshot)])
        if claims := self.order.claims(snapshot):
            claimants, losers = zip(*claims, strict=True)
            plan = self._plan(snapshot, claimants, losers)
            if plan.admit_tokens > 0:  # else it would be for nothing
                return plan
        if snapshot.num_preempted or snapshot.short is not None:
            return self._plan(snapshot, (), ())
        return self._plan(snapshot, self.order.newcomers(snapshot, snapshot.num_free), ())

    def _plan(
        self,
        snapshot: Snapshot,
        newcomers: Sequence[WaitingRequest],
        losers: Sequence[RunningRequest],
    ) -> Plan:
        gone = {request.key for request in losers}
        ungranted = [
            request
            for request in self.order.ranked(snapshot.running)
            if request.key not in snapshot.granted and request.key not in gone
        ]
        budget = snapshot.budget + sum(snapshot.granted.get(key, 0) for key in gone)
        shares: list[Share] = []
        for decodes in (True, False):
            for request in ungranted:
                if (request.num_uncomputed == 1) == decodes:
                    kept = 0 if decodes else self._tokens_before(snapshot, request, newcomers)
                    count = min(request.num_uncomputed, budget - kept)
                    if count > 0:
                        shares.append(Share(request.key, count))
                        budget -= count
        return Plan(
            preempt=tuple(request.key for request in losers),
            shares=tuple(shares),
            admit=tuple(request.key for request in newcomers),
            admit_tokens=budget if newcomers else 0,
        )

    def _tokens_before(
        self, snapshot: Snapshot, request: RunningRequest, newcomers: Sequence[WaitingRequest]
    ) -> int:
        """Tokens, at most, of newcomers that go before a prompt under way."""
        before = self.order.goes_before
        return sum(
            newcomer.num_tokens for newcomer in newcomers if before(snapshot, newcomer, request)
        )

"""Prefill first: whole prompts, and decodes only if there are none. A baseline to compare with.

Orca and vLLM 0.2 did so: requests that decode stand still while prompts are computed.
"""

from ..plan import Order, Plan, Share
from ..snapshot import Snapshot
from .fcfs import Fcfs


class PrefillFirst:
    """As many whole prompts as the budget holds; a prompt beyond it goes alone.

    Decodes run where no prompt could be admitted.
    """

    name = "prefill_first"

    def __init__(self, order: Order | None = None) -> None:
        self.order: Order = order or Fcfs()

    def plan(self, snapshot: Snapshot) -> Plan:
        running, granted = self.order.ranked(snapshot.running), dict(snapshot.granted)
        preempt = ()
        if snapshot.is_short_of_a_running_one:
            if len(running) == 1:
                return Plan()  # there is nobody to give way
            preempt = (self.order.loser(snapshot).key,)
            running = [request for request in running if request.key not in preempt]
            granted.pop(preempt[0], None)
        elif claim := self._claim(snapshot):
            return claim
        # A prompt runs already if its step failed, or if it had to be computed again.
        prompts = [r for r in running if r.num_uncomputed > 1 and r.key not in granted]
        shares = [Share(request.key, request.num_uncomputed) for request in prompts]
        budget = snapshot.max_batch_tokens - sum(granted.values())
        budget -= sum(share.num_tokens for share in shares)
        if snapshot.short is None and not preempt:
            newcomers = self.order.newcomers(snapshot, snapshot.num_free)
            admit = tuple(request.key for request in newcomers)
            if admit:
                return Plan(
                    shares=tuple(shares), admit=admit, admit_tokens=budget, whole_prompts=True
                )
        decoding = any(r.num_uncomputed == 1 for r in running if r.key in granted)
        if decoding or not (shares or granted):
            for request in running:
                if request.num_uncomputed == 1 and request.key not in granted and budget > 0:
                    shares.append(Share(request.key, 1))
                    budget -= 1
        return Plan(preempt=preempt, shares=tuple(shares))

    def _claim(self, snapshot: Snapshot) -> Plan | None:
        """One request in the place of another, with its whole prompt and before all else."""
        claims = self.order.claims(snapshot)
        if not claims:
            return None
        claimant, loser = claims[0]
        budget = snapshot.budget + snapshot.granted.get(loser.key, 0)
        others = snapshot.granted.keys() - {loser.key}
        if others and claimant.num_tokens > budget:
            return None
        return Plan(
            preempt=(loser.key,), admit=(claimant.key,), admit_tokens=budget, whole_prompts=True
        )

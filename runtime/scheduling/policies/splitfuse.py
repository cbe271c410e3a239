"""Dynamic SplitFuse: decodes first, then chunks of prompts, within a token budget.

Source: DeepSpeed-FastGen, arXiv:2401.08671, section 3.
"""

from ..plan import Plan, Share
from ..snapshot import Snapshot


class SplitFuse:
    """One token for each request that decodes, and chunks of prompts in what is left.

    Prompts under way go before new ones. When memory runs short, the last admitted gives its slot
    up; what that frees is for those that needed it, so the step admits nobody.
    """

    name = "splitfuse"

    def plan(self, snapshot: Snapshot) -> Plan:
        running = snapshot.running
        preempt = ()
        if snapshot.is_short_of_a_running_one:
            if len(running) == 1:
                return Plan()  # there is nobody to give way
            preempt = (running[-1].key,)
            running = running[:-1]
        ungranted = [r for r in running if r.key not in snapshot.granted]
        budget = snapshot.budget + sum(snapshot.granted.get(key, 0) for key in preempt)
        shares: list[Share] = []
        for decodes in (True, False):
            for request in ungranted:
                if (request.num_uncomputed == 1) == decodes:
                    count = min(request.num_uncomputed, budget)
                    if count > 0:
                        shares.append(Share(request.key, count))
                        budget -= count
        if preempt or snapshot.num_preempted or snapshot.short is not None:
            return Plan(preempt=preempt, shares=tuple(shares))
        free = snapshot.max_seqs - len(running)
        return Plan(
            shares=tuple(shares),
            admit=tuple(request.key for request in snapshot.waiting[:free]),
            admit_tokens=budget,
        )

"""The ledger of a simulated cluster: what it says is told to instances, and what they do to it."""

from ..policies.ledger import Credit, Ledger
from ..snapshot import ClusterSnapshot, Loan
from .instance import SimulatedInstance
from .loans import Loans


class Bank:
    """Brings instances together that lend each other memory, and asks the ledger what they may."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._loans: dict[int, tuple[SimulatedInstance, Loans]] = {}
        self._gone: list[tuple[SimulatedInstance, Loans]] = []

    def join(self, instance: SimulatedInstance) -> None:
        """An instance is there. One that neither borrows nor lends is passed over."""
        if not isinstance(instance.loans, Loans):
            return
        for id, (_, others) in self._loans.items():
            others.meet(instance.id, instance.loans.lender)
            instance.loans.meet(id, others.lender)
        self._loans[instance.id] = instance, instance.loans
        instance.loans.place((), longest=0, gives_up=False)  # until the ledger is asked

    def leave(self, instance: SimulatedInstance) -> None:
        """An instance ends, which has nothing of others'."""
        if (gone := self._loans.pop(instance.id, None)) is not None:
            self._gone.append(gone)
            for _, others in self._loans.values():
                others.part(instance.id)

    def loans(self) -> tuple[Loan, ...]:
        """Of all pairs."""
        return tuple(
            Loan(debtor, int(name), num_tokens)
            for debtor, (_, loans) in self._loans.items()
            for name in loans.segments.loans.creditors
            if (num_tokens := loans.segments.loans.num_lent(name))
        )

    def longest(self, instance: SimulatedInstance) -> int:
        """Tokens of the longest request that an instance takes, with what others may lend it."""
        alone, loans = instance.cache.capacity_tokens, instance.loans
        if not isinstance(loans, Loans):
            return alone
        others = [
            other.max_lent_tokens
            for debtor, other in self._loans.values()
            if debtor is not instance and not debtor.is_draining
        ]
        return max(alone, loans.max_local_tokens + sum(others)) if others else alone

    def counts(self) -> dict[str, int]:
        """Of a `Report`: what was lent, and what ended against the will of who had it."""
        every = [loans.segments.loans for _, loans in (*self._loans.values(), *self._gone)]
        return {
            "lent_tokens": sum(one.lent.num_tokens for one in every),
            "num_loans_lost": sum(one.num_lost for one in every),
        }

    def settle(self, snapshot: ClusterSnapshot) -> None:
        """Ask the ledger, and have instances do as it says."""
        if not self._loans:
            return
        settlement = self._ledger.settle(snapshot)
        by_debtor: dict[int, list[Credit]] = {debtor: [] for debtor in self._loans}
        for credit in settlement.credits:
            by_debtor[credit.debtor].append(credit)
        for debtor, credits in by_debtor.items():
            instance, loans = self._loans[debtor]
            longest, gives_up = self.longest(instance), debtor in settlement.give_up
            if loans.place(credits, longest=longest, gives_up=gives_up):
                instance.others_change()

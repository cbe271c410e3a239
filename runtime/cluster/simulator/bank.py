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

    def join(self, instance: SimulatedInstance) -> None:
        """An instance is there. One that neither borrows nor lends is passed over."""
        if not isinstance(instance.loans, Loans):
            return
        for id, (_, others) in self._loans.items():
            others.meet(instance.id, instance.loans.lender)
            instance.loans.meet(id, others.lender)
        self._loans[instance.id] = instance, instance.loans

    def leave(self, instance: SimulatedInstance) -> None:
        """An instance ends, which has nothing of others'."""
        if self._loans.pop(instance.id, None) is not None:
            for _, others in self._loans.values():
                others.part(instance.id)

    def loans(self) -> tuple[Loan, ...]:
        """Of all pairs."""
        return tuple(
            Loan(debtor, account.creditor, account.num_tokens)
            for debtor, (_, loans) in self._loans.items()
            for account in loans.accounts.values()
            if account.num_tokens
        )

    @property
    def longest(self) -> int:
        """Tokens of the longest request that all together hold; its owner has a part of its own."""
        if not self._loans:
            return 0
        most = [loans.max_lent_tokens for _, loans in self._loans.values()]
        local = min(loans.max_local_tokens for _, loans in self._loans.values())
        return local + sum(most) - max(most)

    @property
    def num_lost(self) -> int:
        """Loans whose requests were computed again."""
        return sum(loans.num_lost for _, loans in self._loans.values())

    @property
    def lent_tokens(self) -> int:
        """Tokens that went to creditors, so far."""
        return sum(loans.segments.lent.num_tokens for _, loans in self._loans.values())

    def settle(self, snapshot: ClusterSnapshot) -> None:
        """Ask the ledger, and have instances do as it says."""
        if not self._loans:
            return
        by_debtor: dict[int, list[Credit]] = {debtor: [] for debtor in self._loans}
        settlement = self._ledger.settle(snapshot)
        for credit in settlement.credits:
            by_debtor[credit.debtor].append(credit)
        for debtor in settlement.give_up:
            self._loans[debtor][1].give_up()
        for debtor, credits in by_debtor.items():
            instance, loans = self._loans[debtor]
            if loans.take_credits(credits):
                instance.others_change()

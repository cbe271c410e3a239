"""What each tenant got: counters by which service is shared out fairly.

Source: Sheng et al., Fairness in Serving Large Language Models (OSDI 2024), arXiv:2401.00588.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import islice

from ..request.request import Request
from .policies.fair import OUTPUT_COST, PROMPT_COST
from .snapshot import TenantShare

MOST_IDLE = 256  # tenants without a request that are remembered
_FORGOTTEN_AT_ONCE = 32


@dataclass(frozen=True, kw_only=True)
class TenantStats:
    """What a tenant has and got, since it is remembered.

    Attributes:
        tenant: its name; empty for requests without one.
        num_unfinished: its requests that run or wait.
        prompt_tokens: computed for it, or about to be; those that were found do not count.
        output_tokens: generated for it.
        counter: its service over its weight, lifted whenever it came back to a line.
    """

    tenant: str
    num_unfinished: int
    prompt_tokens: int
    output_tokens: int
    counter: float


@dataclass(eq=False, slots=True)
class Account:
    """A tenant's counters, as of `TenantStats`.

    Attributes:
        num_in_line: requests that stand in its line.
        num_waiting: with those that wait for a leader's prompt.
    """

    tenant: str
    weight: float
    counter: float
    num_unfinished: int = 0
    num_in_line: int = 0
    num_waiting: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0

    def add(self, *, prompt_tokens: int = 0, output_tokens: int = 0) -> None:
        """Count tokens; those that a request did not get after all are negative."""
        self.prompt_tokens += prompt_tokens
        self.output_tokens += output_tokens
        self.counter += (PROMPT_COST * prompt_tokens + OUTPUT_COST * output_tokens) / self.weight


class Accounts:
    """The accounts of all tenants that have requests, and of some that had.

    A prompt is charged when its request gets a slot, and what of it was not computed when the slot
    is gone is given back. A token that is computed again was paid for.

    Of tenants without a request `MOST_IDLE` are remembered. Those with the least counters are
    forgotten first, and whoever is not known begins with no less than any forgotten one had: so
    nobody gets rid of what it owes by staying away, or by a new name.

    Args:
        weights: by tenant; 1 for those without.

    Attributes:
        on_lowered: called with an account whose counter has become less.
    """

    def __init__(self, weights: Mapping[str, float]) -> None:
        self._weights = weights
        self._accounts: dict[str, Account] = {}
        self._idle: dict[str, Account] = {}
        self.on_lowered: Callable[[Account], None] = lambda account: None
        self._least = 0.0  # with which one that is not known begins

    def __len__(self) -> int:
        return len(self._accounts)

    def of(self, request: Request) -> Account:
        """That of an unfinished request's tenant."""
        return self._accounts[request.tenant]

    def came(self, request: Request) -> None:
        """A new request."""
        tenant = request.tenant
        account = self._accounts.get(tenant)
        if account is None:
            weight = self._weights.get(tenant, 1.0)
            account = self._accounts[tenant] = Account(tenant, weight, self._least)
        self._idle.pop(tenant, None)
        account.num_unfinished += 1

    def left(self, request: Request) -> None:
        """A request has ended."""
        account = self.of(request)
        account.num_unfinished -= 1
        if not account.num_unfinished:
            self._idle[request.tenant] = account
            if len(self._idle) > MOST_IDLE:
                self._forget()

    def _forget(self) -> None:
        by_counter = sorted(self._idle.values(), key=lambda account: account.counter)
        for account in by_counter[:_FORGOTTEN_AT_ONCE]:
            del self._idle[account.tenant], self._accounts[account.tenant]
            self._least = max(self._least, account.counter)

    # -- what requests get ---------------------------------------------------------------------

    def admitted(self, request: Request) -> None:
        """A request has a slot, of which `num_computed` tokens were found."""
        found = min(request.num_computed, request.num_prompt_tokens)
        request.num_served = max(request.num_served, found)
        self.of(request).add(prompt_tokens=request.num_prompt_tokens - request.num_served)

    def released(self, request: Request) -> None:
        """A request gives its slot up; `num_computed` is still what it was."""
        served = min(request.num_computed, request.num_prompt_tokens)
        request.num_served = max(request.num_served, served)
        if request.num_served < request.num_prompt_tokens:
            account = self.of(request)
            account.add(prompt_tokens=request.num_served - request.num_prompt_tokens)
            self.on_lowered(account)

    def generated(self, request: Request) -> None:
        """A request got a token."""
        self.of(request).add(output_tokens=1)

    # -- what is told --------------------------------------------------------------------------

    def shares(self, requests: Iterable[Request]) -> dict[str, TenantShare]:
        """Of the tenants of some unfinished requests, for a policy."""
        accounts = {request.tenant: self.of(request) for request in requests}
        return {
            tenant: TenantShare(account.counter, account.weight, account.num_in_line)
            for tenant, account in accounts.items()
        }

    def stats(self) -> tuple[TenantStats, ...]:
        """Of those that are known longest, `MOST_IDLE` at most."""
        return tuple(
            TenantStats(
                tenant=account.tenant,
                num_unfinished=account.num_unfinished,
                prompt_tokens=account.prompt_tokens,
                output_tokens=account.output_tokens,
                counter=account.counter,
            )
            for account in islice(self._accounts.values(), MOST_IDLE)
        )

"""Who borrows memory from whom: what each instance may have where, and what has to go from there.

Source: Infinite-LLM, arXiv:2401.02669, section 5.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from functools import partial
from statistics import median

import msgspec

from ....vmem.errors import InvalidConfig
from ..snapshot import ClusterSnapshot, InstanceSnapshot, Loan, RequestSnapshot

Pair = tuple[int, int]
"""A debtor and a creditor."""


class Credit(msgspec.Struct, frozen=True):
    """What a debtor may have at a creditor. What it has there beyond that is to leave.

    Attributes:
        num_tokens: the most, what is there already included.
        is_called: what is beyond leaves at once, to another creditor or home; and where neither has
            room, its request is computed again. If not, it comes home as room is found.
    """

    debtor: int
    creditor: int
    num_tokens: int
    is_called: bool = False


class Settlement(msgspec.Struct, frozen=True):
    """What the ledger says.

    Attributes:
        credits: of all pairs that have one, or a loan; a debtor's in the order in which it asks.
        slow: pairs that are to have nothing to do with each other for a while.
        give_up: debtors whose requests that are longer than their memory give their slots up.
    """

    credits: tuple[Credit, ...] = ()
    slow: tuple[Pair, ...] = ()
    give_up: tuple[int, ...] = ()


class Ledger:
    """Places what requests have elsewhere. The same question gets the same answer.

    **Debtors** have requests that are longer than their memory, or more of them than fit; what one
    says that it lacks counts above what its requests let one expect. **Room** is what an instance's
    own requests leave of `max_lent_tokens`, those that wait included.

    **Order.** First what running requests cannot do without, of the instance with the oldest first;
    then what is lent already; then the first in line, if it is longer than an instance's memory:
    all that it needs or nothing, so that no two wait for each other with half of it. Then what
    would let more run. A creditor that has tokens of the debtor is asked first, then one of the
    same node, then the one with most room.

    **Back.** A creditor calls loans once its own requests have eaten `eaten` of what it keeps to
    spare; it is given new ones while all of that is there. Loans of requests that would fit at home
    come home once `returns` parts more than needed are lent. So no loan swings.

    **Too little for all.** Where running requests of an older instance cannot go on without it, the
    youngest long ones give up what they have, as far as that helps: they are computed again later.

    Args:
        part_tokens: what is lent is a multiple of it.
        slow_times, slow_floor_s: a creditor is slow whose answers take so many times those of
            others, or of the debtor's own layers, and more than that.
    """

    def __init__(
        self,
        *,
        part_tokens: int = 512,
        eaten: float = 0.5,
        returns: int = 2,
        slow_times: float = 8.0,
        slow_floor_s: float = 0.01,
    ) -> None:
        if part_tokens < 1 or not 0 < eaten <= 1 or returns < 1:
            raise InvalidConfig(
                f"part_tokens {part_tokens}, eaten {eaten}, returns {returns}: use at least one "
                "token, 0 < eaten <= 1 and at least one part"
            )
        if slow_times <= 1 or slow_floor_s < 0:
            raise InvalidConfig(
                f"slow_times {slow_times} and slow_floor_s {slow_floor_s}: use more than 1, and no "
                "negative time"
            )
        self.part_tokens = part_tokens
        self.eaten = eaten
        self.returns = returns
        self.slow_times = slow_times
        self.slow_floor_s = slow_floor_s

    def settle(self, snapshot: ClusterSnapshot) -> Settlement:
        """What each may have where from now on."""
        slow = self._slow(snapshot)
        if not any(instance.max_lent_tokens for instance in snapshot.instances):
            return Settlement()
        lent: dict[int, int] = defaultdict(int)
        for loan in snapshot.loans:
            lent[loan.debtor] += loan.num_tokens
        needs = [
            _Need(i, self.part_tokens, lent[i.id])
            for i in snapshot.instances
            if i.max_local_tokens is not None and i.role == "both"
        ]
        if not snapshot.loans and not any(n.must or n.wish or n.first for n in needs):
            return Settlement()
        books = _Books(snapshot, needs, self.part_tokens, self.eaten, snapshot.shunned | set(slow))
        running = sorted((n for n in needs if n.must), key=lambda n: (-n.oldest_s, n.id))
        for place, need in enumerate(running):
            if need.id in books.given_up:
                continue
            lacking = need.must - books.keep(need.id, need.must)
            lacking -= books.grow(need.id, lacking)
            if lacking:
                lacking -= books.keep(need.id, lacking, also_shunned=True)
            if lacking > 0 and need.num_long_tokens:
                books.give_up(need.id, lacking, running[:place:-1])
        for need in needs:
            books.keep(need.id, self._may_stay(need, books.num_lent(need.id)))
        in_line = sorted(needs, key=lambda n: (-n.waited_s, n.id))
        if all(map(books.let_in, in_line)):  # nobody passes the first that there is not enough for
            for need in in_line:
                books.grow(need.id, need.wish - books.num_granted(need.id))
        return Settlement(books.credits(), slow, tuple(sorted(books.given_up)))

    def _may_stay(self, need: "_Need", num_lent: int) -> int:
        """What a debtor may leave where it is, of what it has there."""
        if num_lent <= need.num_long_tokens + need.excess + self.returns * self.part_tokens:
            return num_lent
        return need.num_long_tokens + _up(need.excess, self.part_tokens)

    def _slow(self, snapshot: ClusterSnapshot) -> tuple[Pair, ...]:
        """Creditors whose answers take much longer than others', or than computing does."""
        measured = [loan for loan in snapshot.loans if loan.answer_s is not None]
        layers = {i.id: i.layer_s for i in snapshot.instances if i.layer_s is not None}
        found = []
        for loan in measured:
            others = [one.answer_s for one in measured if one.creditor != loan.creditor]
            usual = [median(a for a in others if a is not None)] if others else []
            usual += [layers[loan.debtor]] if loan.debtor in layers else []
            if not usual or loan.answer_s is None:
                continue  # nothing to compare it with
            pair = loan.debtor, loan.creditor
            if pair not in snapshot.shunned and loan.answer_s > max(
                self.slow_times * max(usual), self.slow_floor_s
            ):
                found.append(pair)
        return tuple(sorted(found))


class _Need:
    """What an instance's requests want of memory: here, and elsewhere.

    Attributes:
        here: tokens that it is to hold itself, of running requests and of those in line.
        must: tokens that have to be elsewhere, so that what runs goes on.
        excess: tokens of what would fit alone that are too many for all together; negative where
            there is room.
        wish: tokens elsewhere with which all could run.
        long_here: of `here`, those of running requests that are longer than its memory.
        num_long_tokens: all of theirs.
        first: the first in line, if others have to lend to it before it runs.
        oldest_s, waited_s: age of the oldest that runs, of the long ones if there are any, and of
            the oldest in line.
    """

    def __init__(self, instance: InstanceSnapshot, part_tokens: int, num_lent: int) -> None:
        self._instance = instance
        self._part = part_tokens
        self.id = instance.id
        running = [r for r in instance.requests if not r.is_waiting]
        waiting = [r for r in instance.requests if r.is_waiting]
        if instance.max_running is not None:
            waiting = waiting[: max(0, instance.max_running - len(running))]
        long = [r for r in running if self._is_long(r)]
        lacking, self._lacking_tokens = instance.lacking or (None, 0)
        self._first_lacks = any(r.key == lacking for r in waiting)
        first = next(
            (
                r
                for r in waiting
                if r.key == lacking or (not self._first_lacks and self._is_long(r))
            ),
            None,
        )
        behind = waiting.index(first) if first is not None else len(waiting)
        if self._first_lacks:
            behind = 0  # in its instance's own line, which need not be that of arrival
        self.first = first if behind == 0 else None
        short_line = sum(r.num_tokens for r in waiting[:behind])  # nobody passes a long one
        self.long_here = sum(map(self.part_here, long))
        running_here = sum(map(self.part_here, running))
        self.here = running_here + short_line
        self.num_long_tokens = sum(r.num_tokens for r in long)
        spare = instance.capacity_tokens - instance.max_lent_tokens
        tier = instance.tier_tokens
        elsewhere = sum(self.part_elsewhere(r, 1) for r in long)
        self._tier_left = max(0, tier - elsewhere)
        self.must = max(0, elsewhere - tier)
        if lacking is not None and not self._first_lacks:
            self.must = max(self.must, num_lent + self._lacking_tokens)
        self.must += _up(max(0, running_here - instance.capacity_tokens), part_tokens)
        self.excess = self.here + spare - instance.capacity_tokens
        self.wish = sum(
            max(r.num_tokens // part_tokens * part_tokens, self.part_elsewhere(r, part_tokens))
            for r in long
        )
        self.wish = max(0, self.wish - tier)
        if waiting or running_here > instance.capacity_tokens - spare // 2:
            self.wish += _up(self.excess, part_tokens)
        self.wish = max(self.wish, self.must)
        self.oldest_s = max((r.waited_s for r in long or running), default=0.0)
        self.waited_s = max((r.waited_s for r in waiting), default=0.0)

    def _is_long(self, request: RequestSnapshot) -> bool:
        most = max(request.num_tokens, request.most_tokens - 1)  # the last is never computed
        return most > self._instance.capacity_tokens

    @property
    def first_elsewhere(self) -> int:
        """Tokens of the first in line that others have to hold, so that it can begin."""
        if self.first is None:
            return 0
        if self._first_lacks:
            return _up(self._lacking_tokens, self._part)
        return max(0, self.part_elsewhere(self.first) - self._tier_left)

    def part_here(self, request: RequestSnapshot) -> int:
        """Tokens of a request that its instance holds itself."""
        local = self._instance.max_local_tokens
        if local is None or not self._is_long(request):
            return request.num_tokens
        return min(request.num_tokens, local)

    def part_elsewhere(self, request: RequestSnapshot, ahead: int = 0) -> int:
        """Tokens of a long request that others have to hold, once it has so many more."""
        most = request.num_tokens + ahead
        if request.most_tokens:
            most = min(most, max(request.num_tokens, request.most_tokens - 1))
        return _up(most - (self._instance.max_local_tokens or 0), self._part)


class _Books:
    """Room and credits, as one after the other is given some.

    Attributes:
        given_up: debtors that keep nothing, so that older ones can go on.
    """

    def __init__(
        self,
        snapshot: ClusterSnapshot,
        needs: Iterable[_Need],
        part_tokens: int,
        eaten: float,
        shunned: Iterable[Pair],
    ) -> None:
        self.given_up: set[int] = set()
        self._part = part_tokens
        self._shunned = frozenset(shunned)
        self._instances = {i.id: i for i in snapshot.instances}
        self._loans: dict[Pair, Loan] = {(one.debtor, one.creditor): one for one in snapshot.loans}
        self._by_debtor: dict[int, list[Loan]] = defaultdict(list)
        for loan in snapshot.loans:
            self._by_debtor[loan.debtor].append(loan)
        self._here = {need.id: need.here for need in needs}
        self._unsettled: dict[int, int] = defaultdict(int)  # lent, and nobody has said it may stay
        for loan in snapshot.loans:
            self._unsettled[loan.creditor] += loan.num_tokens
        self._old: dict[int, int] = {}  # room for what is there already
        self._new: dict[int, int] = {}  # room for more
        self._orders: dict[int, list[Pair]] = {}
        self._rooms = {  # that others have left, before anything is given
            i.id: i.max_lent_tokens
            - sum(r.num_tokens for r in i.requests)
            - self._unsettled.get(i.id, 0)
            for i in snapshot.instances
        }
        self._granted: dict[Pair, int] = {}
        self._settled: dict[Pair, int] = defaultdict(int)  # of a loan, what may stay
        self._eaten = eaten
        for instance in self._instances:
            self._measure(instance)

    def _measure(self, creditor: int) -> None:
        """What room an instance has, beside what its own requests hold and what it has granted."""
        one = self._instances[creditor]
        here = self._here.get(creditor, one.capacity_tokens)
        most = one.max_lent_tokens if one.takes_work and one.role == "both" else 0
        spare = int((one.capacity_tokens - one.max_lent_tokens) * (1 - self._eaten))
        given = sum(count for pair, count in self._granted.items() if pair[1] == creditor)
        self._new[creditor] = max(0, most - here - given)
        self._old[creditor] = max(0, min(most, one.capacity_tokens - here - spare) - given)

    # -- giving ------------------------------------------------------------------------------

    def keep(self, debtor: int, num_tokens: int, *, also_shunned: bool = False) -> int:
        """Let loans stay, so many tokens of them at most; returns how many."""
        if debtor in self.given_up:
            return 0
        wanted = num_tokens if also_shunned else num_tokens - self._num_settled(debtor)
        kept = 0
        for pair in self._order(debtor):
            loan = self._loans.get(pair)
            if loan is None or (pair in self._shunned) != also_shunned:
                continue
            rest = loan.num_tokens - self._settled[pair]
            count = min(rest, self._old[pair[1]], wanted - kept)
            if count > 0:
                self._settled[pair] += count
                self._unsettled[pair[1]] -= count
                self._give(pair, count)
                kept += count
        return kept

    def grow(self, debtor: int, num_tokens: int) -> int:
        """Let it borrow more, from what is free; returns how many tokens, at most a part more."""
        given = 0
        for pair in self._order(debtor) if debtor not in self.given_up else ():
            if given >= num_tokens:
                break
            if pair in self._shunned:
                continue
            room = self._free(pair[1]) // self._part * self._part
            count = min(room, _up(num_tokens - given, self._part))
            if count > 0:
                self._give(pair, count)
                given += count
        return given

    def give_up(self, debtor: int, lacking: int, younger: Sequence[_Need]) -> None:
        """Have the youngest give up all that they have, if that helps an older one to go on."""
        victims, found = [], 0
        usable = {creditor for _, creditor in self._order(debtor)}
        usable -= {creditor for one, creditor in self._shunned if one == debtor}
        for need in younger:
            if found >= lacking:
                break
            if need.id in self.given_up or not need.num_long_tokens:
                continue
            loans = self._by_debtor[need.id]
            there = sum(one.num_tokens for one in loans if one.creditor in usable)
            here = min(need.long_here, self._instances[need.id].max_lent_tokens)
            here = here if need.id in usable else 0
            if there + here:
                victims.append(need)
                found += there + here
        if found < lacking:
            return
        for need in victims:
            self.given_up.add(need.id)
            for one in self._by_debtor[need.id]:
                self._unsettled[one.creditor] -= one.num_tokens
            self._here[need.id] -= need.long_here
            self._measure(need.id)
        self.grow(debtor, lacking)

    def let_in(self, need: _Need) -> bool:
        """Let a debtor's first in line run, if it is a long one that has room for its part at home;
        False if others have not got enough for it."""
        request = need.first
        if request is None:
            return True
        here, elsewhere = need.part_here(request), need.first_elsewhere
        others = [pair for pair in self._order(need.id) if pair not in self._shunned]
        room = sum(self._free(creditor) // self._part * self._part for _, creditor in others)
        lent = sum(count for (_, creditor), count in self._granted.items() if creditor == need.id)
        fits = self._here[need.id] + lent + here <= self._instances[need.id].capacity_tokens
        if need.id in self.given_up or not fits:
            return True
        if room < elsewhere:
            return False
        self._here[need.id] += here
        self._measure(need.id)
        self.grow(need.id, elsewhere)
        return True

    def _give(self, pair: Pair, num_tokens: int) -> None:
        self._granted[pair] = self._granted.get(pair, 0) + num_tokens
        for rooms in (self._old, self._new):
            rooms[pair[1]] = max(0, rooms[pair[1]] - num_tokens)

    # -- what there is -----------------------------------------------------------------------

    def num_lent(self, debtor: int) -> int:
        """Tokens that others have of a debtor's now."""
        return sum(loan.num_tokens for loan in self._by_debtor[debtor])

    def num_granted(self, debtor: int) -> int:
        """Tokens that they may have of it, so far."""
        return sum(count for pair, count in self._granted.items() if pair[0] == debtor)

    def credits(self) -> tuple[Credit, ...]:
        """All of them, by debtor."""
        found = []
        debtors = {pair[0] for pair in (*self._granted, *self._loans)}
        for debtor in (one for one in self._instances if one in debtors):
            for pair in self._order(debtor):
                loan, count = self._loans.get(pair), self._granted.get(pair, 0)
                if count or loan is not None:
                    is_called = loan is not None and self._is_called(loan, count)
                    found.append(Credit(debtor, pair[1], count, is_called))
        return tuple(found)

    def _is_called(self, loan: Loan, num_tokens: int) -> bool:
        """Whether what is beyond has to leave: the creditor, or an older debtor, needs it."""
        if num_tokens >= loan.num_tokens:
            return False
        return loan.debtor in self.given_up or self._old[loan.creditor] < (
            loan.num_tokens - num_tokens
        )

    def _num_settled(self, debtor: int) -> int:
        return sum(self._settled[one.debtor, one.creditor] for one in self._by_debtor[debtor])

    def _free(self, creditor: int) -> int:
        return max(0, self._new[creditor] - self._unsettled[creditor])

    def _order(self, debtor: int) -> list[Pair]:
        """Whom a debtor asks, in order; the same however much was given meanwhile."""
        if debtor not in self._orders:
            others = (i for i in self._instances.values() if i.id != debtor)
            able = (i for i in others if i.max_lent_tokens or (debtor, i.id) in self._loans)
            ranked = sorted(able, key=partial(self._rank, self._instances[debtor]))
            self._orders[debtor] = [(debtor, creditor.id) for creditor in ranked]
        return self._orders[debtor]

    def _rank(
        self, debtor: InstanceSnapshot, creditor: InstanceSnapshot
    ) -> tuple[bool, bool, int, bool, int]:
        is_before = creditor.id < debtor.id  # so that not all ask the same
        room = self._rooms[creditor.id] // (2 * self._part)  # about as much is as good
        has_none = (debtor.id, creditor.id) not in self._loans
        return has_none, creditor.node != debtor.node, -room, is_before, creditor.id


def _up(num_tokens: int, part_tokens: int) -> int:
    """The next multiple; 0 for what is negative."""
    return max(0, -(-num_tokens // part_tokens)) * part_tokens

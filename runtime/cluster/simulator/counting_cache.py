"""What the scheduler needs of a cache, in counts: no memory, no tensors, no system calls.

Pages are shared, kept for the next request and reclaimed as in `allocator.SlotCache`. What is left
out changes no count that a scheduler sees: which pages they are, and when they are mapped. One
thing is coarser: a parked slot is reclaimed whole, and not from its end.
"""

from collections.abc import Hashable, Sequence

from ....vmem.errors import InvalidConfig, InvalidOperation, OutOfPages, RequestTooLong
from ...scheduling.tiers import common_prefix


class PageRun:
    """Pages that follow each other, of which each slot holds so many from the start.

    Attributes:
        live, parked: how many, for each slot that does.
    """

    __slots__ = ("live", "parked")

    def __init__(self) -> None:
        self.live: list[int] = []
        self.parked: list[int] = []


class CountedSlot:
    """A slot: what `allocator.Slot` says of one.

    Attributes:
        runs: its pages: of each run, as many as it holds of it.
        num_pages: of all runs.
        tokens, variant: what it holds, once it is parked.
    """

    __slots__ = (
        "index",
        "is_live",
        "num_pages",
        "num_pins",
        "num_tokens",
        "owner",
        "ready_tokens",
        "runs",
        "tokens",
        "variant",
    )

    def __init__(self, index: int, owner: Hashable = "") -> None:
        self.index = index
        self.owner = owner
        self.is_live = True  # its pages are not to be had: it is a request's, or pinned
        self.num_tokens = 0
        self.ready_tokens = 0
        self.num_pages = 0
        self.num_pins = 0
        self.runs: list[tuple[PageRun, int]] = []
        self.tokens: Sequence[int] = ()
        self.variant = ""

    def __repr__(self) -> str:
        return f"CountedSlot({self.index}, {self.num_tokens} tokens, {self.num_pages} pages)"


class CountingCache:
    """A cache of `capacity_tokens` tokens in pages of `page_tokens`.

    A call that raises has changed nothing for a live request. One class with many methods, as one
    count holds for all of them.

    Args:
        max_len: tokens of the longest request.
        max_parked: finished requests whose pages are kept until others need them.
    """

    def __init__(
        self,
        capacity_tokens: int,
        *,
        page_tokens: int = 16,
        max_len: int | None = None,
        max_parked: int = 256,
    ) -> None:
        if page_tokens < 1 or capacity_tokens < page_tokens:
            raise InvalidConfig(
                f"capacity_tokens {capacity_tokens} and page_tokens {page_tokens}: a page has a "
                "token at least, and a cache a page"
            )
        self.growth_tokens = page_tokens
        self.capacity_pages = capacity_tokens // page_tokens
        self.max_len = max_len if max_len is not None else capacity_tokens
        self.max_parked = max_parked
        self._num_live = 0  # pages that live slots hold, each once
        self._num_held = 0  # with those that only parked ones do
        self._num_opened = 0
        self._live: set[CountedSlot] = set()
        self._parked: dict[CountedSlot, None] = {}  # the oldest first
        self._by_start: dict[tuple[str, int], dict[CountedSlot, None]] = {}

    # -- counts ------------------------------------------------------------------------------

    @property
    def capacity_tokens(self) -> int:
        """Tokens that it can hold, in whole pages."""
        return self.capacity_pages * self.growth_tokens

    @property
    def live_tokens(self) -> int:
        """Tokens that the pages of live slots have room for."""
        return self._num_live * self.growth_tokens

    @property
    def parked_tokens(self) -> int:
        """The same of pages that only parked slots hold."""
        return (self._num_held - self._num_live) * self.growth_tokens

    def num_pages(self, num_tokens: int) -> int:
        """As of `KernelView`."""
        return -(-num_tokens // self.growth_tokens)

    def num_whole_pages(self, num_tokens: int) -> int:
        """As of `KernelView`."""
        return num_tokens // self.growth_tokens

    def num_obtainable(self) -> int:
        """As of `SlotCache`."""
        return self.capacity_pages - self._num_live

    # -- slots -------------------------------------------------------------------------------

    def open(self, owner: Hashable = "") -> CountedSlot:
        """A slot without pages; nothing is in them to be cleared between owners."""
        self._num_opened += 1
        slot = CountedSlot(self._num_opened, owner)
        self._live.add(slot)
        return slot

    def grow(self, slot: CountedSlot, num_tokens: int) -> None:
        """As of `SlotCache`. Raises OutOfPages or RequestTooLong."""
        if num_tokens > slot.ready_tokens:
            self.reserve(slot, num_tokens)
        if num_tokens > slot.num_tokens:
            slot.num_tokens = num_tokens

    def reserve(self, slot: CountedSlot, num_tokens: int) -> None:
        """As of `SlotCache`: what is promised counts as held."""
        if num_tokens > self.max_len:
            raise RequestTooLong(
                f"{num_tokens} tokens do not fit into a slot of {self.max_len}; "
                "raise max_len or shorten the request"
            )
        lacking = -(-num_tokens // self.growth_tokens) - slot.num_pages
        if lacking <= 0:
            return
        if self._num_held + lacking > self.capacity_pages:
            self._obtain(lacking)
        run, held = slot.runs[-1] if slot.runs else (None, 0)
        if run is not None and len(run.live) == 1 and not run.parked:  # nobody else's
            run.live[0] = held + lacking
            slot.runs[-1] = run, held + lacking
            self._num_live += lacking
            self._num_held += lacking
        else:
            self._hold(slot, PageRun(), lacking)
        slot.num_pages += lacking
        slot.ready_tokens = slot.num_pages * self.growth_tokens

    def fork(
        self, slot: CountedSlot, num_tokens: int, owner: Hashable | None = None
    ) -> CountedSlot:
        """As of `SlotCache`."""
        child = self.open()
        left = self.num_whole_pages(num_tokens)
        for run, held in slot.runs:
            if left <= 0:
                break
            shared = min(held, left)
            self._hold(child, run, shared)
            child.num_pages += shared
            left -= shared
        child.ready_tokens = child.num_pages * self.growth_tokens
        try:
            self.grow(child, num_tokens)
        except OutOfPages:
            self.close(child)
            raise
        return child

    def adopt(
        self, tokens: Sequence[int], variant: str = "", *, owner: Hashable | None = None
    ) -> tuple[CountedSlot, int]:
        """As of `SlotCache`."""
        slot, found = self._best_prefix(tokens, variant)
        if slot is None:
            if self._is_tight(len(tokens)):
                self._reclaim_largest()
            return self.open(), 0
        if slot.num_pins or 2 * found < len(slot.tokens):
            try:
                return self.fork(slot, found), found
            except OutOfPages:
                if slot.num_pins:
                    return self.open(), 0
        self._forget(slot)
        self._set_live(slot, True)
        self._live.add(slot)
        if self._is_shared(slot, found // self.growth_tokens):  # which is not to be written to
            found = self.num_whole_pages(found) * self.growth_tokens
            self._cut(slot, self.num_pages(found))
        slot.num_tokens = found
        slot.tokens, slot.variant = (), ""
        return slot, found

    def prefix_length(self, tokens: Sequence[int], variant: str = "") -> int:
        """As of `SlotCache`."""
        return self._best_prefix(tokens, variant)[1]

    def park(self, slot: CountedSlot, tokens: Sequence[int], variant: str = "") -> None:
        """As of `SlotCache`."""
        if len(tokens) > slot.num_tokens:
            raise InvalidOperation(f"{slot} cannot hold the KV of {len(tokens)} tokens")
        if not self.max_parked or not len(tokens):
            self.close(slot)
            return
        self._cut(slot, self.num_pages(len(tokens)))
        slot.tokens, slot.variant, slot.num_tokens = tokens, variant, len(tokens)
        self._live.discard(slot)
        self._set_live(slot, slot.num_pins > 0)
        self._parked[slot] = None
        self._by_start.setdefault((variant, tokens[0]), {})[slot] = None
        if len(self._parked) > self.max_parked:
            self._reclaim_oldest()

    def close(self, slot: CountedSlot) -> None:
        """As of `SlotCache`."""
        self._live.remove(slot)
        self._cut(slot, 0)

    def look_ahead(self, slot: CountedSlot, num_tokens: int) -> None:
        """Nothing: mapping ahead takes no time here."""

    def pin(self, slot: CountedSlot) -> None:
        """Keep a slot's pages from being reclaimed, parked or not, until `unpin`."""
        slot.num_pins += 1

    def unpin(self, slot: CountedSlot) -> None:
        """Undo a `pin`."""
        slot.num_pins -= 1
        if not slot.num_pins and slot in self._parked:
            self._set_live(slot, False)

    # -- pages -------------------------------------------------------------------------------

    def _obtain(self, num_pages: int) -> None:
        """See that so many pages are held by nobody. Raises OutOfPages with nothing changed."""
        if num_pages > self.num_obtainable():
            raise OutOfPages(
                f"{num_pages} pages are not to be had: live requests hold {self._num_live} of "
                f"{self.capacity_pages}"
            )
        while self.capacity_pages - self._num_held < num_pages:
            self._reclaim_oldest()

    def _is_tight(self, num_tokens: int) -> bool:
        """Whether a new slot for so many tokens would soon have a parked one reclaimed."""
        num_free = self.capacity_pages - self._num_held
        return len(self._parked) >= self.max_parked or num_free < self.num_pages(num_tokens)

    def _reclaim_oldest(self) -> None:
        self._reclaim(next((slot for slot in self._parked if not slot.num_pins), None))

    def _reclaim_largest(self) -> None:
        """As a request without a prefix does, which takes the pages over."""
        loose = (slot for slot in self._parked if not slot.num_pins)
        self._reclaim(max(loose, key=lambda slot: slot.num_pages, default=None))

    def _reclaim(self, slot: CountedSlot | None) -> None:
        if slot is not None:
            self._forget(slot)
            self._cut(slot, 0)

    def _forget(self, slot: CountedSlot) -> None:
        """A slot is parked no more."""
        del self._parked[slot]
        start = slot.variant, slot.tokens[0]
        del self._by_start[start][slot]
        if not self._by_start[start]:
            del self._by_start[start]

    def _cut(self, slot: CountedSlot, num_pages: int) -> None:
        """Let go of the pages of a slot beyond the first `num_pages`."""
        while slot.num_pages > num_pages:
            run, held = slot.runs.pop()
            kept = max(0, held - (slot.num_pages - num_pages))
            self._leave(run, run.live if slot.is_live else run.parked, held)
            slot.num_pages -= held - kept
            if kept:
                self._hold(slot, run, kept)
        slot.ready_tokens = slot.num_pages * self.growth_tokens

    def _is_shared(self, slot: CountedSlot, page: int) -> bool:
        """Whether others hold a page of a slot, too."""
        for run, held in slot.runs:
            if page < held:
                return sum(length > page for length in (*run.live, *run.parked)) > 1
            page -= held
        return False

    def _set_live(self, slot: CountedSlot, is_live: bool) -> None:
        if slot.is_live == is_live:
            return
        runs, slot.runs = slot.runs, []
        for run, held in runs:
            self._leave(run, run.live if slot.is_live else run.parked, held)
        slot.is_live = is_live
        for run, held in runs:
            self._hold(slot, run, held)

    def _hold(self, slot: CountedSlot, run: PageRun, num_pages: int) -> None:
        slot.runs.append((run, num_pages))
        self._change(run, run.live if slot.is_live else run.parked, add=num_pages)

    def _leave(self, run: PageRun, lengths: list[int], num_pages: int) -> None:
        self._change(run, lengths, remove=num_pages)

    def _change(self, run: PageRun, lengths: list[int], *, add: int = 0, remove: int = 0) -> None:
        """One slot more or less holds a run, and the totals with it."""
        live, held = _longest(run)
        if add:
            lengths.append(add)
        if remove:
            lengths.remove(remove)
        live_after, held_after = _longest(run)
        self._num_live += live_after - live
        self._num_held += held_after - held

    def _best_prefix(self, tokens: Sequence[int], variant: str) -> tuple[CountedSlot | None, int]:
        best, longest = None, 0
        if len(tokens):
            for slot in self._by_start.get((variant, tokens[0]), ()):
                found = common_prefix(tokens, slot.tokens)
                if found >= longest:  # the most recent of equals
                    best, longest = slot, found
        return best, longest

    def check_invariants(self) -> None:
        """Recount from scratch; AssertionError names what does not add up."""
        slots = [*self._live, *self._parked]
        runs: dict[PageRun, tuple[list[int], list[int]]] = {}
        for slot in slots:
            assert slot.num_pages == sum(held for _, held in slot.runs), slot
            assert slot.num_tokens <= slot.ready_tokens, slot
            assert slot.is_live == (slot in self._live or slot.num_pins > 0), slot
            for run, held in slot.runs:
                assert held > 0, slot
                runs.setdefault(run, ([], []))[not slot.is_live].append(held)
        for run, (live, parked) in runs.items():
            assert sorted(run.live) == sorted(live), "a run is held by others than it says"
            assert sorted(run.parked) == sorted(parked), "a run is held by others than it says"
        assert self._num_live == sum(_longest(run)[0] for run in runs)
        assert self._num_held == sum(_longest(run)[1] for run in runs)
        assert self._num_held <= self.capacity_pages, "more is held than there is"
        assert {s for group in self._by_start.values() for s in group} == set(self._parked)


def _longest(run: PageRun) -> tuple[int, int]:
    """Pages of a run that live slots hold, and that any does."""
    live = max(run.live) if run.live else 0
    return live, max(live, *run.parked) if run.parked else live

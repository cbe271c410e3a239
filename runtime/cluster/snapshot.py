"""The state of a cluster as a policy sees it: plain numbers, no engines, no channels."""

from collections.abc import Mapping
from typing import Literal, Self

import msgspec

from ..request.spec import SequenceKey

Role = Literal["prefill", "decode", "both"]
"""What an instance is for: prompts, the tokens after them, or all of it."""


class RequestSnapshot(msgspec.Struct, frozen=True, gc=False):
    """A request that an instance has.

    Attributes:
        num_tokens: its tokens, prompt and output.
        num_uncomputed: those still to go through the model; 1 at most once its prompt is computed.
        priority: the lower, the earlier.
        is_waiting: it has no slot, and so no keys and values that would have to move with it.
        waited_s: since it came.
        is_migratable: it may be moved now; not so while it is being moved already, or while others
            have some of its tokens.
        most_tokens: those that it may have in the end; 0 if that is not known.
    """

    key: SequenceKey
    num_tokens: int
    num_uncomputed: int
    priority: int = 0
    is_waiting: bool = False
    waited_s: float = 0.0
    is_migratable: bool = True
    most_tokens: int = 0

    @property
    def has_prompt(self) -> bool:
        """True once the keys and values of its prompt are there: it generates."""
        return not self.is_waiting and self.num_uncomputed <= 1


class Newcomer(msgspec.Struct, frozen=True, kw_only=True):
    """A request that no instance has yet.

    Attributes:
        num_tokens: of its prompt.
        prefixes: of instances that hold a beginning of it, how many tokens.
        most_tokens: as of `RequestSnapshot`.
        needs: what it computes with beside the model, by name, and how many bytes of memory that
            takes: an adapter, the blocks of a chain.
    """

    key: SequenceKey
    num_tokens: int
    priority: int = 0
    tenant: str = ""
    most_tokens: int = 0
    prefixes: Mapping[int, int] = {}
    needs: Mapping[str, int] = {}

    def as_request(self, *, is_waiting: bool) -> RequestSnapshot:
        """As an instance that was given it has it."""
        return RequestSnapshot(
            self.key,
            num_tokens=self.num_tokens,
            num_uncomputed=self.num_tokens,
            priority=self.priority,
            is_waiting=is_waiting,
            most_tokens=self.most_tokens,
        )


class InstanceSnapshot(msgspec.Struct, frozen=True, kw_only=True):
    """An instance, as it last reported, and what it was given since.

    Attributes:
        id: names it as long as the cluster exists.
        home: what it was to be, where its role is "both" since others are missing; else None.
        is_alive: it answers.
        is_draining: it is to end, takes nothing, and hands over what it has.
        node: names the machine that it is on.
        capacity_tokens: tokens whose keys and values it can hold.
        used_tokens: of live requests, those included for which room is kept while they come, and
            what it holds for others' requests; without what others hold for its own.
        parked_tokens: of finished requests; they give way to live ones.
        num_running, num_waiting: live requests with a slot, and without.
        max_running: slots that it has; None for no limit.
        queued_tokens: prompt tokens that it has still to compute.
        residents: what is in its memory beside the model, or will be for what it was given.
        requests: running ones in the order of admission, then those that wait, in line.
        max_lent_tokens: the most that it may hold for others' requests; 0 where it lends nothing.
        max_local_tokens: the most that it has itself of a request that may outgrow its memory;
            None where no request may.
        tier_tokens: of requests that are longer than its memory, those that its own host memory
            holds or has room for.
        lacking: the request that stands still until others lend so many tokens more; None if none
            does, or if that is not known.
        layer_s: what a layer of its steps takes, by the median; None if that is not known.
    """

    id: int
    capacity_tokens: int
    role: Role = "both"
    node: str = ""
    home: Role | None = None
    is_alive: bool = True
    is_draining: bool = False
    used_tokens: int = 0
    parked_tokens: int = 0
    num_running: int = 0
    num_waiting: int = 0
    max_running: int | None = None
    queued_tokens: int = 0
    residents: frozenset[str] = frozenset()
    requests: tuple[RequestSnapshot, ...] = ()
    max_lent_tokens: int = 0
    max_local_tokens: int | None = None
    tier_tokens: int = 0
    lacking: tuple[SequenceKey, int] | None = None
    layer_s: float | None = None

    @property
    def takes_work(self) -> bool:
        """Whether it may be given anything."""
        return self.is_alive and not self.is_draining

    @property
    def free_tokens(self) -> int:
        """Tokens that no live request holds."""
        return self.capacity_tokens - self.used_tokens

    @property
    def num_requests(self) -> int:
        """Live requests, with a slot and without."""
        return self.num_running + self.num_waiting

    @property
    def has_free_slot(self) -> bool:
        """Whether one more request could run."""
        return self.max_running is None or self.num_running < self.max_running

    @property
    def own_role(self) -> Role:
        """What it is to be where nobody is missing."""
        return self.home or self.role

    @property
    def is_for_prompts(self) -> bool:
        """Whether newcomers are for it."""
        return self.takes_work and self.role != "decode"

    @property
    def is_for_decodes(self) -> bool:
        """Whether requests that generate are for it."""
        return self.takes_work and self.role != "prefill"

    def missing_bytes(self, newcomer: Newcomer) -> int:
        """Of what a newcomer needs, what would have to be loaded here."""
        needs = newcomer.needs.items()
        return sum(size for name, size in needs if name not in self.residents)

    def with_given(self, newcomer: Newcomer) -> Self:
        """The same once it was given a newcomer: in line if others are, else taken to run."""
        if self.num_waiting:
            return self.with_newcomer(newcomer)
        request = newcomer.as_request(is_waiting=False)
        return msgspec.structs.replace(
            self,
            num_running=self.num_running + 1,
            used_tokens=self.used_tokens + newcomer.num_tokens,
            queued_tokens=self.queued_tokens + newcomer.num_tokens,
            residents=self.residents.union(newcomer.needs),
            requests=(*self.requests, request),
        )

    def with_newcomer(self, newcomer: Newcomer) -> Self:
        """The same with a newcomer in line, until it reports it itself."""
        request = newcomer.as_request(is_waiting=True)
        return msgspec.structs.replace(
            self,
            num_waiting=self.num_waiting + 1,
            queued_tokens=self.queued_tokens + newcomer.num_tokens,
            residents=self.residents.union(newcomer.needs),
            requests=(*self.requests, request),
        )


class Costs(msgspec.Struct, frozen=True, kw_only=True):
    """What things take on an instance, as measured lately; 0 for what was not.

    Attributes:
        tokens_per_s: that a busy instance computes.
        load_bytes_per_s: of residents, from where they are kept.
        request_s: that a request keeps its slot.
    """

    tokens_per_s: float = 0.0
    load_bytes_per_s: float = 0.0
    request_s: float = 0.0

    def computing_s(self, num_tokens: int) -> float:
        """Until so many tokens are computed."""
        return num_tokens / self.tokens_per_s if self.tokens_per_s else 0.0

    def loading_s(self, num_bytes: int) -> float:
        """Until so many bytes are loaded."""
        return num_bytes / self.load_bytes_per_s if self.load_bytes_per_s else 0.0


class Link(msgspec.Struct, frozen=True):
    """What moving keys and values from one instance to another takes.

    Attributes:
        latency_s: of a hand-over without a byte.
        bytes_per_s: None where pages change hands and no byte is copied.
    """

    latency_s: float = 0.0
    bytes_per_s: float | None = None

    def time_s(self, num_bytes: int) -> float:
        """Until so many bytes are there."""
        copying_s = num_bytes / self.bytes_per_s if self.bytes_per_s is not None else 0.0
        return self.latency_s + copying_s


class Loan(msgspec.Struct, frozen=True, gc=False):
    """Tokens of one instance's requests that another has in its memory, all together.

    Attributes:
        debtor, creditor: whose they are, and who has them.
        answer_s: for how long the debtor waits for an answer about them in a layer, by the median;
            None if that is not known.
    """

    debtor: int
    creditor: int
    num_tokens: int
    answer_s: float | None = None


class ClusterSnapshot(msgspec.Struct, frozen=True, kw_only=True):
    """What there is to decide on.

    Attributes:
        time_s: now, on a clock that only goes forward.
        instances: all that are known, dead and draining ones included.
        links: between instances, by (source, target); none where it makes no difference.
        token_bytes: keys and values of a token.
        num_dispatched: requests that were given to instances so far.
        scaled_s: when the number of instances was last changed, or began to.
        switched_s: when an instance last got another role.
        loans: what instances hold for each other, one a pair.
        shunned: debtors and creditors that have nothing to do with each other for a while, since
            one was slow or could not be reached.
        costs: of work, where it was measured.
    """

    time_s: float
    instances: tuple[InstanceSnapshot, ...]
    links: Mapping[tuple[int, int], Link] = {}
    token_bytes: int = 0
    num_dispatched: int = 0
    scaled_s: float | None = None
    switched_s: float | None = None
    loans: tuple[Loan, ...] = ()
    shunned: frozenset[tuple[int, int]] = frozenset()
    costs: Costs = Costs()

    def is_copied(self, source: InstanceSnapshot, target: InstanceSnapshot) -> bool:
        """Whether moving a request between two instances takes bytes, and not just its pages."""
        link = self.links.get((source.id, target.id))
        return source.node != target.node if link is None else link.bytes_per_s is not None

    @property
    def working(self) -> list[InstanceSnapshot]:
        """Those that may be given work."""
        return [instance for instance in self.instances if instance.takes_work]

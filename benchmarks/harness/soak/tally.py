"""What has been counted so far, by any thread."""

import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ...runtime.engine.stats import EngineStats
from .right import Right, Turn, differs


@dataclass(frozen=True)
class Process:
    """A process when nothing ran in it.

    Attributes:
        name: what it is.
        rss_bytes: memory of its own.
    """

    name: str
    num_descriptors: int
    num_threads: int
    rss_bytes: int


@dataclass
class Tally:
    """Counts of a soak.

    Attributes:
        requests, tokens: that were whole and right, by kind, and those compared, by voice.
        moves: by kind.
        faults: that were injected, by kind.
        wrong_tokens, lost_requests: which there must be none of.
        wrong: what was wrong, a line each.
        leaks: what was left, a line each.
        processes: by name and number, what each was whenever nothing ran.
        held_pages: that instances held at each of those times, before anything was given back, and
            after.
    """

    requests: Counter[str] = field(default_factory=Counter)
    tokens: Counter[str] = field(default_factory=Counter)
    moves: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    wrong_tokens: int = 0
    lost_requests: int = 0
    wrong: list[str] = field(default_factory=list)
    leaks: list[str] = field(default_factory=list)
    processes: dict[str, list[Process]] = field(default_factory=dict)
    held_pages: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._lock = threading.Lock()
        self._engines: dict[tuple[str, int], Mapping[str, int]] = {}

    @property
    def is_right(self) -> bool:
        """Whether nothing was wrong so far."""
        return not (self.wrong_tokens or self.lost_requests or self.wrong or self.leaks)

    def whole(self, kind: str, voice: str, num_tokens: int) -> None:
        """A request was answered as it should be, as far as its client read."""
        with self._lock:
            self.requests[kind] += 1
            self.tokens[voice] += num_tokens

    def compare(self, where: str, found: Sequence[Right], right: Turn) -> bool:
        """Whether outputs are as they should be; what is not is noted."""
        for index, (one, wanted) in enumerate(zip(found, right, strict=True)):
            difference = differs(one, wanted)
            if difference is not None:
                line, num_tokens = difference
                of = f", output {index}" if len(right) > 1 else ""
                if num_tokens:
                    self.differs(f"{where}{of}: {line}", num_tokens)
                else:
                    self.lost(f"{where}{of}: {line}")
                return False
        return True

    def differs(self, line: str, num_tokens: int) -> None:
        """An answer is not right."""
        with self._lock:
            self.wrong_tokens += num_tokens
            self.wrong.append(line)

    def lost(self, line: str) -> None:
        """A request did not end, or ended with an error."""
        with self._lock:
            self.lost_requests += 1
            self.wrong.append(line)

    def leak(self, line: str) -> None:
        """Something is left."""
        with self._lock:
            self.leaks.append(line)

    def fault(self, kind: str) -> None:
        """One was injected."""
        with self._lock:
            self.faults[kind] += 1

    def note(self, phase: str, instance: int, stats: EngineStats) -> None:
        """What an engine said last; counts of those that have died since stay."""
        with self._lock:
            self._engines[phase, instance] = _moves_of(stats)

    def move(self, kind: str, count: int = 1) -> None:
        """Something moved, of which engines say nothing."""
        with self._lock:
            self.moves[kind] += count

    def there(self, kind: str, count: int) -> None:
        """So many are there now; the most of them counts."""
        with self._lock:
            self.moves[kind] = max(self.moves[kind], count)

    def all_moves(self) -> Counter[str]:
        """Those that engines have told of, and those that were noted."""
        with self._lock:
            return sum(map(Counter, self._engines.values()), Counter(self.moves))


def _moves_of(stats: EngineStats) -> Mapping[str, int]:
    found = {
        "prompt tokens found": stats.prefix_hit_tokens,
        "preemptions": stats.num_preemptions,
        "guesses": stats.num_drafted,
        "guesses that were right": stats.num_accepted,
        "steps replayed": stats.num_replays,
    }
    if stats.swap is not None:
        found |= {
            "to host memory": stats.swap.stored.num_moves,
            "back from host memory": stats.swap.fetched.num_moves,
        }
    if (segments := stats.segments) is not None:
        found |= {
            "lent to another instance": segments.lent.num_moves,
            "lent on": segments.moved_on.num_moves,
            "came home": segments.came_home.num_moves,
            "loans called": segments.num_called,
            "loans called back": segments.num_called_back,
            "loans lost": segments.num_lost,
        }
    return found

"""Two engines in this process, under one limit that moves, and sessions that go between them.

Clusters have no sessions' files, so this runs beside them: a conversation is begun by one engine,
saved, opened by the other, and goes on there. Meanwhile the limit of both is made less and more,
and they are put to sleep.
"""

import itertools
import random
import threading
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from ...allocator import MemoryLimit
from ...runtime.frontend.llm import LLM
from ...vmem.errors import VkvError
from .asks import Mix
from .clients import Known, Supply, rights_of
from .models import BASE, Models
from .options import SoakOptions
from .reference import Reference
from .tally import Tally

_LIMIT = 8 << 20  # of both engines
_LEAST_SHARE = 0.3
_PAUSE_S = (0.1, 1.0)  # between two conversations
_MAX_LEN = 1024


@contextmanager
def sessions(
    options: SoakOptions, models: Models, reference: Reference, home: Path, tally: Tally
) -> "Iterator[Desk]":
    """Conversations one after another, while it lasts."""
    adapters = models.adapters if options.has("adapters") else {}
    voices: dict[str, Mapping[str, Any]] = {BASE: {}}
    voices |= {f"{BASE}/{name}": {"adapter": name} for name in adapters}
    mix = Mix(name="sessions", kinds={"conversation": 1}, voices=tuple(voices))
    limit = MemoryLimit(_LIMIT)
    with ExitStack() as stack:
        supply = Supply(reference, mix, seed=options.seed)
        stack.callback(supply.close)
        supply.wait_for_first()
        engines = [
            stack.enter_context(
                LLM(
                    models.base,
                    device="cpu",
                    dtype="float32",
                    repeatable=True,
                    kv_memory=limit,
                    max_len=_MAX_LEN,
                    max_seqs=4,
                    adapters=adapters,
                )
            )
            for _ in range(2)
        ]
        desk = Desk(engines, limit, supply, voices, home, options, tally)
        thread = threading.Thread(target=desk.work, name="vkv-soak-desk", daemon=True)
        thread.start()
        try:
            yield desk
        finally:
            desk.is_over.set()
            thread.join()
        with desk.at_rest():
            pass


class Desk:
    """Has the conversations.

    Attributes:
        is_over: set it, and no further one is begun.
    """

    def __init__(
        self,
        engines: list[LLM],
        limit: MemoryLimit,
        supply: Supply,
        voices: Mapping[str, Mapping[str, Any]],
        home: Path,
        options: SoakOptions,
        tally: Tally,
    ) -> None:
        self._engines, self._limit, self._supply = engines, limit, supply
        self._voices, self._home, self._tally = voices, home, tally
        self._moves_limit = options.has("limits")
        self._chance = random.Random(f"{options.seed} sessions")
        self._numbers = itertools.count()
        self._talking = threading.Lock()
        self.is_over = threading.Event()

    def work(self) -> None:
        """One conversation after another."""
        while not self.is_over.wait(self._chance.uniform(*_PAUSE_S)):
            known = self._supply.next(self._chance)
            try:
                with self._talking:
                    self._converse(known)
                    self._disturb()
            except BaseException as error:
                self._tally.lost(f"{known.ask} in sessions ended with {error!r}")
                if not isinstance(error, VkvError):
                    raise

    def _converse(self, known: Known) -> None:
        """Each turn by the engine that did not answer the one before, from a file."""
        ask, said, num_tokens = known.ask, list[int](), 0
        path = self._home / f"{next(self._numbers)}.session"
        who: dict[str, Any] = dict(self._voices[ask.voice])
        for turn, (words, right) in enumerate(zip(ask.turns, known.right, strict=True)):
            engine = self._engines[turn % 2]
            said += words
            prompt: dict[str, Any] = {"prompt_token_ids": list(said)}
            if ask.salt:
                prompt["cache_salt"] = ask.salt
            (output,) = engine.generate(
                prompt, ask.params, progress=False, on_error="raise", tenant=ask.tenant, **who
            )
            found = rights_of(output)
            if not self._tally.compare(f"{ask}, turn {turn} of a session", found, right):
                return
            num_tokens += len(found[0].token_ids)
            if turn and output.num_cached_tokens:
                self._tally.move("tokens found in sessions", output.num_cached_tokens)
            said += found[0].token_ids
            prompt["prompt_token_ids"] = list(said)
            engine.save_session(path, prompt, **who)
            self._tally.move("sessions saved")
            if not self._engines[1 - turn % 2].open_session(path).is_usable:
                self._tally.differs(f"{ask}: what {path.name} holds is not usable", 0)
        self._tally.whole("session", ask.voice, num_tokens)
        path.unlink()

    def _disturb(self) -> None:
        """Less memory, or all of it again; or a little sleep."""
        if self._moves_limit:
            share = self._chance.choice([1.0, self._chance.uniform(_LEAST_SHARE, 1.0)])
            self._limit.resize(int(share * _LIMIT))
            self._tally.fault("less memory of two engines")
        if self._chance.random() < 0.1:
            engine = self._chance.choice(self._engines)
            engine.sleep()
            engine.wake()
            self._tally.fault("sleep")

    @contextmanager
    def at_rest(self) -> Iterator[None]:
        """While it lasts nobody talks; and then nothing may be held."""
        with self._talking:
            for engine in self._engines:
                engine.trim()
                if held := engine.stats().pages_held:
                    self._tally.leak(f"sessions: {held} pages are held while nothing runs")
            yield

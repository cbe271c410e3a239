"""Saves sessions of an engine, and opens them."""

import itertools
import logging
import os
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from ....allocator import KVFacts, KVFile, KVFileWriter
from ....vmem.errors import (
    InvalidConfig,
    InvalidOperation,
    KVFileMismatch,
    OutOfPages,
    RequestTooLarge,
    UnsupportedModel,
)
from ...engine.engine import Engine
from ...model.loading import LoadedModel
from ...request.outputs import RequestOutput
from ...request.sampling_params import SamplingParams
from ..driving.driver import LoopDriver
from ..front_end import FrontEnd
from ..prompts import ITSELF, Maker, Message, Prompt
from ..text_stream import RequestText
from .session import Session

Saved = Prompt | RequestOutput | Sequence[Message]
"""A prompt, of which all tokens are saved, or a request's output, with the prompt before it."""

_MOST_TRIES = 5  # to have all tokens in one slot, while other requests take slots over
_ONE_TOKEN = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True, detokenize=False)

_log = logging.getLogger(__name__)


class Sessions:
    """The sessions of one engine. Any number of threads may use it.

    Args:
        loaded: the model.
        engine: under `driver`, which nobody else turns.
        driver: of the engine's loop.
        front_end: makes requests.
        prefix_reuse: whether requests may begin with what was computed before.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        engine: Engine,
        driver: LoopDriver,
        front_end: FrontEnd,
        *,
        prefix_reuse: bool,
    ) -> None:
        self._loaded = loaded
        self._engine = engine
        self._driver = driver
        self._front_end = front_end
        self._prefix_reuse = prefix_reuse

    # -- saving ------------------------------------------------------------------------------

    def save(
        self,
        path: str | os.PathLike[str],
        what: Saved,
        extra: bytes = b"",
        by: Maker = ITSELF,
    ) -> Session:
        """As `LLM.save_session`."""
        self._check()
        if not self._engine.cache.max_parked:
            raise InvalidConfig(
                "max_parked is 0, so that nothing computed is kept to be saved; make it at least 1"
            )
        self._fingerprint()  # which may take seconds, while others go on
        for _ in range(_MOST_TRIES):
            request = self._request(what, by)
            with ExitStack() as undo:  # a signal's handler may raise where the file is handed over
                writer = self._compute_and_write(request, path, extra, undo)
                if writer is None:
                    continue
                writer.commit()
                return Session(
                    path=Path(path),
                    tokens=tuple(request.spec.prompt_token_ids),
                    num_bytes=writer.num_bytes,
                    extra=extra,
                )
        raise OutOfPages(
            f"other requests took the memory of what was to be saved in {path}, {_MOST_TRIES} "
            "times; raise kv_memory or max_parked, or save when fewer run"
        )

    def _request(self, what: Saved, by: Maker) -> RequestText:
        """Computes what is not computed of the tokens, and one more that nobody wants."""
        if isinstance(what, RequestOutput):
            outputs = [output.token_ids for output in what.outputs[:1]]
            tokens = [*what.prompt_token_ids, *itertools.chain(*outputs)]
            # A slot that is full has no room for what a request must put out.
            what = tokens[: self._engine.cache.max_len - 1]
        request = self._front_end.request(what, _ONE_TOKEN, by=by)
        num_tokens, cache = len(request.spec.prompt_token_ids), self._engine.cache
        if cache.num_pages(num_tokens) > cache.pool.limit_pages:
            raise RequestTooLarge(
                f"{num_tokens} tokens are more than the pool holds, which a session is written "
                "from; save fewer, or raise kv_memory"
            )
        return request

    def _compute_and_write(
        self, request: RequestText, path: str | os.PathLike[str], extra: bytes, undo: ExitStack
    ) -> KVFileWriter | None:
        """Have all tokens in a slot, and write them; None if another request was faster. `undo`
        discards what is written."""

        def take() -> KVFileWriter | bool | None:
            if not request.is_finished:
                return None
            if request.error is not None:
                raise request.error
            if request.is_aborted:
                raise InvalidOperation("this LLM was closed while it saved; create another")
            return self._write(request, path, extra, undo) or False

        self._driver.submit([request])
        try:
            written = self._driver.wait_for(take)
            return None if isinstance(written, bool) else written
        finally:
            self._driver.abandon([request])

    def _write(
        self, request: RequestText, path: str | os.PathLike[str], extra: bytes, undo: ExitStack
    ) -> KVFileWriter | None:
        """Write what is parked of the request's tokens, if that is all of them."""
        cache, exits = self._engine.cache, self._engine.scheduler.exits
        tokens, variant = request.spec.prompt_token_ids, request.spec.kv_variant
        slot, num_held = cache.adopt(tokens, variant, owner=request.spec.owner)
        try:
            if num_held < len(tokens):
                return None
            facts = KVFacts(
                model=self._fingerprint(),
                token_format=cache.geometry.token_format,
                tokens=tokens,
                variant=variant,
                extra=extra,
            )
            writer = undo.enter_context(KVFileWriter(path, facts))
            writer.write(cache.spans(slot, 0, num_held))
            return writer
        finally:
            exits.let_go(slot, tokens[:num_held], variant)

    # -- opening -----------------------------------------------------------------------------

    def open(self, path: str | os.PathLike[str]) -> Session:
        """As `LLM.open_session`."""
        self._check()
        if not self._prefix_reuse:
            raise InvalidConfig(
                "prefix_reuse is False, so that no prompt would begin with a session; leave it True"
            )
        file = KVFile.open(path)
        with ExitStack() as undo:
            undo.callback(file.close)
            self._fingerprint()
            return self._driver.wait_for(lambda: self._take_in(file, undo))

    def _take_in(self, file: KVFile, undo: ExitStack) -> Session:
        """Let requests begin with the file, if it is of this model and this cache; `undo` closes it
        otherwise, and not once it is theirs, whatever a signal's handler raises then."""
        self._driver.check_ready()
        self._engine.notice_changes()
        is_usable = file.num_sound > 0
        try:
            file.check_fits(self._fingerprint(), self._engine.cache.geometry.token_format)
        except KVFileMismatch as error:
            _log.warning("%s; its %d tokens are computed again", error, len(file.tokens))
            is_usable = False
        session = Session(
            path=file.path,
            tokens=tuple(file.tokens.tolist()),
            num_bytes=file.num_bytes,
            is_usable=is_usable,
            extra=file.header.extra,
        )
        if is_usable:
            self._engine.scheduler.tiers.kv_files.add(file)
            undo.pop_all()
        return session

    # -- both --------------------------------------------------------------------------------

    def _check(self) -> None:
        self._driver.check_ready()
        if self._loaded.keeps_state:
            raise UnsupportedModel(
                f"{type(self._loaded.model).__name__} has layers with recurrent or convolution "
                "state, which sessions do not hold; use a model in which all layers attend"
            )

    def _fingerprint(self) -> str:
        assert self._engine.fingerprint is not None
        return self._engine.fingerprint.value()

"""Grammars compiled for a model's vocabulary: under limits, away from the engine, and kept."""

from __future__ import annotations

import functools
import json
import threading
from collections import OrderedDict
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future
from contextlib import suppress

from llguidance import (
    LLExecutor,
    LLMatcher,
    LLParserLimits,
    LLTokenizer,
    TokenizerWrapper,
    grammar_from,
)
from transformers import PreTrainedTokenizerBase

from ...vmem.errors import InvalidSamplingParams
from ..request.structured_outputs import StructuredOutputsParams
from ..request.token_grammar import TokenGrammar, Vocabulary
from .token_bytes import SPECIAL, TextCutter, token_bytes

_COMPILE_S = 5.0  # after which whoever waits for a grammar is refused
_MOST_COMPILING = 2  # at once: those that were given up go on until they meet a limit
_MOST_KEPT = 64  # grammars, and refusals

# llguidance recurses over rules that name rules, and an overflow of the stack ends the process.
# These bytes are address space; memory is taken as far as they are used.
_STACK_BYTES = 512 << 20

_sizing = threading.Lock()  # the size of new threads' stacks is the process's, not a thread's

# llguidance lets the GIL go while it compiles and while it computes masks (a thread beside it was
# never kept from running for more than 0.1 s), but nothing can stop it from outside. These limits
# do: what meets none of them is compiled within a few seconds.
_MOST_SYMBOLS = 30_000

_TOO_LARGE = "use fewer properties, alternatives or repetitions"
# Enough for indentation. Without a bound a weak model may go on with nothing else to the end.
_WHITESPACE = r"[ \n\r\t]{1,40}"

_REMEDIES = {
    "json": "see the keywords that llguidance has for JSON schemas, or check the output instead",
    "regex": "use the syntax of Rust's regex, without look-around and back-references",
    "choice": "give fewer or shorter texts",
    "grammar": "use Lark's syntax as llguidance has it, with a rule `start`, or GBNF",
    "json_object": "use json with a schema",
}


def check_grammars(grammars: Grammars | None) -> Grammars:
    """What a model compiles grammars by. Raises InvalidSamplingParams if it has no tokenizer."""
    if grammars is None:
        raise InvalidSamplingParams(
            "structured_outputs need a tokenizer, and the model has none; pass tokenizer=, or use "
            "allowed_token_ids"
        )
    return grammars


class Grammars:
    """What requests of one model ask outputs to be, compiled. Any number of threads may use it.

    Args:
        tokenizer: the model's, which nobody changes.
        vocab_size: the width of the logits. They may be more than the tokenizer's tokens, or fewer.
        end_token_ids: all tokens that end an output, of whichever model.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        vocab_size: int,
        end_token_ids: Collection[int] = (),
    ) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._end_token_ids = sorted(end_token_ids)
        self._lock = threading.Lock()
        self._vocabulary_lock = threading.Lock()
        self._vocabulary: Vocabulary | None = None
        self._places = threading.BoundedSemaphore(_MOST_COMPILING)
        # Never advanced, only copied; or why it cannot be.
        self._kept: OrderedDict[StructuredOutputsParams, LLMatcher | str] = OrderedDict()

    def prepare(self, outputs: StructuredOutputsParams) -> None:
        """Compile a grammar, or find that it is; `start` is quick then.

        Raises InvalidSamplingParams if it is malformed, asks for what is not implemented, allows
        nothing, or takes too long.
        """
        self._find(outputs)

    def knows(self, outputs: StructuredOutputsParams) -> bool:
        """True if `prepare` has nothing to do, or refuses at once."""
        with self._lock:
            return outputs in self._kept

    def start(
        self, outputs: StructuredOutputsParams, ends: Collection[int] | None = None
    ) -> TokenGrammar:
        """A new output's place in its grammar, which is prepared if it was not.

        End tokens that are not among `ends`, None for all, come only where nothing else can. Raises
        as `prepare`.
        """
        matcher = self._find(outputs)
        allowed = self._end_token_ids if ends is None else ends
        return TokenGrammar(
            matcher.deep_copy(),
            self._the_vocabulary(),
            barred_ends=[one for one in self._end_token_ids if one not in allowed],
            # Copies share what llguidance learnt of the grammar, and so its end, too.
            on_failure=functools.partial(self._forget, outputs, matcher),
        )

    def _find(self, outputs: StructuredOutputsParams) -> LLMatcher:
        with self._lock:
            found = self._kept.get(outputs)
            if found is not None:
                self._kept.move_to_end(outputs)
        if found is None:
            found = self._compile_in_time(outputs, self._the_vocabulary().tokenizer)
        if isinstance(found, str):
            raise InvalidSamplingParams(found)
        return found

    def _keep(self, outputs: StructuredOutputsParams, found: LLMatcher | str) -> LLMatcher | str:
        with self._lock:
            self._kept[outputs] = found
            while len(self._kept) > _MOST_KEPT:
                self._kept.popitem(last=False)
        return found

    def _keep_late(self, outputs: StructuredOutputsParams, done: Future[LLMatcher | str]) -> None:
        """Put what nobody waited for any more in the place of the refusal."""
        if done.exception() is None:
            self._keep(outputs, done.result())

    def _forget(self, outputs: StructuredOutputsParams, matcher: LLMatcher) -> None:
        with self._lock:
            if self._kept.get(outputs) is matcher:
                del self._kept[outputs]

    def _the_vocabulary(self) -> Vocabulary:
        """The tokens as llguidance wants them; made on first use, which takes about a second."""
        with self._vocabulary_lock:
            if self._vocabulary is None:
                tokens = _tokens(self._tokenizer, self._vocab_size, self._end_token_ids)
                self._vocabulary = Vocabulary(tokens, LLExecutor())
            return self._vocabulary

    def _compile_in_time(
        self, outputs: StructuredOutputsParams, vocabulary: LLTokenizer
    ) -> LLMatcher | str:
        """A matcher, or why there is none, which is kept.

        Raises InvalidSamplingParams for what may pass: others' grammars left no time for it, or the
        system has no thread.
        """
        if not self._places.acquire(timeout=_COMPILE_S):
            raise InvalidSamplingParams(
                f"structured_outputs.{outputs.kind} was not compiled in {_COMPILE_S:g} s, since "
                "others take long; try again"
            )
        future: Future[LLMatcher | str] = Future()

        def work() -> None:
            try:
                future.set_result(_compile(outputs, vocabulary))
            except BaseException as error:  # noqa: BLE001 - raised again where it is waited for
                future.set_exception(error)
            finally:
                self._places.release()

        try:
            _start(work)
        except RuntimeError as error:
            self._places.release()
            raise InvalidSamplingParams(
                f"structured_outputs.{outputs.kind} was not compiled: {error}, with a stack of "
                f"{_STACK_BYTES >> 20} MiB; try again, or allow the process more threads or memory"
            ) from error
        with suppress(TimeoutError):
            return self._keep(outputs, future.result(_COMPILE_S))
        late = (
            f"structured_outputs.{outputs.kind} was not compiled in {_COMPILE_S:g} s; {_TOO_LARGE}"
        )
        self._keep(outputs, late)
        future.add_done_callback(functools.partial(self._keep_late, outputs))
        return late


def _compile(outputs: StructuredOutputsParams, vocabulary: LLTokenizer) -> LLMatcher | str:
    """A matcher that has computed its first mask, or why there is none."""
    limits = LLParserLimits(max_grammar_size=_MOST_SYMBOLS, verbose_errors=False)
    try:
        matcher = LLMatcher(vocabulary, _in_llguidance(outputs), log_level=0, limits=limits)
    except ValueError as error:  # what cannot be read at all
        return _refusal(outputs, str(error))
    if not matcher.is_error():
        matcher.compute_bitmask()  # the first takes longest
    if matcher.is_error():
        return _refusal(outputs, matcher.get_error())
    return matcher


def _refusal(outputs: StructuredOutputsParams, why: str) -> str:
    if "coerce_one_of" in why:
        why, remedy = "oneOf has alternatives that may hold at once", "use anyOf"
    elif why.startswith("NoExtension"):
        why, remedy = "it allows no output of this model's tokens", "check what it asks for"
    elif "too big" in why or "too large" in why or "too many" in why:
        remedy = _TOO_LARGE
    else:
        remedy = _REMEDIES[outputs.kind]
    what = " ".join(why.replace("<non-verbose/>", "").split())
    if len(what) > 320:  # it repeats the grammar, and then says what is wrong
        what = f"{what[:100]} … {what[-200:]}"
    return f"structured_outputs.{outputs.kind} cannot be followed: {what}; {remedy}"


def _in_llguidance(outputs: StructuredOutputsParams) -> str:
    """The grammar in llguidance's own form. Raises ValueError if it cannot be read."""
    if outputs.is_json:
        return LLMatcher.grammar_from_json_schema(
            outputs.schema_text,
            overrides={
                "lenient": False,  # keywords that are not implemented are refused by name
                "coerce_one_of": False,
                "whitespace_flexible": not outputs.disable_any_whitespace,
                "whitespace_pattern": _whitespace(outputs),
            },
        )
    if outputs.regex is not None:
        return LLMatcher.grammar_from_regex(outputs.regex)
    if outputs.choice is not None:
        # A terminal, so that one text may begin another.
        texts = " | ".join(json.dumps(text) for text in outputs.choice)
        return LLMatcher.grammar_from_lark(f"start: CHOICE\nCHOICE: {texts}\n")
    assert outputs.grammar is not None
    return grammar_from("grammar", outputs.grammar)


def _whitespace(outputs: StructuredOutputsParams) -> str | None:
    """The pattern of whitespace between JSON's tokens; None for none."""
    return None if outputs.disable_any_whitespace else outputs.whitespace_pattern or _WHITESPACE


def _start(work: Callable[[], None]) -> threading.Thread:
    """A thread for `work`, with a stack for it."""
    thread = threading.Thread(target=work, name="vkv-grammar")
    with _sizing:
        before = threading.stack_size(_STACK_BYTES)
        try:
            thread.start()
        finally:
            threading.stack_size(before)
    return thread


class _TokensForLlguidance:
    """A vocabulary under the names that llguidance's `TokenizerWrapper` reads."""

    def __init__(
        self, table: Sequence[bytes], end_token_id: int, cut: Callable[[bytes | str], list[int]]
    ) -> None:
        self.tokens = table
        self.eos_token_id = end_token_id
        self.bos_token_id: int | None = None
        self._cut = cut

    def __call__(self, text: bytes | str) -> list[int]:
        return self._cut(text)


def _tokens(
    tokenizer: PreTrainedTokenizerBase, vocab_size: int, end_token_ids: Sequence[int]
) -> LLTokenizer:
    """The tokens as llguidance wants them, at least `vocab_size`.

    Raises InvalidSamplingParams if the tokenizer's are not known as bytes.
    """
    table = token_bytes(tokenizer, vocab_size, end_token_ids)
    ends = list(end_token_ids)
    if not ends:  # one that the model does not have
        ends = [len(table)]
        table.append(SPECIAL + b"<end>")
    cutter = TextCutter(tokenizer, table)
    tokens = _TokensForLlguidance(table, ends[0], cutter)
    vocabulary = LLTokenizer(TokenizerWrapper(tokens), eos_token=ends)
    cutter.longest_first = vocabulary.greedy_tokenize
    return vocabulary
